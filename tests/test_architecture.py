"""The diffs on the page "Architecture" apply to the sources, and what they add runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
LONGEST = 30  # lines of a diff
SECTIONS = re.findall(r"^## Add an? ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
BEGINNING = """
import pathlib, torch
import taskgroup as tg
assert pathlib.Path(tg.__file__).is_relative_to({folder!r}), tg.__file__
for library in {libraries!r}:
    torch.ops.load_library(library)
"""


def run(*command, cwd, **options):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=250, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(source, folder):
    """A library of one file with an op, without the rest of the ops."""
    library = folder / f"{source.stem}.so"
    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    torch_folder = Path(torch.__file__).parent / "lib"
    run(
        *("c++", "-std=c++17", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(*include, str(source), "-o", str(library), f"-L{torch_folder}", "-ltorch_cpu"),
        cwd=folder,
    )
    return str(library)


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)


def test_every_part_is_shown():
    shown = [name for name, _ in SECTIONS]
    assert shown == ["affinity", "grouping", "op", "joint method", "data set"]


@pytest.mark.parametrize(("name", "section"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_diffs_apply_and_run(name, section, tmp_path):
    shutil.copytree(
        ROOT / "taskgroup", tmp_path / "taskgroup", ignore=shutil.ignore_patterns("__pycache__")
    )
    diffs = blocks(section, "diff")
    assert diffs
    for diff in diffs:
        assert len(diff.splitlines()) <= LONGEST
        run("git", "apply", "-", cwd=tmp_path, input=diff)
    libraries = [compiled(source, tmp_path) for source in tmp_path.glob("csrc/**/*.cpp")]
    (program,) = blocks(section, "python")
    program = BEGINNING.format(folder=str(tmp_path), libraries=libraries) + program
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run(sys.executable, "-W", "error", "-c", program, cwd=tmp_path, env=environment)
