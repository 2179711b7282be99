import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taskgroup
import taskgroup as tg
from taskgroup.ops import _backend

PACKAGE = Path(taskgroup.__file__).parent


def ratios(device="cpu"):
    ones = torch.ones(2, device=device)
    return tg.affinity_update_(
        torch.zeros(2, 2, device=device), ones, ones / 2, torch.ones_like(ones).bool(), 1.0
    )


def chosen(device="cpu"):
    """The backend that an op with every backend runs on."""
    implementations = {name: (lambda name=name: name) for name in tg.ops.backends()}
    return _backend.choose(device, **implementations)()


def test_native_code_is_here():
    """The tests are worth little without it, so a run that lacks it fails."""
    found = tg.ops.backends()
    assert list(found) == ["cpp", "cuda", "triton", "reference"]
    assert found["cpp"] is found["triton"] is found["reference"] is None
    assert chosen("cpu") == "cpp"
    assert chosen("xpu") == chosen("meta") == "reference"


def test_cuda_kernels_are_there_or_said_to_be_missing():
    """Whether or not there is a GPU: the library holds the kernels, and loads on any torch."""
    architectures = torch.ops.taskgroup.cuda_architectures()
    problem = tg.ops.backends()["cuda"]
    for op in ("affinity_update_", "combine", "gram_affinity_update_", "task_gram"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"taskgroup::{op}", "CUDA")
        assert registered == bool(architectures)
    if architectures:
        assert problem is None
        assert chosen("cuda") == "cuda"
        with tg.ops.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' runs on cuda, "):
            ratios("cpu")
    else:
        assert "built without CUDA kernels" in problem
        assert chosen("cuda") == "triton"
        with pytest.raises(RuntimeError, match="built without CUDA kernels"):
            tg.ops.use_backend("cuda")


def test_use_backend_as_a_call_and_as_a_context():
    try:
        tg.ops.use_backend("reference")
        assert chosen() == "reference"
        with tg.ops.use_backend("cpp"):
            assert chosen() == "cpp"
            with tg.ops.use_backend(None):
                assert chosen() == "cpp"
        assert chosen() == "reference"
    finally:
        tg.ops.use_backend(None)
    assert chosen() == "cpp"


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), tg.ops.use_backend("reference"):
        raise KeyError
    assert chosen() == "cpp"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"no backend 'cuba' .*Available: cpp, .*reference"):
        tg.ops.use_backend("cuba")
    assert chosen() == "cpp"


def test_backend_that_does_not_run_on_the_device():
    with (
        tg.ops.use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"'cpp' runs on cpu, .* on meta"),
    ):
        ratios("meta")
    with (
        tg.ops.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' runs on cuda, .* on cpu"),
    ):
        ratios("cpu")


def test_triton_is_imported_at_its_first_use():
    code = """
import sys, torch, taskgroup
import taskgroup as tg
matrix, losses = torch.zeros(2, 2), torch.ones(2)
tg.affinity_update_(matrix, losses, losses / 2, losses.bool(), 1.0)
tg.combine([[losses]], [1.0])
assert "triton" not in sys.modules
assert "taskgroup.ops.triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton():
    code = """
import sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import taskgroup as tg
from taskgroup.ops._backend import choose
assert tg.ops.backends()["triton"].startswith("Triton is not installed")
assert choose("cuda", triton=lambda: "triton", reference=lambda: "reference")() == "reference"
try:
    tg.ops.use_backend("triton")
except RuntimeError as error:
    assert "'triton': Triton is not installed" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interpreter_runs_when_it_is_asked_for():
    code = """
import taskgroup as tg
from taskgroup.ops._backend import choose
pure = {"triton": lambda: "triton", "reference": lambda: "reference"}
assert choose("cpu", **pure)() == "reference"
assert choose("cuda", **pure)() == "reference"
with tg.ops.use_backend("triton"):
    assert choose("cpu", **pure)() == "triton"
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_op_without_the_backend_chooses_by_itself():
    with tg.ops.use_backend("cpp"):
        assert _backend.choose("cpu", reference=lambda: "reference")() == "reference"


SCRIPT = """
import json, torch
import taskgroup
import taskgroup as tg

def attempt(function):
    try:
        return [None, function()]
    except Exception as error:
        return [type(error).__name__, str(error)]

half = torch.full((2,), 0.5)
def update():
    matrix = torch.zeros(2, 2)
    return tg.affinity_update_(matrix, torch.ones(2), half, half.bool(), 1.0).tolist()
def cluster():
    return tg.affinity_propagation(torch.eye(2)).tolist()
def in_reference():
    with tg.ops.use_backend("reference"):
        return update(), cluster()

print(json.dumps({
    "file": taskgroup.__file__,
    "backends": tg.ops.backends(),
    "update": attempt(update),
    "cluster": attempt(cluster),
    "use cpp": attempt(lambda: str(tg.ops.use_backend("cpp"))),
    "in reference": attempt(in_reference),
}))
"""
UPDATED, CLUSTERED = [[0.25, 0.25], [0.25, 0.25]], [0, 1]


@pytest.fixture
def installation(tmp_path):
    """A copy of the package, and a function that uses it in a process of its own."""
    copy = tmp_path / "taskgroup"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def use(**environment):
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=tmp_path,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert Path(told["file"]).parent == copy
        return told

    return copy, use


def library(package, name):
    (path,) = package.glob(f"{name}.*so")
    return path


def test_pure_installation_uses_the_reference(installation):
    package, use = installation
    library(package, "_ops").unlink()
    library(package, "_host").unlink()

    told = use()
    assert "without native code; to have it" in told["backends"]["cpp"]
    assert told["update"] == [None, UPDATED]
    assert told["cluster"] == [None, CLUSTERED]
    kind, message = told["use cpp"]
    assert kind == "RuntimeError"
    assert "without native code" in message
    assert message.endswith("Available: triton, reference.")

    told = use(TASKGROUP_BACKEND="cpp")
    for op in ("update", "cluster"):
        kind, message = told[op]
        assert kind == "RuntimeError"
        assert "cannot use its backend 'cpp': this installation was made without" in message
    assert told["in reference"] == [None, [UPDATED, CLUSTERED]]


def delete(path):
    path.unlink()


def overwrite(path):
    path.write_bytes(b"not a library" * 1000)


def ask_for_an_unknown_symbol(path):
    """As a library does that was built for another torch or another Python."""
    library = path.read_bytes()
    symbol = {"_ops": b"aoti_torch_get_dtype", "_host": b"PyObject_GetAttrString"}
    symbol = symbol[path.name.partition(".")[0]]
    assert symbol in library
    path.write_bytes(library.replace(symbol, symbol[:-1] + b"?"))


@pytest.mark.parametrize("name", ["_ops", "_host"])
@pytest.mark.parametrize("damage", [delete, overwrite, ask_for_an_unknown_symbol])
def test_broken_native_code_says_so_at_its_first_use(installation, name, damage):
    package, use = installation
    damage(library(package, name))

    told = use()
    for op in ("update", "cluster", "use cpp"):
        kind, message = told[op]
        assert kind == "RuntimeError"
        assert f"under torch {torch.__version__}" in message
        assert name in message
        assert "TASKGROUP_PURE=1" in message
        assert "pip install" in message
        assert "TASKGROUP_BACKEND=reference" in message
        assert "\n" not in message
    assert told["in reference"] == [None, [UPDATED, CLUSTERED]]


def test_environment(installation):
    _, use = installation
    told = use(TASKGROUP_BACKEND="reference")
    assert told["update"] == [None, UPDATED]
    assert told["cluster"] == [None, CLUSTERED]

    told = use(TASKGROUP_BACKEND="cuba")
    for op in ("update", "cluster"):
        kind, message = told[op]
        assert kind == "ValueError"
        assert "no backend 'cuba' (TASKGROUP_BACKEND" in message
