"""Trains cells on an executor, and writes the results as they arrive."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from taskgroup.lab.processes import hold_interrupts, process_pool, terminate, visible_gpus
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.studies.cell import Cell, Result, train_cell
from taskgroup.lab.studies.cost import step_seconds
from taskgroup.lab.studies.probe import check_workers, probe
from taskgroup.lab.train.trainer import find_device

__all__ = ["Listener", "Workers"]

#: Called after every run with the stage, the runs done, the runs in all, the run, and its result
#: (None if it failed).
Listener = Callable[[str, int, int, Cell, Result | None], None]

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """Trains cells on an executor; a context manager.

    The executor's processes get settings and return results. This process alone writes to the
    folder, each result as soon as it arrives.

    Args:
        folder: of the results.
        recipe: what all cells start from.
        executor: where to train; the caller shuts it down. None makes a pool of processes on this
            machine.
        jobs: number of processes of that pool; None is one per GPU if the recipe trains on a GPU,
            and one per core otherwise.

    Attributes:
        failed: a sentence for each run that failed; it is run again next time.

    Raises:
        ValueError: if ``jobs`` is less than 1 or is given with an executor, or if the recipe asks
            for a GPU and this machine, which is to train, has none.
        RuntimeError: if the executor's workers cannot train the recipe.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        executor: Executor | None = None,
        jobs: int | None = None,
    ) -> None:
        self.failed: list[str] = []
        self._folder = folder
        self._running: dict[Future[Any], Any] = {}
        self._executor: Executor
        self._pool: ProcessPoolExecutor | None = None  # of this object's own making
        if executor is not None:
            if jobs is not None:
                raise ValueError(
                    "jobs is the number of processes on this machine; an executor has its own "
                    "workers, so leave jobs out."
                )
            check_workers(recipe, {"A worker": _outcome(executor.submit(probe, recipe))})
            self._executor = executor
            return
        self._gpus = visible_gpus() if find_device(recipe.device).type == "cuda" else []
        if jobs is None:
            jobs = len(self._gpus) or len(os.sched_getaffinity(0))
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self._start_pool(jobs)

    def _start_pool(self, jobs: int) -> None:
        self._jobs = jobs
        self._executor = self._pool = process_pool(jobs, self._gpus)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            for future in self._running:
                future.cancel()
        elif kind is None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        else:  # e.g. Ctrl-C: an unfinished run is of no use
            terminate(self._pool)
            # Nothing is cancelled: the thread of the pool is about to fail all that is left, and
            # would end with a traceback at what is cancelled.
            self._pool.shutdown(wait=False)

    def measure(self, recipes: Mapping[str, Recipe]) -> dict[str, float]:
        """Call :func:`~taskgroup.lab.studies.cost.step_seconds` in one worker; the others idle."""
        ((_, seconds),) = self.call(step_seconds, [recipes])
        return seconds

    def call(self, function: Callable[[A], B], arguments: Sequence[A]) -> Iterator[tuple[A, B]]:
        """Call a function in the workers; yields arguments and what it returned, as they arrive.

        Raises:
            Exception: what the function raised.
        """
        for future, argument in self._calls(function, arguments):
            yield argument, future.result()

    def run(self, title: str, cells: Sequence[Cell], listen: Listener) -> None:
        """Run the cells that are not finished; if one fails, the others are still run.

        If a process of the pool on this machine dies, its cells are run again in a new pool of half
        as many processes.

        Raises:
            RuntimeError: if processes die again before a run is finished, or if the executor lost
                runs; finished runs are kept.
            OSError: if a result cannot be written.
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
        try:
            for future, cell in self._calls(train_cell, missing):
                result = self._keep(future, cell)
                done += 1
                listen(title, done, len(cells), cell, result)
        except BaseException:  # e.g. Ctrl-C: keep the results that have arrived meanwhile
            for future, cell in self._running.items():
                if future.done() and not future.cancelled():
                    self._keep(future, cell)
            raise

    def _keep(self, future: Future[Result], cell: Cell) -> Result | None:
        """Write the result of a run, or note why it has none."""
        try:
            result = future.result()
        except Exception as error:  # the others are still run
            self.failed.append(f"{cell.name}, seed {cell.recipe.seed}: {error}")
            return None
        cell.write(self._folder, result)
        return result

    def _calls(
        self, function: Callable[[A], B], arguments: Sequence[A]
    ) -> Iterator[tuple[Future[B], A]]:
        """Call a function in the workers; yields finished futures as the results arrive."""
        left = list(arguments)
        again = False
        while left:
            n_left = len(left)
            self._running.clear()
            try:
                with hold_interrupts():  # the processes of the pool start here
                    for argument in left:
                        self._running[self._executor.submit(function, argument)] = argument
            except BrokenExecutor:  # so are the calls before
                pass
            for future in as_completed(self._running):
                if not _is_lost(future):
                    yield future, self._running[future]
                    left.remove(self._running.pop(future))
            if left:
                self._replace_pool(again and len(left) == n_left)
                again = True

    def _replace_pool(self, give_up: bool) -> None:
        """Make a new pool after a process of the last one died.

        It has half as many processes, because the most common reason is that memory ran out.
        """
        if self._pool is None:
            raise RuntimeError(
                "The executor lost runs that it had not finished: it was shut down, its connection "
                "broke, or a process died. Finished runs are kept; start the same again to "
                "continue."
            )
        if give_up:
            raise RuntimeError(
                "A worker process died again, maybe because memory ran out. Finished runs are "
                "kept; start the same command again with fewer --jobs."
            )
        self._start_pool(max(1, self._jobs // 2))
        warnings.warn(
            "A worker process died, maybe because memory ran out. The runs that were not finished "
            f"are run again, {self._jobs} at a time.",
            stacklevel=2,
        )


def _is_lost(future: Future[Any]) -> bool:
    """Whether a finished future has neither a result nor an error of its own."""
    return future.cancelled() or isinstance(future.exception(), BrokenExecutor)


def _outcome(future: Future[B]) -> B | Exception:
    """What a call returned or raised."""
    try:
        return future.result()
    except Exception as error:
        return error
