import json

import pytest
import torch

from taskgroup.experiment import workers
from tests.experiment.small import InThisProcess


@pytest.fixture(autouse=True)
def _keep_the_generator():
    """A trainer seeds the global one."""
    with torch.random.fork_rng():
        yield


@pytest.fixture
def trained(monkeypatch):
    """The cells that are trained, in this process and in order."""
    cells = []
    train = workers.train_cell

    def note(cell, folder):
        cells.append(cell)
        return train(cell, folder)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(workers, "train_cell", note)
    return cells


@pytest.fixture
def made_up(monkeypatch):
    """Call it with a function from cell to result: that is what the files then hold, untrained."""

    def use(make):
        cells = []

        def write(cell, folder):
            cells.append(cell)
            result = {
                "metrics": {},
                "seconds_per_batch": 1.0,
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
            cell.file(folder).write_text(json.dumps(result))
            return result

        monkeypatch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
        monkeypatch.setattr(workers, "train_cell", write)
        return cells

    return use
