"""Variants times seeds on a data set: which runs there are, and running the missing ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import taskgroup as tg
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import Recipe, is_own
from taskgroup.lab.studies.cell import Cell, Result, open_folder
from taskgroup.lab.studies.equal_time import EqualTime
from taskgroup.lab.studies.presets import JOINT, Variant
from taskgroup.lab.studies.results import (
    BUDGETS,
    Row,
    Runs,
    Table,
    make_row,
    mean,
    steps_per_batch,
    tuned_title,
)
from taskgroup.lab.studies.single_task import SingleTask
from taskgroup.lab.studies.workers import Listener, Workers
from taskgroup.lab.train.rehearsal import rehearse, rehearse_step
from taskgroup.lab.train.source import check_source
from taskgroup.lab.train.trainer import Trainer, task_names
from taskgroup.lab.words import listed

__all__ = ["Comparison", "Tried"]

_TUNING_SEEDS = 1000  # what is best is chosen on other seeds than those that are compared


class Tried(NamedTuple):
    """What is tried to find the best for a variant."""

    rate: float
    batch_size: int


class Comparison:
    """Trains variants of a recipe over several seeds, in parallel worker processes.

    The folder holds ``base.yaml``, the recipe; ``cells/``, a small file per finished run;
    ``costs.yaml`` and ``batches.yaml``, the measured costs and the budgets that follow from them;
    and ``source.yaml``, digests of the source of a problem of the user's own. Such a problem is
    checked on one batch of every method before the first run.
    Finished runs are not run again: a comparison that was stopped continues, and one with more
    seeds or variants adds to the folder.

    Args:
        recipe: what all variants start from; its seed is the first one.
        variants: what to compare, joint training (``"gd"``) among them.
        seeds: their number.
        out: the folder.
        budgets: names from ``BUDGETS``.
        rates: learning rates to choose the best of, for the budget ``"tuned"``; the recipe's is
            always among them.
        batch_sizes: batch sizes to choose the best of, with each of the rates; a variant's own is
            always among them.
        tune: names of the variants to tune, and with them those that they are measured against;
            None tunes all.
        tuning_seeds: number of runs by which a rate and a batch size are chosen.
        strict: raise if a variant cannot work on the data, instead of leaving it out.

    Raises:
        ValueError: if a setting is out of range, a problem of the user's own lacks something or has
            changed since the folder was begun, or, with ``strict``, a variant cannot work.
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
        batch_sizes: Sequence[int] = (),
        tune: Collection[str] | None = None,
        tuning_seeds: int = 3,
        strict: bool = False,
    ) -> None:
        if seeds < 1:
            raise ValueError(f"A comparison needs at least one seed, got {seeds}.")
        if recipe.batches < 2:
            raise ValueError("A comparison needs at least two batches; the first is not timed.")
        names = {variant.name for variant in variants}
        if missing := {JOINT, *(variant.against for variant in variants)} - names:
            raise ValueError(
                "A comparison needs joint training to compare with: add "
                f"{', '.join(map(repr, sorted(missing)))}."
            )
        wanted = {"batches", *budgets}
        if unknown := sorted(wanted - set(BUDGETS)):
            raise ValueError(
                f"There is no budget {', '.join(unknown)}; take some of {', '.join(BUDGETS)}."
            )
        self.recipe = recipe
        self.seeds = seeds
        self.out = Path(out)
        self.budgets = [budget for budget in BUDGETS if budget in wanted]
        self.rates = sorted({*rates, recipe.lr})
        for rate in self.rates:
            recipe.replace(lr=rate)  # raises before the runs if the rate is out of range
        self.batch_sizes = sorted({*batch_sizes, recipe.batch_size})
        for size in self.batch_sizes:
            recipe.replace(batch_size=size)
        if "tuned" in wanted and len(self.rates) * len(self.batch_sizes) < 2:
            raise ValueError(
                "To choose the best rate or batch size, give another one than that of the recipe."
            )
        if "tuned" not in wanted and (batch_sizes or tune is not None):
            raise ValueError(
                "Batch sizes are tried, and variants chosen to be tuned, for the budget 'tuned' "
                "alone; add it to the budgets."
            )
        if unknown := sorted(set(tune or ()) - names):
            raise ValueError(
                f"{listed(unknown)} cannot be tuned, because the comparison has no such variant; "
                f"it has {', '.join(variant.name for variant in variants)}."
            )
        self._tuning_seeds = tuning_seeds
        self.problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        if len(self.tasks) < 2:
            raise ValueError("A comparison needs at least two tasks, which can share a group.")
        self._tried_on = rehearse(recipe, relative=True) if is_own(recipe.data) else "cpu"
        self.refused: dict[str, str] = {}
        self.variants = [variant for variant in variants if self._can_work(variant, strict)]
        by_name = {variant.name: variant for variant in self.variants}
        tuned = set(by_name) if tune is None else {JOINT, *tune}
        tuned |= {variant.against for variant in self.variants if variant.name in tuned}
        self._tuned = [variant for variant in self.variants if variant.name in tuned]
        for size in self.batch_sizes if len(self.batch_sizes) > 1 else ():
            self._check_batch_size(size, by_name[JOINT])
        self._folder = open_folder(self.out, recipe)
        check_source(self.out, recipe.data)
        self._single = SingleTask(recipe, self.problem, self.tasks, self._seeds, self._folder)
        self._equal_time = EqualTime(self.out, recipe, by_name, self._steps)

    def _can_work(self, variant: Variant, strict: bool) -> bool:
        """Whether the method can be set up, before hours are spent on the others."""
        try:
            self._try(variant.settings, variant.title)
        except (ValueError, ImportError) as error:
            if strict:
                raise ValueError(f"{variant.title} cannot be compared here: {error}") from error
            self.refused[variant.title] = str(error)
            return False
        return True

    def _check_batch_size(self, size: int, joint: Variant) -> None:
        """Raise if no batch of this size can be made, before hours are spent."""
        try:
            self._try({**joint.settings, "batch_size": size}, joint.title)
        except (ValueError, ImportError) as error:
            raise ValueError(f"Batch size {size} cannot be tried here: {error}") from error

    def _try(self, settings: Mapping[str, Any], title: str) -> None:
        """Set up the training; on a problem of the user's own, also train on one batch."""
        # On the CPU if possible: the memory of a GPU is for the processes that train.
        trainer = Trainer(self.recipe.replace(**{**settings, "device": self._tried_on}))
        if is_own(self.recipe.data):
            rehearse_step(trainer, title)

    # Which runs there are.

    def run(
        self,
        listen: Listener = lambda *_: None,
        jobs: int | None = None,
        executor: Executor | None = None,
    ) -> Table:
        """Run what is missing, and read all results.

        Args:
            listen: called after every run.
            jobs: number of worker processes on this machine; None is one per GPU if the recipe
                trains on a GPU, and one per core otherwise.
            executor: where to train instead of on this machine: any
                ``concurrent.futures.Executor`` whose workers have taskgroup and the data. It is
                not shut down.

        Raises:
            RuntimeError: if worker processes died again and again, or if the executor's workers
                cannot train; finished runs are kept.
            ValueError: if another process runs in the folder, if ``jobs`` is less than 1 or is
                given with an executor, or if there is no GPU where the recipe asks for one.
        """
        with (
            tg.recording.hold(self.out),
            Workers(self._folder, self.recipe, executor, jobs) as workers,
        ):
            runs = self._single.cells + self._by("batches")
            workers.run(BUDGETS["batches"], runs, listen)
            self._single.read()
            self._equal_time.load()
            self._equal_time.measure(workers, self.variants)
            if "time" in self.budgets:
                workers.run(BUDGETS["time"], self._by("time"), listen)
            if "tuned" in self.budgets:
                for size in self.batch_sizes if len(self.batch_sizes) > 1 else ():
                    self._equal_time.measure(workers, self._tuned, size)
                tuning = [
                    self._cell(variant, seed, "time", tried)
                    for seed in self._other_seeds
                    for variant in self._tuned
                    for tried in self._tried(variant)
                ]
                title = tuned_title(self.rates, self.batch_sizes)
                workers.run(f"choosing the {title}", tuning, listen)
                workers.run(title, self._by("tuned"), listen)
        return self.read(workers.failed)

    @property
    def _seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    @property
    def _other_seeds(self) -> range:
        first = self.recipe.seed + _TUNING_SEEDS
        return range(first, first + self._tuning_seeds)

    def _by(self, budget: str) -> list[Cell]:
        """Seed by seed, so that a slow period of the machine affects all methods."""
        cells = [self._cells(variant, budget) for variant in self.variants]
        return [by_seed[seed] for seed in self._seeds for by_seed in cells if by_seed]

    def _cells(self, variant: Variant, budget: str) -> dict[int, Cell]:
        """The runs of a variant, by seed; none at the best rate of a variant that is not tuned."""
        if budget != "tuned":
            return {seed: self._cell(variant, seed, budget) for seed in self._seeds}
        if variant not in self._tuned:
            return {}
        best = self.best(variant)
        return {seed: self._cell(variant, seed, budget, best) for seed in self._seeds}

    def _cell(self, variant: Variant, seed: int, budget: str, tried: Tried | None = None) -> Cell:
        settings: dict[str, Any] = {"seed": seed, **variant.settings}
        size = None if tried is None else tried.batch_size
        if budget != "batches":
            settings["batches"] = self._equal_time.batches(variant, size)
        if size is not None:
            settings["batch_size"] = size
        if tried is not None and tried.rate != self.recipe.lr:
            settings["lr"] = tried.rate
            if self.recipe.head_lr is not None:
                settings["head_lr"] = tried.rate * self.recipe.head_lr / self.recipe.lr
        return Cell(variant.name, self.recipe.replace(**settings))

    # Which of them are best.

    def _own(self, variant: Variant) -> Tried:
        """The rate of the recipe, which stands for that of the variant, and its batch size."""
        return Tried(self.recipe.lr, self._equal_time.recipe_of(variant).batch_size)

    def _tried(self, variant: Variant) -> list[Tried]:
        """All rates at all batch sizes at which the cost of the variant is known."""
        own = self._own(variant).batch_size
        sizes = {own, *self.batch_sizes} if len(self.batch_sizes) > 1 else {own}
        return [
            Tried(rate, size)
            for size in sorted(sizes)
            if size == own or not math.isnan(self._equal_time.cost(variant, size))
            for rate in self.rates
        ]

    def best(self, variant: Variant) -> Tried:
        """The rate and batch size with the highest mean held-out Δm, over other seeds.

        Every method, joint training included, gets what is really its best: a choice on a small
        validation set would add the luck of that choice. A pair of rate and batch size at which a
        run diverged is not taken; if all are like that, those of the recipe are.
        """
        best = (-math.inf, self._own(variant))
        for tried in self._tried(variant):
            cells = (self._cell(variant, seed, "time", tried) for seed in self._other_seeds)
            results = [result for cell in cells if (result := cell.read(self._folder)) is not None]
            delta = mean(self._single.delta(result, "held_out") for result in results)
            if delta > best[0]:  # False for NaN
                best = (delta, tried)
        return best[1]

    # What is read.

    def _runs(self, variant: Variant, budget: str) -> Runs:
        """The finished runs of a variant, by seed."""
        cells = self._cells(variant, budget)
        results = {seed: cell.read(self._folder) for seed, cell in cells.items()}
        return {seed: result for seed, result in results.items() if result is not None}

    def _steps(self, variant: Variant) -> float:
        """Steps per batch at equal batches, the median over the seeds."""
        return steps_per_batch(self._runs(variant, "batches"))

    def delta(self, result: Result) -> float | None:
        """Held-out Δm of one run, in percent; None until the baselines are finished."""
        if any(math.isnan(value) for value in self._single.metrics["held_out"].values()):
            self._single.read()
            return None
        return self._single.delta(result, "held_out")

    def read(self, failed: Sequence[str] = ()) -> Table:
        """Read the results of the finished runs; ``failed`` are the errors of the others."""
        self._single.read()
        self._equal_time.load()
        runs = {
            variant.name: {budget: self._runs(variant, budget) for budget in self.budgets}
            for variant in self.variants
        }
        return Table(
            recipe=self.recipe,
            problem=self.problem,
            tasks=self.tasks,
            seeds=self.seeds,
            rates=self.rates,
            batch_sizes=self.batch_sizes,
            budgets=self.budgets,
            reference=self._equal_time.reference.title,
            rows=[self._row(variant, runs) for variant in self.variants],
            single=self._single.metrics,
            refused=self.refused,
            failed=list(failed),
        )

    def _row(self, variant: Variant, runs: Mapping[str, Mapping[str, Runs]]) -> Row:
        recipes = {
            budget: cells[self.recipe.seed].recipe
            for budget in self.budgets
            if (cells := self._cells(variant, budget))
        }
        cost = self._equal_time.cost
        joint = next(other for other in self.variants if other.name == variant.against)
        tuned = recipes.get("tuned")
        return make_row(
            variant,
            runs[variant.name],
            runs[variant.against],
            self.problem.splits,
            self._single.delta,
            time=cost(variant) / cost(joint),
            rate=None if tuned is None else tuned.lr,
            batch_size=None if tuned is None else tuned.batch_size,
            tuned_time=None if tuned is None else self._time(variant, tuned, runs),
            batches={budget: recipe.batches for budget, recipe in recipes.items()},
        )

    def _time(
        self, variant: Variant, tuned: Recipe, runs: Mapping[str, Mapping[str, Runs]]
    ) -> float:
        """The time of the tuned runs, relative to equal time, by the steps that they took."""
        equal = self._equal_time
        steps = steps_per_batch(runs[variant.name]["tuned"])
        batch = equal.cost_of(variant, steps, tuned.batch_size)
        return tuned.batches * batch / (self.recipe.batches * equal.cost(equal.reference))
