"""Processes that train cells side by side."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from taskgroup.experiment.cell import Cell, Result, prepare_worker, train_cell

__all__ = ["Listener", "Workers"]

#: Called after every run: what is being run, runs done, all of them, the run, and its result, None
#: if it failed.
Listener = Callable[[str, int, int, Cell, Result | None], None]


class Workers:
    """A pool of processes, one thread each; a context manager.

    Args:
        folder: of the results.
        jobs: processes; None is one per core.

    Attributes:
        failed: what runs that failed said, a sentence each; they are run again next time.
    """

    def __init__(self, folder: Path, jobs: int | None = None) -> None:
        self.failed: list[str] = []
        self._folder = folder
        # Spawned: a forked process would inherit the threads of torch in an unknown state.
        self._pool = ProcessPoolExecutor(
            jobs or len(os.sched_getaffinity(0)),
            multiprocessing.get_context("spawn"),
            prepare_worker,
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def run(self, title: str, cells: Sequence[Cell], listen: Listener) -> None:
        """Run the cells that are not finished; where one fails, the others go on.

        Raises:
            RuntimeError: if a process died; what was finished is kept.
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
                    "A worker process died, of too little memory maybe; what was finished is kept. "
                    "Start the same command again, with fewer --jobs."
                ) from None
            except Exception as error:  # the others go on
                self.failed.append(f"{cell.name}, seed {cell.recipe.seed}: {error}")
            done += 1
            listen(title, done, len(cells), cell, result)
