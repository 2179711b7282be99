"""Importing the package: the modules that it imports, and its public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import taskgroup as tg

PACKAGE = Path(tg.__file__).parent

EXTRAS = [
    "accelerate",
    "cvxpy",
    "lightning",
    "matplotlib",
    "mlflow",
    "PIL",
    "plotly",
    "pydantic",
    "pytorch_lightning",
    "river",
    "rich",
    "scipy",
    "skimage",
    "sklearn",
    "tensorboard",
    "torchjd",
    "torchmetrics",
    "transformers",
    "typer",
    "wandb",
]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_core_needs_torch_and_numpy_alone():
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in [*EXTRAS, "yaml"])
    done = run(f"import sys; {blocked} import taskgroup.__main__; print(taskgroup.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == tg.__version__


def test_what_torch_does_not_import_is_not_imported_either():
    """Modules of the standard library take time too."""
    modules = "{name.partition('.')[0] for name in sys.modules}"
    done = run(f"import sys, torch; known = {modules}; import taskgroup; print(*{modules} - known)")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"taskgroup", "numpy"}


def test_networks_and_losses_of_dense_tasks_need_no_more():
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in [*EXTRAS, "yaml"])
    parts = (
        "taskgroup.lab.vision.models, taskgroup.lab.vision.dense_losses, taskgroup.lab.train.memory"
    )
    done = run(
        f"import sys; {blocked} import {parts}; from taskgroup.lab.vision import vit, TASKONOMY"
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_there():
    for name in tg.__all__:
        assert hasattr(tg, name)
        if isinstance(getattr(tg, name), type):
            assert getattr(tg, name).__doc__


def test_names_that_are_imported_later_are_those_that_type_checkers_see():
    tree = ast.parse(Path(tg.__file__).read_text("utf-8"))
    block, _ = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        for alias in node.names:
            home = node.module if node.module != "taskgroup" else f"taskgroup.{alias.name}"
            seen[alias.name] = home.removeprefix("taskgroup.")
    assert seen == tg._HOMES
    assert set(seen) < set(tg.__all__)


def test_what_the_loop_does_without_is_imported_at_its_first_use():
    later = ["checkpoint", "costs", "gradients.row_tasks", "methods", "recording"]
    done = run(
        "import sys, taskgroup as tg\n"
        f"print([name for name in {later} if 'taskgroup.' + name in sys.modules])\n"
        "print(set(tg.__all__) - set(dir(tg)))\n"
        "tg.Recorder, tg.checkpoint, tg.step_costs\n"
        "print(type(tg.checkpoint).__name__, 'Recorder' in vars(tg))\n"
        "tg.Recrder"
    )
    assert done.stdout.splitlines() == ["[]", "set()", "module True"]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("AttributeError: module 'taskgroup' has no attribute 'Recrder'")


MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py" and "triton" not in path.parts
)


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_a_module_is_found_under_its_name(name):
    """No function of the same name hides it: ``import a.b.c as m`` gives the module."""
    module = importlib.import_module(name)
    parent, _, leaf = name.rpartition(".")
    assert getattr(sys.modules[parent], leaf) is module


def test_trainers_that_are_not_installed():
    done = run(
        "import importlib, sys\n"
        "for name in ('lightning', 'pytorch_lightning', 'transformers'): sys.modules[name] = None\n"
        "for name in ('lightning', 'transformers'):\n"
        "    try: importlib.import_module(f'taskgroup.integrations.{name}')\n"
        "    except ImportError as error: print(error)"
    )
    lightning, transformers = done.stdout.splitlines()
    assert "pip install lightning" in lightning
    assert "pip install transformers accelerate" in transformers


def test_command_line_without_its_extra_says_what_to_install():
    done = run("import sys; sys.modules['typer'] = None; import taskgroup.lab.cli")
    assert done.returncode == 1
    assert "pip install 'taskgroup[train]'" in done.stderr
    assert "Traceback" not in done.stderr
