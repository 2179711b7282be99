"""What a comparison found: estimates over the seeds for every variant."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskgroup.lab.problem import Problem
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.studies.agreement import agreement
from taskgroup.lab.studies.cell import Result
from taskgroup.lab.studies.intervals import Estimate, estimate, noise_floor
from taskgroup.lab.studies.presets import Variant
from taskgroup.lab.train.evaluation import delta_m
from taskgroup.lab.words import counted

__all__ = [
    "BUDGETS",
    "Row",
    "Runs",
    "Table",
    "delta_of",
    "make_row",
    "mean",
    "steps_per_batch",
    "tuned_title",
]

# Of a row, in every record.
_PER_VARIANT = ("time", "memory", "steps", "groups", "changes", "agreement")

Runs = Mapping[int, Result]  # the finished runs of a variant, by seed
Key = tuple[str, str]  # budget and split


#: What every method gets the same amount of: the batches of the recipe; the time that the selective
#: run takes for these batches; the same time, with the best learning rate (and batch size, where
#: several are tried). And their titles.
BUDGETS = {"batches": "equal batches", "time": "equal time", "tuned": "best rate"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What a comparison found about one variant.

    Attributes:
        variant: the variant.
        time: per batch, relative to joint training.
        memory: peak bytes of a batch, relative to joint training.
        steps: optimizer steps per batch.
        groups: mean number of groups in the second half of a run.
        changes: share of the batches in the last quarter of a run that changed the partition.
        agreement: mean adjusted Rand index of the partitions at the end of two runs; NaN for one.
        rate: learning rate of the tuned runs; None if the variant is not tuned, as for the two that
            follow.
        batch_size: of the tuned runs.
        tuned_time: time of the tuned runs by the steps that they took, relative to equal time. It
            is not 1 where they took more or fewer steps per batch than at equal batches.
        batches: ``{budget: batches}``.
        delta: ``{(budget, split): Δm in percent against single-task training}``.
        gain: ``{(budget, split): Δm minus that of joint training with the same seed}``.
        floor: ``{(budget, split): noise floor of such a difference}``, from the joint runs.
        metrics: ``{(budget, split): {task: mean}}``.
        diverged: ``{budget: number of runs that diverged}``.
        skipped: batches, over all seeds, for which the method found no weights.
    """

    variant: Variant
    time: float
    memory: float
    steps: float
    groups: float
    changes: float
    agreement: float
    rate: float | None
    batch_size: int | None
    tuned_time: float | None
    batches: dict[str, int]
    delta: dict[Key, Estimate]
    gain: dict[Key, Estimate]
    floor: dict[Key, float]
    metrics: dict[Key, dict[str, float]]
    diverged: dict[str, int]
    skipped: int

    def verdict(self, budget: str, split: str) -> str:
        """Whether the variant differs from joint training: ``"better"``, ``"worse"`` or ``""``.

        It differs if the interval of the difference excludes zero and the difference is larger than
        the noise floor.
        """
        unknown = Estimate(math.nan, math.nan, 0)
        floor = self.floor.get((budget, split), math.nan)
        return self.gain.get((budget, split), unknown).verdict(floor)


@dataclasses.dataclass(frozen=True)
class Table:
    """Everything that a comparison found.

    Attributes:
        recipe: what all variants start from.
        problem: the data set.
        tasks: of the recipe.
        seeds: their number.
        rates: those that were tried for the budget ``"tuned"``.
        batch_sizes: those that were tried, with each of the rates.
        budgets: those that were run.
        reference: title of the variant whose time all variants get.
        rows: one per variant.
        single: ``{split: {task: mean metric}}`` of single-task training.
        refused: ``{title: why the method cannot work on the data}``.
        failed: the errors of the runs that failed.
    """

    recipe: Recipe
    problem: Problem
    tasks: list[str]
    seeds: int
    rates: list[float]
    batch_sizes: list[int]
    budgets: list[str]
    reference: str
    rows: list[Row]
    single: dict[str, dict[str, float]]
    refused: dict[str, str]
    failed: list[str]

    def records(self) -> list[dict[str, Any]]:
        """All numbers, a flat dict per variant, budget and split, as ``pandas.DataFrame`` takes.

        ``delta_m`` and ``gain`` have the half-width of their 95% interval in ``..._half``. The
        metric of each task is in a column of the metric's and the task's name. Unknown numbers are
        NaN. The last records are those of single-task training, to which Δm refers.
        """
        records: list[dict[str, Any]] = []
        for row in self.rows:
            settings = {"rate": row.rate, "batch_size": row.batch_size}
            own = {
                "rate": row.variant.settings.get("lr", self.recipe.lr),
                "batch_size": row.variant.settings.get("batch_size", self.recipe.batch_size),
            }
            for (budget, split), delta in row.delta.items():
                if budget not in row.batches:  # the variant is not tuned
                    continue
                gain = row.gain[budget, split]
                records.append(
                    {
                        "variant": row.variant.name,
                        "budget": budget,
                        "split": split,
                        "batches": row.batches[budget],
                        **(settings if budget == "tuned" else own),
                        "runs": delta.n,
                        "diverged": row.diverged[budget],
                        "delta_m": delta.mean,
                        "delta_m_half": delta.half,
                        "gain": gain.mean,
                        "gain_half": gain.half,
                        "noise_floor": row.floor[budget, split],
                        "verdict": row.verdict(budget, split),
                        **{name: getattr(row, name) for name in _PER_VARIANT},
                        **self._by_column(row.metrics.get((budget, split), {})),
                    }
                )
        for split, metrics in self.single.items():
            known = {"variant": "single-task", "budget": "batches", "split": split}
            recipe = self.recipe
            settings = {"rate": recipe.lr, "batch_size": recipe.batch_size}
            numbers = {"batches": recipe.batches, **settings, "runs": self.seeds}
            records.append({**known, **numbers, **self._by_column(metrics)})
        return records

    def _by_column(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics by the names of their columns; NaN if they are missing."""
        names = self.problem.metric_names
        return {f"{names[task]} {task}": metrics.get(task, math.nan) for task in self.tasks}

    def title(self, budget: str) -> str:
        """Of a budget, as shown."""
        if budget == "tuned":
            return tuned_title(self.rates, self.batch_sizes)
        return BUDGETS[budget]

    @property
    def headline(self) -> str:
        """What was compared, in one line."""
        return (
            f"{self.recipe.data}: {len(self.tasks)} tasks, {self.recipe.batches} batches of "
            f"{self.recipe.batch_size}, {counted(self.seeds, 'seed')}"
        )

    @property
    def joint(self) -> Row:
        """The row of joint training."""
        return next(row for row in self.rows if row.variant.settings.get("method") == "gd")


def delta_of(result: Result, split: str, baseline: Mapping[str, float], problem: Problem) -> float:
    """Δm of a run against the baseline's metric of each task, in percent.

    NaN if the run diverged, or if a metric of the baseline is not above zero.
    """
    if result["diverged"] is not None:
        return math.nan
    metrics = result["metrics"][split]
    known = {task: value for task, value in baseline.items() if task in metrics}
    if not all(value > 0 for value in known.values()):  # nothing can be divided by it
        return math.nan
    return delta_m(metrics, known, problem)


def tuned_title(rates: Sequence[float], batch_sizes: Sequence[int]) -> str:
    """The title of the budget ``"tuned"``, by what there is to choose from."""
    if len(batch_sizes) == 1:
        return BUDGETS["tuned"]
    return "best rate and batch size" if len(rates) > 1 else "best batch size"


def make_row(
    variant: Variant,
    runs: Mapping[str, Runs],
    joint: Mapping[str, Runs],
    splits: Iterable[str],
    delta_of: Callable[[Result, str], float],
    **known: Any,
) -> Row:
    """What the runs of a variant say, compared with those of its joint training; both by budget.

    ``known`` are the attributes of :class:`Row` that the caller has measured.
    """
    delta, gain, floor, metrics, diverged = {}, {}, {}, {}, {}
    for budget, by_seed in runs.items():
        converged = [result for result in by_seed.values() if result["diverged"] is None]
        diverged[budget] = len(by_seed) - len(converged)
        for split in splits:
            key = (budget, split)
            values = {seed: delta_of(result, split) for seed, result in by_seed.items()}
            others = {seed: delta_of(result, split) for seed, result in joint[budget].items()}
            delta[key] = estimate(_finite(values.values()))
            gain[key] = estimate(_finite(values[s] - others[s] for s in values if s in others))
            floor[key] = noise_floor(_finite(others.values()))
            if found := [result["metrics"][split] for result in converged]:
                metrics[key] = {task: mean(m[task] for m in found) for task in found[0]}
    finished, references = (
        [result for result in of["batches"].values() if result["diverged"] is None]
        for of in (runs, joint)
    )
    memory, joint_memory = (
        _median(result["peak_bytes"] for result in results) for results in (finished, references)
    )
    return Row(
        variant=variant,
        memory=memory / joint_memory,
        steps=steps_per_batch(runs["batches"]),
        groups=mean(mean(r["groups"][len(r["groups"]) // 2 :]) for r in finished),
        changes=mean(map(_late_changes, finished)),
        agreement=agreement(result["partition"] for result in finished),
        delta=delta,
        gain=gain,
        floor=floor,
        metrics=metrics,
        diverged=diverged,
        skipped=sum(result["skipped"] for result in finished),
        **known,
    )


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def mean(values: Iterable[float]) -> float:
    """Of the values; NaN without any."""
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def steps_per_batch(runs: Runs) -> float:
    """The median over the runs that did not diverge; NaN without any."""
    return _median(r["steps_per_batch"] for r in runs.values() if r["diverged"] is None)


def _median(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.median(values) if values else math.nan


def _late_changes(result: Result) -> float:
    """The share of the batches in the last quarter that changed the partition."""
    batches = len(result["groups"])
    quarter = max(1, batches // 4)
    late = [batch for batch in result["changes"] if batch > batches - quarter]
    return len(late) / quarter
