"""Whether affinities predict what tasks gain from being trained together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

import taskgroup as tg
from taskgroup.lab.problem import Problem, make_problem
from taskgroup.lab.recipe import Recipe, is_own
from taskgroup.lab.report.affinities import relative
from taskgroup.lab.studies.cell import Cell, Result, open_folder
from taskgroup.lab.studies.intervals import Correlation, Floats, spearman
from taskgroup.lab.studies.workers import Listener, Workers
from taskgroup.lab.train.rehearsal import rehearse
from taskgroup.lab.train.source import check_source
from taskgroup.lab.train.trainer import task_names

__all__ = ["AFFINITIES", "AffinityGain", "Gains"]

#: The affinities that are compared, and their titles.
AFFINITIES = {"proximal": "Proximal", "gradient": "From gradients", "lookahead": "Lookahead"}
_LOOKAHEADS = 10  # measurements in a run


@dataclasses.dataclass(frozen=True)
class Gains:
    """What was measured.

    Attributes:
        problem: the data set.
        recipe: of the runs.
        tasks: in the order of the matrices.
        seeds: their number.
        gain: ``[K, K]``, the mean over the seeds; row i, column k is the gain of task k when it is
            trained with task i instead of alone, in percent of its held-out metric.
        affinity: ``{kind: [K, K]}``, the mean over the seeds; columns are divided by the
            self-affinity.
        directed: ``{kind: correlation over ordered pairs}``.
        symmetric: ``{kind: correlation over pairs}``, with the mean of both directions, which is
            what groupings use.
        repeatable: the correlation between the gains of the even and of the odd seeds, which no
            affinity can exceed by much; None for one seed.
    """

    problem: Problem
    recipe: Recipe
    tasks: list[str]
    seeds: int
    gain: Floats
    affinity: dict[str, Floats]
    directed: dict[str, Correlation]
    symmetric: dict[str, Correlation]
    repeatable: Correlation | None


class AffinityGain:
    """Trains all pairs of tasks, and correlates their gains with affinities.

    The gain compares joint training of a pair with single-task training for as many batches. The
    affinities come from runs on all tasks: the proximal and the gradient affinity from selective
    runs, the lookahead affinity (Fifty et al., NeurIPS 2021) from joint runs that measure it ten
    times. "It's a Match!" (arXiv 2301.02873) found such correlations to be low.

    Args:
        recipe: of all runs.
        seeds: their number.
        out: the folder; finished runs in it are not run again.

    Raises:
        ValueError: for fewer than three tasks, no seed, or a folder of something else.
    """

    def __init__(self, recipe: Recipe, seeds: int, out: str | Path) -> None:
        if seeds < 1:
            raise ValueError(f"Gains need at least one seed, got {seeds}.")
        self.recipe = recipe
        self.problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        if len(self.tasks) < 3:
            raise ValueError("A correlation over pairs needs at least three tasks.")
        if not recipe.make_grouping().reads_affinity:
            raise ValueError(
                f"Grouping {recipe.grouping!r} learns no affinity to compare; take "
                "affinity-propagation."
            )
        self.seeds = seeds
        self.out = Path(out)
        if is_own(recipe.data):
            rehearse(recipe, relative=True)
        self._folder = open_folder(self.out, recipe)
        check_source(self.out, recipe.data)

    def run(
        self,
        listen: Listener = lambda *_: None,
        jobs: int | None = None,
        executor: Executor | None = None,
    ) -> Gains:
        """Run what is missing, and compare; arguments and errors as of ``Comparison.run``.

        Raises:
            RuntimeError: also if a run failed; finished runs are kept.
        """
        pairs = itertools.combinations(self.tasks, 2)
        trained = [self._joint(task) for task in self.tasks] + [self._joint(*p) for p in pairs]
        found = [self._affinity(kind) for kind in AFFINITIES]
        with (
            tg.recording.hold(self.out),
            Workers(self._folder, self.recipe, executor, jobs) as workers,
        ):
            workers.run("training pairs", list(itertools.chain(*trained)), listen)
            workers.run("measuring affinities", list(itertools.chain(*found)), listen)
        if workers.failed:
            raise RuntimeError(
                f"{len(workers.failed)} runs failed; the others are kept. The first error: "
                f"{workers.failed[0]}"
            )
        return self._read()

    def _seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    def _joint(self, *tasks: str) -> list[Cell]:
        name = f"joint-{'-'.join(tasks)}"
        settings = {"method": "gd", "tasks": tasks}
        return [Cell(name, self.recipe.replace(seed=seed, **settings)) for seed in self._seeds()]

    def _affinity(self, kind: str) -> list[Cell]:
        every = None
        settings = {"method": "selective", "affinity": kind}
        if kind == "lookahead":
            every = max(1, self.recipe.batches // _LOOKAHEADS)
            settings = {"method": "gd"}
        recipes = [self.recipe.replace(seed=seed, **settings) for seed in self._seeds()]
        return [Cell(kind, recipe, every) for recipe in recipes]

    def _results(self, cells: Sequence[Cell]) -> list[Result]:
        """The results of the cells, all of which must be finished."""
        results = []
        for cell in cells:
            result = cell.read(self._folder)
            if result is None:
                raise RuntimeError(
                    f"The run {cell.name} is not finished; start the same command again."
                )
            results.append(result)
        return results

    def _metrics(self, task: str, *tasks: str) -> Floats:
        """The held-out metric of a task in joint training, seed by seed; NaN if a run diverged."""
        return np.array(
            [
                result["metrics"]["held_out"][task] if result["diverged"] is None else np.nan
                for result in self._results(self._joint(*tasks))
            ]
        )

    def _read(self) -> Gains:
        n_tasks = len(self.tasks)
        gains = np.full((self.seeds, n_tasks, n_tasks), np.nan)
        alone = {task: _mean(self._metrics(task, task)) for task in self.tasks}
        for (i, first), (k, second) in itertools.combinations(enumerate(self.tasks), 2):
            for row, column, task in ((i, k, second), (k, i, first)):
                together = self._metrics(task, first, second)
                sign = -1.0 if self.problem.lower_is_better[task] else 1.0
                gains[:, row, column] = sign * 100 * (together - alone[task]) / alone[task]
        matrices = {
            kind: np.array([result["affinity"] for result in self._results(self._affinity(kind))])
            for kind in AFFINITIES
        }
        affinity = {kind: _mean(relative(found.astype(float))) for kind, found in matrices.items()}
        gain = _mean(gains)
        halves = _mean(gains[::2]), _mean(gains[1::2])
        return Gains(
            problem=self.problem,
            recipe=self.recipe,
            tasks=self.tasks,
            seeds=self.seeds,
            gain=gain,
            affinity=affinity,
            directed={kind: spearman(found, gain) for kind, found in affinity.items()},
            symmetric={
                kind: spearman(found + found.T, gain + gain.T) for kind, found in affinity.items()
            },
            repeatable=spearman(*halves) if self.seeds > 1 else None,
        )


def _mean(stack: Floats) -> Floats:
    """The mean over the seeds of the finite values; NaN without any."""
    counts = np.isfinite(stack).sum(0)
    total = np.where(np.isfinite(stack), stack, 0.0).sum(0)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
