"""Variants times seeds on a data set: which runs there are, and running the missing ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import yaml

import taskgroup as tg
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import Recipe, is_own
from taskgroup.lab.studies.cell import Cell, Result, open_folder
from taskgroup.lab.studies.presets import JOINT, REFERENCE, Variant
from taskgroup.lab.studies.results import BUDGETS, Runs, Table, delta_of, make_row, mean, median
from taskgroup.lab.studies.workers import Listener, Workers
from taskgroup.lab.train.rehearsal import rehearse, rehearse_step
from taskgroup.lab.train.source import check_source
from taskgroup.lab.train.trainer import Trainer, task_names

__all__ = ["Comparison"]

_TUNING_SEEDS = 1000  # rates are chosen on other seeds than those that are compared


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
        rates: learning rates to choose the best of, for the budget ``"tuned"``.
        tuning_seeds: number of runs by which a rate is chosen.
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
        if "tuned" in wanted and len(self.rates) < 2:
            raise ValueError("To choose the best rate, give another one than that of the recipe.")
        self._tuning_seeds = tuning_seeds
        self.problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        if len(self.tasks) < 2:
            raise ValueError("A comparison needs at least two tasks, which can share a group.")
        self._single_metrics: dict[str, dict[str, float]] | None = None
        self._tried_on = rehearse(recipe, relative=True) if is_own(recipe.data) else "cpu"
        self.refused: dict[str, str] = {}
        self.variants = [variant for variant in variants if self._can_work(variant, strict)]
        self._by_name = {variant.name: variant for variant in self.variants}
        self._folder = open_folder(self.out, recipe)
        check_source(self.out, recipe.data)

    def _can_work(self, variant: Variant, strict: bool) -> bool:
        """Whether the method can be set up, before hours are spent on the others.

        On a problem of the user's own, it is also trained on one batch.
        """
        try:
            # On the CPU if possible: the memory of a GPU is for the processes that train.
            settings = {**variant.settings, "device": self._tried_on}
            trainer = Trainer(self.recipe.replace(**settings))
            if is_own(self.recipe.data):
                rehearse_step(trainer, variant.title)
        except (ValueError, ImportError) as error:
            if strict:
                raise ValueError(f"{variant.title} cannot be compared here: {error}") from error
            self.refused[variant.title] = str(error)
            return False
        return True

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
            single = [self._single(task, seed) for seed in self._seeds for task in self.tasks]
            workers.run(BUDGETS["batches"], single + self._by("batches"), listen)
            self._single_metrics = None
            self._measure_costs(workers)
            if "time" in self.budgets:
                workers.run(BUDGETS["time"], self._by("time"), listen)
            if "tuned" in self.budgets:
                tuning = [
                    self._cell(variant, seed, "time", rate)
                    for seed in self._rate_seeds
                    for variant in self.variants
                    for rate in self.rates
                ]
                workers.run("choosing rates", tuning, listen)
                workers.run(BUDGETS["tuned"], self._by("tuned"), listen)
        return self.read(workers.failed)

    @property
    def _seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    @property
    def _rate_seeds(self) -> range:
        first = self.recipe.seed + _TUNING_SEEDS
        return range(first, first + self._tuning_seeds)

    def _by(self, budget: str) -> list[Cell]:
        """Seed by seed, so that a slow period of the machine affects all methods."""
        return [self._cell(v, seed, budget) for seed in self._seeds for v in self.variants]

    def _single(self, task: str, seed: int) -> Cell:
        """Single-task training: the baseline of Δm."""
        return Cell(f"single-{task}", self.recipe.replace(seed=seed, method="gd", tasks=(task,)))

    def _cell(self, variant: Variant, seed: int, budget: str, rate: float | None = None) -> Cell:
        settings: dict[str, Any] = {"seed": seed, **variant.settings}
        if budget != "batches":
            settings["batches"] = self._batches(variant)
        if rate is None and budget == "tuned":
            rate = self.best_rate(variant)
        if rate is not None and rate != self.recipe.lr:
            settings["lr"] = rate
            if self.recipe.head_lr is not None:
                settings["head_lr"] = rate * self.recipe.head_lr / self.recipe.lr
        return Cell(variant.name, self.recipe.replace(**settings))

    # What they cost.

    def _measure_costs(self, workers: Workers) -> None:
        """Measure the steps of new variants, side by side with joint training.

        The costs are kept, because a budget must stay the same when the comparison continues.
        """
        known = self._read_yaml("costs.yaml")
        if missing := [name for name in self._by_name if name not in known]:
            measured = dict.fromkeys([JOINT, *missing])
            seconds = workers.measure(
                {name: self.recipe.replace(**self._by_name[name].settings) for name in measured}
            )
            known |= {name: seconds[name] / seconds[JOINT] for name in missing}
            self._write_yaml("costs.yaml", known)

    def _cost(self, variant: Variant) -> float:
        """Time per batch relative to joint training; NaN if it is not known.

        This is the cost of a step times the steps per batch, the median over the seeds, because the
        number of groups differs from seed to seed.
        """
        step: float = self._read_yaml("costs.yaml").get(variant.name, math.nan)
        steps = median(
            result["steps_per_batch"]
            for result in self._runs(variant, "batches").values()
            if result["diverged"] is None
        )
        return step * (steps if math.isnan(steps) else max(1.0, steps))

    def _read_yaml(self, name: str) -> dict[str, Any]:
        file = self.out / name
        return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}

    def _write_yaml(self, name: str, values: dict[str, Any]) -> None:
        tg.recording.write_text(self.out / name, yaml.safe_dump(values, sort_keys=False))

    @property
    def _reference(self) -> Variant:
        """The variant whose time all others get: selective updates, or else joint training."""
        return self._by_name.get(REFERENCE, self._by_name[JOINT])

    def _batches(self, variant: Variant) -> int:
        """The batches that take the time of the reference.

        They are kept, because they must stay the same when the comparison continues.
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
        """The rate with the highest mean held-out Δm, over other seeds than those compared.

        Every method, joint training included, gets the rate that is really its best: a choice on a
        small validation set would add the luck of that choice. A rate at which a run diverged is
        not taken; if all rates are like that, the recipe's rate is.
        """
        best = (-math.inf, self.recipe.lr)
        for rate in self.rates:
            cells = (self._cell(variant, seed, "time", rate) for seed in self._rate_seeds)
            results = [result for cell in cells if (result := cell.read(self._folder)) is not None]
            delta = mean(self._delta(result, "held_out") for result in results)
            if delta > best[0]:  # False for NaN
                best = (delta, rate)
        return best[1]

    # What is read.

    def _runs(self, variant: Variant, budget: str) -> Runs:
        """The finished runs of a variant, by seed."""
        cells = {seed: self._cell(variant, seed, budget) for seed in self._seeds}
        results = {seed: cell.read(self._folder) for seed, cell in cells.items()}
        return {seed: result for seed, result in results.items() if result is not None}

    @property
    def single(self) -> dict[str, dict[str, float]]:
        """``{split: {task: mean metric}}`` of single-task training."""
        if self._single_metrics is None:
            found = {
                task: [self._single(task, seed).read(self._folder) for seed in self._seeds]
                for task in self.tasks
            }
            self._single_metrics = {
                split: {
                    task: mean(
                        result["metrics"][split][task]
                        for result in results
                        if result is not None and result["diverged"] is None
                    )
                    for task, results in found.items()
                }
                for split in self.problem.splits
            }
        return self._single_metrics

    def delta(self, result: Result) -> float | None:
        """Held-out Δm of one run, in percent; None until the baselines are finished."""
        if any(math.isnan(value) for value in self.single["held_out"].values()):
            self._single_metrics = None  # to be read again
            return None
        return self._delta(result, "held_out")

    def _delta(self, result: Result, split: str) -> float:
        return delta_of(result, split, self.single, self.problem)

    def read(self, failed: Sequence[str] = ()) -> Table:
        """Read the results of the finished runs; ``failed`` are the errors of the others."""
        self._single_metrics = None
        runs = {
            variant.name: {budget: self._runs(variant, budget) for budget in self.budgets}
            for variant in self.variants
        }
        cost = {variant.name: self._cost(variant) for variant in self.variants}
        rows = [
            make_row(
                variant,
                runs[variant.name],
                runs[variant.against],
                self.problem.splits,
                self._delta,
                time=cost[variant.name] / cost[variant.against],
                rate=self.best_rate(variant) if "tuned" in self.budgets else None,
                batches={
                    budget: self._cell(variant, self.recipe.seed, budget).recipe.batches
                    for budget in self.budgets
                },
            )
            for variant in self.variants
        ]
        return Table(
            recipe=self.recipe,
            problem=self.problem,
            tasks=self.tasks,
            seeds=self.seeds,
            rates=self.rates,
            budgets=self.budgets,
            reference=self._reference.title,
            rows=rows,
            single=self.single,
            refused=self.refused,
            failed=list(failed),
        )
