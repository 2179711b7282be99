"""Training on executors: the same results from each, all of them written, and none lost."""

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from taskgroup.lab import processes
from taskgroup.lab.studies import workers
from taskgroup.lab.studies.cell import Cell
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.presets import Variant
from tests.lab.small import InThisProcess, yeast

GD, SELECTIVE = (Variant(name, name, {"method": name}) for name in ("gd", "selective"))


def comparison(out, seeds=2, **changes):
    return Comparison(yeast(**changes), [GD, SELECTIVE], seeds, out, budgets=["batches"])


def written(out):
    return {path.name: path.read_bytes() for path in (out / "cells").iterdir()}


def test_threads_of_one_process_train_as_processes_do(tmp_path):
    # Dropout draws from torch's global generator, which all threads share.
    dropout = {"dropout": 0.5, "batches": 8}
    comparison(tmp_path / "one", **dropout).run(executor=InThisProcess())
    with ThreadPoolExecutor(2) as threads:
        table = comparison(tmp_path / "threads", **dropout).run(executor=threads)
        assert threads.submit(int).result() == 0  # left open
    assert written(tmp_path / "threads") == written(tmp_path / "one")
    assert len(written(tmp_path / "one")) == 10
    assert table.failed == []


def test_one_run_at_a_time_in_a_process_on_one_thread():
    inside = []

    def work(_):
        with processes.alone():
            inside.append(torch.get_num_threads())
            time.sleep(0.01)
            assert len(inside) == 1
            inside.clear()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(8)))
        with processes.alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# What arrives is kept.


def test_results_are_written_as_they_arrive_by_the_thread_that_compares(
    tmp_path, trained, monkeypatch
):
    writers = []
    write = Cell.write

    def note(cell, folder, result):
        writers.append(threading.current_thread())
        write(cell, folder, result)

    monkeypatch.setattr(Cell, "write", note)
    heard = []

    def listen(stage, done, total, cell, result):
        heard.append((done, len(writers), cell.read(tmp_path / "cells") is not None))

    with ThreadPoolExecutor(1) as threads:
        comparison(tmp_path).run(listen, executor=threads)
    assert heard == [(n, n, True) for n in range(1, 11)]
    assert set(writers) == {threading.main_thread()}


def test_an_interruption_keeps_what_has_arrived_and_cancels_the_rest(tmp_path, trained):
    """While the first result is shown, more arrive; then Ctrl-C."""
    held = Held()

    def listen(*_):
        held.finish(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison(tmp_path).run(listen, executor=held)
    assert len(written(tmp_path)) == 4
    assert len(trained) == 4
    assert all(future.cancelled() for _, future in held.calls)
    trained.clear()
    table = comparison(tmp_path).run(executor=InThisProcess())
    assert len(trained) == 6
    assert [row.delta["batches", "held_out"].n for row in table.rows] == [2, 2]


class Held(InThisProcess):
    """Holds the calls back, except the first two: the probe, and a run."""

    def __init__(self):
        self.calls = []
        self.free = 2

    def submit(self, function, /, *arguments):
        if self.free:
            self.free -= 1
            return super().submit(function, *arguments)
        self.calls.append((lambda: InThisProcess.submit(self, function, *arguments), Future()))
        return self.calls[-1][1]

    def finish(self, number):
        for _ in range(number):
            call, future = self.calls.pop(0)
            future.set_running_or_notify_cancel()
            future.set_result(call().result())


def test_a_full_disk_stops_the_comparison(tmp_path, trained, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    compared = comparison(tmp_path)
    monkeypatch.setattr("taskgroup.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="could not be written"):
        compared.run(executor=InThisProcess())


# Processes that die.


def mortal(*lives):
    """A class of pools; the n-th breaks after ``lives[n]`` calls, and those after the last do not.

    A broken pool fails all calls that it has not finished, and refuses new ones.
    """
    made = []

    class Mortal(InThisProcess):
        def __init__(self, jobs, *rest):
            super().__init__(jobs, *rest)
            self.left = lives[len(made)] if len(made) < len(lives) else None
            made.append(jobs)

        def submit(self, function, /, *arguments):
            if self.left is None:
                return super().submit(function, *arguments)
            if self.left == 0:
                self.left = -1
                future = Future()
                future.set_exception(BrokenProcessPool("a process died"))
                return future
            if self.left < 0:
                raise BrokenProcessPool("cannot be used any more")
            self.left -= 1
            return super().submit(function, *arguments)

    return Mortal, made


def test_runs_of_a_process_that_died_are_run_again(tmp_path, trained, monkeypatch):
    pool, made = mortal(3, 2)
    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
    heard = []
    with pytest.warns(UserWarning, match="A worker process died") as said:
        table = comparison(tmp_path).run(lambda *known: heard.append(known[1:3]), jobs=8)
    assert made == [8, 4, 2]
    assert "run again, 2 at a time" in str(said[-1].message)
    assert heard == [(n, 10) for n in range(1, 11)]
    assert len(trained) == 10  # each once
    assert table.failed == []
    assert [row.delta["batches", "held_out"].n for row in table.rows] == [2, 2]


@pytest.mark.parametrize(("lives", "kept"), [((0, 0), 0), ((3, 0), 3), ((0, 3, 0), 3)])
def test_processes_that_die_before_a_run_is_finished_end_the_comparison(
    lives, kept, tmp_path, trained, monkeypatch
):
    pool, made = mortal(*lives)
    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
    with (
        pytest.raises(RuntimeError, match=r"died again, .* memory .* with fewer --jobs"),
        pytest.warns(UserWarning, match="A worker process died"),
    ):
        comparison(tmp_path).run(jobs=1)
    assert made == [1] * len(lives)
    assert len(written(tmp_path)) == kept


def test_costs_are_measured_again_where_the_process_died(tmp_path, trained, monkeypatch):
    pool, made = mortal(10)
    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
    with pytest.warns(UserWarning, match="A worker process died"):
        table = comparison(tmp_path).run(jobs=2)
    assert made == [2, 1]
    assert [row.time for row in table.rows] == [1.0, pytest.approx(table.rows[1].steps)]


def test_an_executor_that_broke_is_one_sentence(tmp_path, trained):
    pool, _ = mortal(4)  # the probe, and three runs
    with pytest.raises(RuntimeError, match=r"executor lost runs .* Finished runs are kept"):
        comparison(tmp_path).run(executor=pool(1))
    assert len(written(tmp_path)) == 3


# Which processes there are.


def test_jobs_are_those_of_this_machine(tmp_path, trained):
    with pytest.raises(ValueError, match="an executor has its own workers, so leave jobs out"):
        comparison(tmp_path).run(jobs=2, executor=InThisProcess())
    assert trained == []


@pytest.mark.parametrize(
    ("device", "visible", "gpus", "jobs", "expected"),
    [
        ("cuda", None, 1, None, ["0"]),
        ("cuda", None, 3, None, ["0", "1", "2"]),
        ("cuda", "2,GPU-7f", 2, None, ["2", "GPU-7f"]),
        ("auto", "5,6,-1,7", 2, None, ["5", "6"]),  # CUDA stops at the first that is none
        ("cuda", None, 2, 3, ["0", "1", "0"]),
        ("cuda", None, 1, 3, ["0", "0", "0"]),
        ("cpu", None, 2, 2, None),
    ],
)
def test_each_process_has_one_gpu(device, visible, gpus, jobs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []

    class Pool(InThisProcess):
        def __init__(self, jobs, context, prepare, arguments):
            super().__init__(jobs)
            (taken,) = arguments
            started.extend(None if taken is None else taken.get() for _ in range(jobs))

    monkeypatch.setattr(processes, "ProcessPoolExecutor", Pool)
    recipe = yeast(device=device)
    with workers.Workers(tmp_path, recipe, jobs=jobs):
        pass
    assert started == ([None] * jobs if expected is None else expected)


def test_a_process_sees_its_gpu_and_has_one_thread():
    with processes.process_pool(1, ["GPU-7f"]) as pool:
        assert pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "GPU-7f"
        assert pool.submit(torch.get_num_threads).result() == 1
        # Ctrl-C at a terminal goes to all processes: it must not look as if a worker had died.
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
