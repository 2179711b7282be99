"""The Triton kernels run without a GPU: in Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

OPS = ["affinity_update", "combine", "gram_affinity_update", "task_gram"]
ROOT = Path(__file__).parents[2]


def test_ops_in_the_interpreter():
    tests = [f"tests/ops/test_{op}.py" for op in OPS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests, "-k", "triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 180
    assert "skipped" not in done.stdout
