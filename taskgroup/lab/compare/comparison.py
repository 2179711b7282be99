"""Methods times seeds on a data set: which runs there are, and running those that are missing."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from taskgroup.lab.compare.cell import Cell, Result, open_folder
from taskgroup.lab.compare.presets import JOINT, REFERENCE, Variant
from taskgroup.lab.compare.statistics import Estimate, estimate, noise_floor
from taskgroup.lab.compare.workers import Listener, Workers
from taskgroup.lab.train.evaluation import delta_m
from taskgroup.lab.train.lock import hold
from taskgroup.lab.train.problem import Problem, make_problem
from taskgroup.lab.train.recipe import Recipe
from taskgroup.lab.train.run_files import write_text
from taskgroup.lab.train.trainer import Trainer, find_device, task_names

__all__ = ["Budget", "Comparison", "Row", "Table"]

_TUNING_SEEDS = 1000  # rates are chosen on other seeds than those that are compared


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every method is given the same of.

    Attributes:
        name: ``"batches"``: as many batches as the recipe has; ``"time"``: as much time as the
            selective run of so many batches takes; ``"tuned"``: that, at the best of the rates.
        title: what tables call it.
    """

    name: str
    title: str


BUDGETS = (
    Budget("batches", "as many batches"),
    Budget("time", "as much time"),
    Budget("tuned", "as much time, best rate"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a comparison says of one variant.

    Attributes:
        variant: the variant.
        time: of a batch, relative to joint training.
        memory: peak bytes of a batch relative to joint training.
        steps: optimizer steps per batch.
        groups: mean number of groups in the second half of a run.
        changes: share of the batches of the last quarter after which the partition changed.
        rate: learning rate of the tuned runs.
        batches: ``{budget: batches}``.
        delta: ``{(budget, split): Δm in percent against single-task training}``.
        gain: ``{(budget, split): Δm minus that of joint training of the same seed}``.
        floor: ``{(budget, split): noise floor of such a difference}``, from the joint runs.
        metrics: ``{(budget, split): {task: mean}}``.
        diverged: ``{budget: runs that diverged}``.
        skipped: batches of all seeds for which the method found no weights.
    """

    variant: Variant
    time: float
    memory: float
    steps: float
    groups: float
    changes: float
    rate: float | None
    batches: dict[str, int]
    delta: dict[tuple[str, str], Estimate]
    gain: dict[tuple[str, str], Estimate]
    floor: dict[tuple[str, str], float]
    metrics: dict[tuple[str, str], dict[str, float]]
    diverged: dict[str, int]
    skipped: int

    def verdict(self, budget: str, split: str) -> str:
        """Whether the variant differs from joint training: ``"better"``, ``"worse"`` or ``""``.

        It does where the interval of the difference excludes zero and the difference is larger
        than the noise floor.
        """
        key = (budget, split)
        if key not in self.gain or self.gain[key].n < 2:
            return ""
        gain, floor = self.gain[key], self.floor[key]
        if not (abs(gain.mean) > gain.half and abs(gain.mean) > floor):
            return ""
        return "better" if gain.mean > 0 else "worse"


@dataclasses.dataclass(frozen=True)
class Table:
    """All that a comparison found.

    Attributes:
        recipe: what all variants start from.
        problem: the data set.
        tasks: of the recipe.
        seeds: how many.
        rates: those tried, for the budget ``"tuned"``.
        budgets: those that were run.
        reference: title of the variant whose time all others get.
        rows: one per variant.
        single: ``{split: {task: mean metric}}`` of single-task training.
        refused: ``{title: why the method cannot work on the data}``.
        failed: what runs that failed said.
    """

    recipe: Recipe
    problem: Problem
    tasks: list[str]
    seeds: int
    rates: list[float]
    budgets: list[Budget]
    reference: str
    rows: list[Row]
    single: dict[str, dict[str, float]]
    refused: dict[str, str]
    failed: list[str]


class Comparison:
    """Trains variants of a recipe over several seeds, side by side in worker processes.

    The folder holds ``base.yaml``, the recipe; ``cells/``, a small file per finished run; and
    ``costs.yaml`` and ``batches.yaml``, what was measured and follows from it. What is there is not
    run again: a comparison that was stopped goes on, and one with more seeds or variants
    adds to it.

    Args:
        recipe: what all variants start from; its seed is the first one.
        variants: what to compare; one of them is joint training (``"gd"``).
        seeds: how many.
        out: the folder.
        budgets: of ``BUDGETS``, by name.
        rates: learning rates to choose the best of, for the budget ``"tuned"``.
        tuning_seeds: runs that a rate is chosen by.
        strict: raise where a variant cannot work on the data, instead of leaving it out.

    Raises:
        ValueError: if a setting is out of range or, with ``strict``, a variant cannot work.
    """

    def __init__(
        self,
        recipe: Recipe,
        variants: Sequence[Variant],
        seeds: int,
        out: str | Path,
        *,
        budgets: Iterable[str] = ("batches", "time", "tuned"),
        rates: Sequence[float] = (),
        tuning_seeds: int = 3,
        strict: bool = False,
    ) -> None:
        if seeds < 1:
            raise ValueError(f"A comparison needs at least one seed, got {seeds}.")
        if recipe.batches < 2:
            raise ValueError("A comparison needs at least two batches; one of them is not timed.")
        names = {variant.name for variant in variants}
        if missing := {JOINT, *(variant.against for variant in variants)} - names:
            raise ValueError(
                "A comparison needs joint training to compare with: add "
                f"{', '.join(map(repr, sorted(missing)))}."
            )
        wanted = set(budgets)
        if unknown := sorted(wanted - {budget.name for budget in BUDGETS}):
            raise ValueError(
                f"There is no budget {', '.join(unknown)}; take some of "
                f"{', '.join(budget.name for budget in BUDGETS)}."
            )
        self.recipe = recipe
        self.seeds = seeds
        self.out = Path(out)
        self.budgets = [budget for budget in BUDGETS if budget.name in wanted | {"batches"}]
        self.rates = sorted({*rates, recipe.lr})
        for rate in self.rates:
            recipe.replace(lr=rate)  # raises where it is out of range, before the runs
        if "tuned" in wanted and len(self.rates) < 2:
            raise ValueError("To choose the best rate, give another one than that of the recipe.")
        self.tuning_seeds = tuning_seeds
        self.device = find_device(recipe.device)
        self.problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        if len(self.tasks) < 2:
            raise ValueError("A comparison needs at least two tasks; one has nothing to share.")
        self._single_metrics: dict[str, dict[str, float]] | None = None
        self.refused: dict[str, str] = {}
        self.variants = [v for v in variants if self._can_work(v, strict)]
        self._cells = open_folder(self.out, recipe)

    def _can_work(self, variant: Variant, strict: bool) -> bool:
        """Whether the method can be made; before hours are spent on the others."""
        try:
            # On the CPU: the memory of a GPU is for the processes that train.
            Trainer(self._recipe(variant, self.recipe.seed, device="cpu"))
        except (ValueError, ImportError) as error:
            if strict:
                raise ValueError(f"{variant.title} cannot be compared here: {error}") from error
            self.refused[variant.title] = str(error)
            return False
        return True

    def _recipe(self, variant: Variant, seed: int, **settings: Any) -> Recipe:
        return self.recipe.replace(seed=seed, **{**variant.settings, **settings})

    # What is run, stage by stage.

    def run(self, listen: Listener = lambda *_: None, jobs: int | None = None) -> Table:
        """Run what is missing, and read all of it.

        Args:
            listen: called after every run.
            jobs: processes side by side; None is one per core, or a single one on a GPU.

        Raises:
            RuntimeError: if a worker process died; what was finished is kept.
            ValueError: if another process runs in the folder.
        """
        wanted = {budget.name for budget in self.budgets}
        with hold(self.out), Workers(self._cells, jobs, self.device) as workers:
            workers.run("as many batches", self._single() + self._by("batches"), listen)
            self._single_metrics = None
            self._measure_costs(workers)
            if "time" in wanted:
                workers.run("as much time", self._by("time"), listen)
            if "tuned" in wanted:
                workers.run("choosing rates", self._tuning(), listen)
                workers.run("best rates", self._by("tuned"), listen)
        return self.read(workers.failed)

    def _seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    def _single(self) -> list[Cell]:
        """Single-task training: the baseline of Δm."""
        return [
            Cell(f"single-{task}", self._single_recipe(task, seed))
            for seed in self._seeds()
            for task in self.tasks
        ]

    def _single_recipe(self, task: str, seed: int) -> Recipe:
        return self.recipe.replace(seed=seed, method="gd", tasks=(task,))

    def _by(self, budget: str) -> list[Cell]:
        """Seed by seed, so that what disturbs the machine for a while disturbs all methods."""
        return [self._cell(v, seed, budget) for seed in self._seeds() for v in self.variants]

    def _cell(self, variant: Variant, seed: int, budget: str, rate: float | None = None) -> Cell:
        settings: dict[str, Any] = {}
        if budget != "batches":
            settings["batches"] = self._batches(variant)
        if rate is None and budget == "tuned":
            rate = self.best_rate(variant)
        if rate is not None and rate != self.recipe.lr:
            settings["lr"] = rate
            if self.recipe.head_lr is not None:
                settings["head_lr"] = rate * self.recipe.head_lr / self.recipe.lr
        return Cell(variant.name, self._recipe(variant, seed, **settings))

    def _tuning(self) -> list[Cell]:
        first = self.recipe.seed + _TUNING_SEEDS
        return [
            self._cell(variant, seed, "time", rate)
            for seed in range(first, first + self.tuning_seeds)
            for variant in self.variants
            for rate in self.rates
        ]

    # What is read.

    def _results(self, cells: Iterable[Cell]) -> list[Result]:
        return [result for cell in cells if (result := cell.read(self._cells)) is not None]

    def _measure_costs(self, workers: Workers) -> None:
        """Measure the steps of those variants that were not, side by side with joint training.

        Kept, since a budget must be the same whenever the comparison goes on.
        """
        known = self._read_yaml("costs.yaml")
        missing = [variant for variant in self.variants if variant.name not in known]
        if not missing:
            return
        joint = next(variant for variant in self.variants if variant.name == JOINT)
        measured = [joint, *(variant for variant in missing if variant is not joint)]
        seconds = workers.measure(
            {variant.name: self._recipe(variant, self.recipe.seed) for variant in measured}
        )
        known |= {v.name: seconds[v.name] / seconds[JOINT] for v in missing}
        self._write_yaml("costs.yaml", known)

    def _cost(self, variant: Variant) -> float:
        """Time of a batch relative to joint training; NaN where it is not known.

        That of a step times the steps of a batch, the median over the seeds: how many groups there
        are differs from seed to seed.
        """
        cells = [self._cell(variant, seed, "batches") for seed in self._seeds()]
        steps = [r["steps_per_batch"] for r in self._results(cells) if r["diverged"] is None]
        step: float = self._read_yaml("costs.yaml").get(variant.name, math.nan)
        return step * max(1.0, statistics.median(steps)) if steps else math.nan

    def _read_yaml(self, name: str) -> dict[str, Any]:
        file = self.out / name
        return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}

    def _write_yaml(self, name: str, values: dict[str, Any]) -> None:
        write_text(self.out / name, yaml.safe_dump(values, sort_keys=False))

    @property
    def _reference(self) -> Variant:
        """The variant whose time all others get: selective updates, or where left out GD."""
        by_name = {variant.name: variant for variant in self.variants}
        return by_name.get(REFERENCE, by_name[JOINT])

    def _batches(self, variant: Variant) -> int:
        """As many as take the time of the reference.

        Kept, since it must be the same whenever the comparison goes on.
        """
        reference = self._reference
        which = "" if reference.name == REFERENCE else f"-{reference.name}"
        file = f"batches{which}.yaml"
        known = self._read_yaml(file)
        if variant.name not in known:
            ratio = self._cost(reference) / self._cost(variant)
            if math.isnan(ratio):  # all of its runs diverged, or none is finished
                return self.recipe.batches
            known[variant.name] = max(2, round(self.recipe.batches * ratio))
            self._write_yaml(file, known)
        batches: int = known[variant.name]
        return batches

    def best_rate(self, variant: Variant) -> float:
        """The rate of the highest mean held-out Δm, over other seeds than those compared.

        Every method gets its really best rate, joint training among them: to choose on a small
        validation set would be to compare the luck of choices. A rate with a run that diverged is
        out, unless all are.
        """
        first = self.recipe.seed + _TUNING_SEEDS
        best = (-math.inf, self.recipe.lr)
        for rate in self.rates:
            cells = [
                self._cell(variant, seed, "time", rate)
                for seed in range(first, first + self.tuning_seeds)
            ]
            deltas = [self._delta(result, "held_out") for result in self._results(cells)]
            mean = statistics.fmean(deltas) if deltas else math.nan
            if mean > best[0]:  # False for NaN
                best = (mean, rate)
        return best[1]

    def _baseline(self, split: str) -> dict[str, float]:
        """The mean metric of single-task training, over the seeds."""
        found = {}
        for task in self.tasks:
            cells = [
                Cell(f"single-{task}", self._single_recipe(task, seed)) for seed in self._seeds()
            ]
            values = [
                r["metrics"][split][task] for r in self._results(cells) if r["diverged"] is None
            ]
            found[task] = statistics.fmean(values) if values else math.nan
        return found

    def delta(self, result: Result) -> float | None:
        """Held-out Δm of one run, in percent; None as long as the baselines are not finished."""
        if any(math.isnan(value) for value in self.single["held_out"].values()):
            self._single_metrics = None  # to be read again
            return None
        return self._delta(result, "held_out")

    def _delta(self, result: Result, split: str) -> float:
        if result["diverged"] is not None:
            return math.nan
        metrics = result["metrics"][split]
        baseline = {task: value for task, value in self.single[split].items() if task in metrics}
        return delta_m(metrics, baseline, self.problem)

    @property
    def single(self) -> dict[str, dict[str, float]]:
        """``{split: {task: mean metric}}`` of single-task training."""
        if self._single_metrics is None:
            self._single_metrics = {split: self._baseline(split) for split in self.problem.splits}
        return self._single_metrics

    def read(self, failed: Sequence[str] = ()) -> Table:
        """What the finished runs say.

        Args:
            failed: what those that failed said.
        """
        self._single_metrics = None
        by_name = {variant.name: variant for variant in self.variants}
        return Table(
            recipe=self.recipe,
            problem=self.problem,
            tasks=self.tasks,
            seeds=self.seeds,
            rates=self.rates,
            budgets=self.budgets,
            reference=self._reference.title,
            rows=[self._row(v, by_name[v.against]) for v in self.variants],
            single=self.single,
            refused=self.refused,
            failed=list(failed),
        )

    def _row(self, variant: Variant, joint: Variant) -> Row:
        finished, reference = (
            [
                result
                for result in self._results(
                    self._cell(v, seed, "batches") for seed in self._seeds()
                )
                if result["diverged"] is None
            ]
            for v in (variant, joint)
        )
        delta, gain, floor, metrics, diverged = {}, {}, {}, {}, {}
        for budget in self.budgets:
            cells = {
                seed: self._cell(variant, seed, budget.name).read(self._cells)
                for seed in self._seeds()
            }
            joints = {
                seed: self._cell(joint, seed, budget.name).read(self._cells)
                for seed in self._seeds()
            }
            lost = [r for r in cells.values() if r is not None and r["diverged"] is not None]
            diverged[budget.name] = len(lost)
            for split in self.problem.splits:
                key = (budget.name, split)
                values = {s: self._delta(r, split) for s, r in cells.items() if r is not None}
                others = {s: self._delta(r, split) for s, r in joints.items() if r is not None}
                delta[key] = estimate([v for v in values.values() if math.isfinite(v)])
                pairs = [values[s] - others[s] for s in values if s in others]
                gain[key] = estimate([v for v in pairs if math.isfinite(v)])
                floor[key] = noise_floor([v for v in others.values() if math.isfinite(v)])
                kept = [r["metrics"][split] for r in cells.values() if r and r["diverged"] is None]
                if kept:
                    metrics[key] = {t: statistics.fmean(m[t] for m in kept) for t in kept[0]}
        return Row(
            variant=variant,
            time=self._cost(variant) / self._cost(joint),
            memory=_median(finished, "peak_bytes") / _median(reference, "peak_bytes"),
            steps=_median(finished, "steps_per_batch"),
            groups=_mean(statistics.fmean(r["groups"][len(r["groups"]) // 2 :]) for r in finished),
            changes=_mean(_late_changes(r) for r in finished),
            rate=self.best_rate(variant) if any(b.name == "tuned" for b in self.budgets) else None,
            batches={
                b.name: self._cell(variant, self.recipe.seed, b.name).recipe.batches
                for b in self.budgets
            },
            delta=delta,
            gain=gain,
            floor=floor,
            metrics=metrics,
            diverged=diverged,
            skipped=sum(result["skipped"] for result in finished),
        )


def _median(results: list[Result], key: str) -> float:
    return statistics.median(r[key] for r in results) if results else math.nan


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def _late_changes(result: Result) -> float:
    """Share of the batches of the last quarter after which the partition changed."""
    batches = len(result["groups"])
    quarter = max(1, batches // 4)
    late = [batch for batch in result["changes"] if batch > batches - quarter]
    return len(late) / quarter
