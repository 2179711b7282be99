import importlib
import signal
import sys

import pytest
import torch

from taskgroup.lab import processes
from taskgroup.lab.studies import workers
from tests.lab.small import InThisProcess


@pytest.fixture(autouse=True)
def _keep_the_generator():
    """A trainer seeds the global one."""
    with torch.random.fork_rng():
        yield


@pytest.fixture(autouse=True)
def _keep_the_handler_of_ctrl_c():
    """A command that Ctrl-C has stopped leaves the key to end its process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def trained(monkeypatch):
    """The cells that are trained, in this process and in order."""
    cells = []
    train = workers.train_cell

    def note(cell):
        cells.append(cell)
        return train(cell)

    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(workers, "train_cell", note)
    monkeypatch.setattr(workers, "step_seconds", lambda recipes: dict.fromkeys(recipes, 1.0))
    return cells


@pytest.fixture
def made_up(monkeypatch):
    """Call it with a function from cell to result: that is what the files then hold, untrained.

    A step takes the seconds of its variant, or one.
    """

    def use(make, seconds=None):
        cells = []

        def invent(cell):
            cells.append(cell)
            return {
                "metrics": {},
                "peak_bytes": 1000,
                "steps_per_batch": 1.0,
                "groups": [1] * cell.recipe.batches,
                "changes": [],
                "partition": [],
                "affinity": [],
                "skipped": 0,
                "diverged": None,
                **make(cell),
            }

        monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
        monkeypatch.setattr(workers, "train_cell", invent)
        monkeypatch.setattr(
            workers,
            "step_seconds",
            lambda recipes: {name: (seconds or {}).get(name, 1.0) for name in recipes},
        )
        return cells

    return use


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder for modules, which is not on sys.path, as for a program of pip's."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    importlib.invalidate_caches()
