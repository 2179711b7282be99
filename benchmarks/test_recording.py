"""What tg.Recorder adds to a batch of a real model with 11 and 1000 tasks.

The model, the groups and the batch are those of test_many_tasks. Everything that the recorder does
is timed: what it hears of the loop, the hooks of the optimizers, and the writing of the files.
"""

import time

import pytest
from torch.utils.tensorboard import SummaryWriter

import taskgroup as tg
from benchmarks.test_many_tasks import groups_of, training_of
from taskgroup.recording.batches import Batches

WITHOUT = "without recording"
HEARS = (
    *("begin_batch", "begin_step", "begin_loss", "losses", "end_loss", "end_batch"),
    *("begin_optimizer", "end_optimizer"),
)
BATCHES = {11: 120, 1000: 4}


def recorded(training, groups, folder, batches, monkeypatch, **options):
    """The mean seconds of a batch, and of what the recorder does in it."""
    spent = 0.0

    def timed(method):
        def call(*args):
            nonlocal spent
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent += time.perf_counter() - start

        return call

    with monkeypatch.context() as patch, tg.Recorder(groups, folder, **options):
        for name in HEARS:
            patch.setattr(Batches, name, timed(getattr(Batches, name)))
        training.batch(groups)  # opens the files
        spent, start = 0.0, time.perf_counter()
        for _ in range(batches):
            training.batch(groups)
        total = time.perf_counter() - start
        return total / batches, spent / batches


@pytest.mark.parametrize("n_tasks", BATCHES)
def test_recorder(record, device, n_tasks, tmp_path, monkeypatch):
    training, labels = training_of(n_tasks, device)
    every = max(1, n_tasks**2 // 10_000)  # the default
    with SummaryWriter(str(tmp_path / "board")) as board:
        ways = {"every batch": {}, "every 10th to TensorBoard": {"log": board}}
        for name, options in ways.items():
            found = {}
            for of in (1, 10**6):  # with a matrix in every batch, and with none
                groups = groups_of([*labels])
                folder = tmp_path / f"{name}-{of}"
                n = BATCHES[n_tasks]
                found[of] = recorded(training, groups, folder, n, monkeypatch, every=of, **options)
            (total, least), (_, most) = found[10**6], found[1]
            spent = least + (most - least) / every
            record.add(
                f"batch recorded, affinity every {every}, {name}",
                n_tasks,
                total - least + spent,
                {WITHOUT: total - least},
                goals={WITHOUT: 0.99},
            )
