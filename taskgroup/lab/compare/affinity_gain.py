"""Whether affinities foretell what training together brings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from taskgroup.lab.compare.cell import Cell, open_folder
from taskgroup.lab.compare.workers import Listener, Workers
from taskgroup.lab.train.lock import hold
from taskgroup.lab.train.problem import Problem, make_problem
from taskgroup.lab.train.recipe import Recipe
from taskgroup.lab.train.trainer import find_device, task_names

__all__ = ["AffinityGain", "Correlation", "Gains", "spearman"]

Floats = NDArray[np.float64]

_RESAMPLES = 1000
_LOOKAHEADS = 10  # measurements in a run


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation.

    Attributes:
        value: the correlation.
        low: lower end of its 95% interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Gains:
    """What was measured.

    Attributes:
        problem: the data set.
        recipe: of the runs.
        tasks: in the order of the matrices.
        seeds: how many.
        gain: ``[K, K]``; row i column k is what task k gains from being trained with task i over
            being trained alone, in percent of its held-out metric; the mean over the seeds.
        affinity: ``{kind: [K, K]}``, columns divided by the self-affinity; the mean over the seeds.
        directed: ``{kind: correlation over ordered pairs}``.
        symmetric: ``{kind: correlation over pairs}``, of both directions averaged, as groupings
            see it.
        repeatable: the correlation of the gains of the even with those of the odd seeds: what no
            affinity can exceed by much; None of one seed.
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
    """Trains all pairs of tasks, and compares what they gain with what affinities say.

    Gains come from joint training of each pair against single-task training, for as many batches.
    Affinities come from runs on all tasks: the proximal one and that from gradients from selective
    runs, the lookahead one (Fifty et al., NeurIPS 2021) from joint runs in which it is measured ten
    times. "It's a Match!" (arXiv 2301.02873) found such correlations to be low.

    Args:
        recipe: of all runs.
        seeds: how many.
        out: the folder; finished runs that it holds are not run again.

    Raises:
        ValueError: for fewer than three tasks, no seed, or a folder of something else.
    """

    def __init__(self, recipe: Recipe, seeds: int, out: str | Path) -> None:
        if seeds < 1:
            raise ValueError(f"Gains need at least one seed, got {seeds}.")
        self.recipe = recipe
        self.device = find_device(recipe.device)
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
        self._cells = open_folder(self.out, recipe)

    def run(self, listen: Listener = lambda *_: None, jobs: int | None = None) -> Gains:
        """Run what is missing, and compare.

        Args:
            listen: called after every run.
            jobs: processes side by side; None is one per core, or a single one on a GPU.

        Raises:
            RuntimeError: if runs failed, or a worker process died; the others are kept.
            ValueError: if another process runs in the folder.
        """
        pairs = itertools.combinations(self.tasks, 2)
        trained = [self._joint(task) for task in self.tasks] + [self._joint(*p) for p in pairs]
        found = [self._affinity(kind) for kind in self._kinds()]
        with hold(self.out), Workers(self._cells, jobs, self.device) as workers:
            workers.run("training pairs", list(itertools.chain(*trained)), listen)
            workers.run("measuring affinities", list(itertools.chain(*found)), listen)
        if workers.failed:
            raise RuntimeError(
                f"{len(workers.failed)} runs failed, the others are kept; the first: "
                f"{workers.failed[0]}"
            )
        return self._read()

    def _seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    def _joint(self, *tasks: str) -> list[Cell]:
        return [
            Cell(
                f"joint-{'-'.join(tasks)}",
                self.recipe.replace(method="gd", tasks=tasks, seed=seed),
            )
            for seed in self._seeds()
        ]

    @staticmethod
    def _kinds() -> list[str]:
        return ["proximal", "gradient", "lookahead"]

    def _affinity(self, kind: str) -> list[Cell]:
        cells = []
        for seed in self._seeds():
            if kind == "lookahead":
                recipe = self.recipe.replace(method="gd", seed=seed)
                every = max(1, recipe.batches // _LOOKAHEADS)
                cells.append(Cell("lookahead", recipe, lookahead_every=every))
            else:
                settings: dict[str, Any] = {"method": "selective", "affinity": kind}
                cells.append(Cell(kind, self.recipe.replace(seed=seed, **settings)))
        return cells

    def _metrics(self, cells: Iterable[Cell], task: str) -> Floats:
        """The held-out metric of a task, seed by seed; NaN where a run diverged."""
        values = []
        for cell in cells:
            result = cell.read(self._cells)
            if result is None:
                raise RuntimeError(f"The run {cell.name} is not finished; start again.")
            diverged = result["diverged"] is not None
            values.append(np.nan if diverged else result["metrics"]["held_out"][task])
        return np.array(values)

    def _read(self) -> Gains:
        n_tasks = len(self.tasks)
        gains = np.full((self.seeds, n_tasks, n_tasks), np.nan)
        alone = {task: _mean(self._metrics(self._joint(task), task)) for task in self.tasks}
        for (i, first), (k, second) in itertools.combinations(enumerate(self.tasks), 2):
            cells = self._joint(first, second)
            for row, column, task in ((i, k, second), (k, i, first)):
                together = self._metrics(cells, task)
                sign = -1.0 if self.problem.lower_is_better[task] else 1.0
                gains[:, row, column] = sign * 100 * (together - alone[task]) / alone[task]
        affinity = {kind: self._mean_affinity(kind) for kind in self._kinds()}
        gain = _mean(gains)
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
            repeatable=(
                spearman(_mean(gains[::2]), _mean(gains[1::2])) if self.seeds > 1 else None
            ),
        )

    def _mean_affinity(self, kind: str) -> Floats:
        found = []
        for cell in self._affinity(kind):
            result = cell.read(self._cells)
            assert result is not None  # read after the runs
            matrix = np.array(result["affinity"], dtype=np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                own = np.where(matrix.diagonal() > 0, matrix.diagonal(), np.nan)
                found.append(matrix / own)
        return _mean(np.stack(found))


def spearman(first: Floats, second: Floats) -> Correlation:
    """Rank correlation between the entries of two matrices off their diagonals.

    The interval is the bootstrap's, over the tasks: entries of one row or column belong together.
    It is the same at every call.

    Args:
        first: ``[K, K]``; entries that are not finite are left out.
        second: ``[K, K]``, likewise.

    Example:
        >>> a = np.arange(16.0).reshape(4, 4)
        >>> spearman(a, 2 * a).value
        1.0
    """
    draws = np.random.default_rng(0)
    n_tasks = len(first)
    values = []
    for _ in range(_RESAMPLES):
        chosen = draws.integers(n_tasks, size=n_tasks)
        value = _rank_correlation(first, second, chosen)
        if np.isfinite(value):
            values.append(value)
    low, high = np.quantile(values, [0.025, 0.975]) if values else (np.nan, np.nan)
    value = _rank_correlation(first, second, np.arange(n_tasks))
    return Correlation(float(value), float(low), float(high))


def _rank_correlation(first: Floats, second: Floats, tasks: NDArray[np.int64]) -> float:
    index = np.ix_(tasks, tasks)
    x, y = first[index], second[index]
    kept = (tasks[:, None] != tasks) & np.isfinite(x) & np.isfinite(y)
    x, y = stats.rankdata(x[kept]), stats.rankdata(y[kept])
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _mean(stack: Floats) -> Floats:
    """Over the seeds, of what is finite."""
    counts = np.isfinite(stack).sum(0)
    total = np.where(np.isfinite(stack), stack, 0.0).sum(0)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
