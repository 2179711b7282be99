"""The Triton kernels run without a GPU: in Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

OPS = ["affinity_update", "combine", "gram_affinity_update", "task_gram"]
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) < (3, 7),
    reason="the interpreter of Triton 3.6, which torch 2.10 brings, does not run with NumPy 2.4",
)
@pytest.mark.parametrize(
    ("which", "least"),
    [
        pytest.param("triton and not (float64 or bfloat16)", 150, id="float32"),
        pytest.param("triton and (float64 or bfloat16)", 40, id="others", marks=pytest.mark.full),
    ],
)
def test_ops_in_the_interpreter(which, least):
    tests = [f"tests/ops/test_{op}.py" for op in OPS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests, "-k", which],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least
    assert "skipped" not in done.stdout
