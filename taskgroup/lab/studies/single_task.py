"""Single-task training: the baseline that the Δm of a comparison refers to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from taskgroup.lab.problem import Problem
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.studies.cell import Cell, Result
from taskgroup.lab.studies.results import delta_of, mean

__all__ = ["SingleTask"]


class SingleTask:
    """A run of every task alone for every seed, and Δm against the mean of their metrics.

    Args:
        recipe: settings of the runs.
        problem: the data set.
        tasks: those that are trained.
        seeds: those of the runs.
        folder: of the results.

    Attributes:
        cells: the runs.
        metrics: ``{split: {task: mean metric}}``; NaN for a task without a finished run.
    """

    def __init__(
        self,
        recipe: Recipe,
        problem: Problem,
        tasks: Sequence[str],
        seeds: Sequence[int],
        folder: Path,
    ) -> None:
        self._problem = problem
        self._folder = folder
        self._by_task = {
            task: [
                Cell(f"single-{task}", recipe.replace(seed=seed, method="gd", tasks=(task,)))
                for seed in seeds
            ]
            for task in tasks
        }
        self.cells = [
            cell for by_seed in zip(*self._by_task.values(), strict=True) for cell in by_seed
        ]
        self.read()

    def read(self) -> None:
        """Read the results that are finished by now."""
        results = {
            task: [result for cell in cells if (result := cell.read(self._folder)) is not None]
            for task, cells in self._by_task.items()
        }
        self.metrics = {
            split: {
                task: mean(r["metrics"][split][task] for r in found if r["diverged"] is None)
                for task, found in results.items()
            }
            for split in self._problem.splits
        }

    def delta(self, result: Result, split: str) -> float:
        """Δm of a run, in percent.

        NaN if the run diverged, or if a metric of single-task training is not above zero.
        """
        return delta_of(result, split, self.metrics[split], self._problem)
