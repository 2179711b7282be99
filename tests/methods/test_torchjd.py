"""The one file that touches what TorchJD keeps private, and the version it was written for."""

import ast
import re
from importlib.metadata import version
from pathlib import Path

from torchjd import aggregation

import taskgroup as tg
from taskgroup.methods._torchjd import WRITTEN_FOR

PACKAGE = Path(tg.__file__).parent
PRIVATE = PACKAGE / "methods" / "_torchjd.py"
OTHERS = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PRIVATE]


def nodes(paths):
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def test_it_was_written_for_the_version_that_is_pinned():
    major, minor = map(int, WRITTEN_FOR.split("."))
    assert version("torchjd").startswith(f"{WRITTEN_FOR}.")
    pins = re.findall(r'"torchjd\[full\](.*)"', (PACKAGE.parent / "pyproject.toml").read_text())
    assert pins == [f">={WRITTEN_FOR},<{major}.{minor + 1}"]


def test_the_private_names_are_there():
    nash = aggregation.NashMTL(n_tasks=2).weighting
    for holder, names in (
        (aggregation.GradVac().gramian_weighting, "_phi_t _state_key"),
        (nash, "prvs_alpha normalization_factor step _init_optim_problem"),
    ):
        for name in names.split():
            assert hasattr(holder, name), f"{type(holder).__name__} has no {name}"
    nash._init_optim_problem()
    assert nash.prob.variables()


def test_no_other_file_imports_a_private_name():
    for path, node in nodes(OTHERS):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *inner = name.split(".")
            private = any(part.startswith("_") for part in inner) or "NashMTL" in inner
            assert root != "torchjd" or not private, f"{path} imports {name}"


def test_no_other_method_reads_a_private_attribute():
    """Of any object but itself, and none of them derives from a class of TorchJD."""
    for path, node in nodes(path for path in OTHERS if path.parent == PRIVATE.parent):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            owner = ast.unparse(node.value)
            assert owner in ("self", "super()"), f"{path}, line {node.lineno}: {owner}.{node.attr}"
        if isinstance(node, ast.ClassDef):
            assert not any("torchjd" in ast.unparse(base) for base in node.bases)
