"""Processes that train cells in parallel."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from taskgroup.lab.compare.cell import Cell, Result, train_cell
from taskgroup.lab.compare.cost import step_seconds
from taskgroup.lab.recipe import Recipe

__all__ = ["Listener", "Workers"]

#: Called after every run with the stage, the runs done, the runs in all, the run, and its result
#: (None if it failed).
Listener = Callable[[str, int, int, Cell, Result | None], None]


class Workers:
    """A pool of processes with one thread each, which write to a folder; a context manager.

    ``jobs`` is their number: None is one per core, or one if they would share a GPU. ``failed``
    holds a sentence for each run that failed; it is run again next time.

    Raises:
        ValueError: if ``jobs`` is less than 1.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int | None,
        device: torch.device,
        executor: Executor | None = None,
    ) -> None:
        if jobs is None:
            jobs = 1 if device.type == "cuda" else len(os.sched_getaffinity(0))
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self.failed: list[str] = []
        self._folder = folder
        # Spawned: a forked process would inherit the threads of torch in an unknown state.
        self._own = executor is None
        self._pool = executor or ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _prepare
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # e.g. Ctrl-C: an unfinished run is of no use
            for process in self._children():
                process.terminate()
        if self._own:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _children(self) -> list[multiprocessing.Process]:
        # Python 3.14 has a public method.
        return list((getattr(self._pool, "_processes", None) or {}).values())

    def measure(self, recipes: Mapping[str, Recipe]) -> dict[str, float]:
        """Call :func:`~taskgroup.lab.compare.cost.step_seconds` while the other processes idle."""
        return self._pool.submit(step_seconds, recipes).result()

    def run(self, title: str, cells: Sequence[Cell], listen: Listener) -> None:
        """Run the cells that are not finished; if one fails, the others are still run.

        Raises:
            RuntimeError: if a process died; finished runs are kept.
        """
        cells = list({cell.file(self._folder): cell for cell in cells}.values())
        missing = []
        done = 0
        for cell in cells:
            result = cell.read(self._folder)
            if result is None:
                missing.append(cell)
            else:
                done += 1
                listen(title, done, len(cells), cell, result)
        running = {self._pool.submit(train_cell, cell, self._folder): cell for cell in missing}
        for future in as_completed(running):
            cell = running[future]
            result = None
            try:
                result = future.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "A worker process died, maybe because memory ran out. Finished runs are kept; "
                    "start the same command again with fewer --jobs."
                ) from None
            except Exception as error:  # the others are still run
                self.failed.append(f"{cell.name}, seed {cell.recipe.seed}: {error}")
            done += 1
            listen(title, done, len(cells), cell, result)


def _prepare() -> None:
    """Set up a worker: one thread, because other workers use the other cores.

    The worker also ends with its parent: while it waits for a run, it would not notice that the
    parent was killed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C at the terminal: no traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
