"""When group steps pay: what they gain at equal time, over the heads' share of a joint step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import yaml

import taskgroup as tg
from taskgroup.lab.problem import Problem, make_problem
from taskgroup.lab.recipe import NetworkSettings, Recipe, is_own, read_recipe
from taskgroup.lab.studies.cell import Cell, Result, open_folder
from taskgroup.lab.studies.cost import Course, courses, head_share
from taskgroup.lab.studies.head_share_points import Point, joint_sizes, kinds, shipped_points
from taskgroup.lab.studies.intervals import Estimate, estimate, noise_floor
from taskgroup.lab.studies.presets import JOINT, Variant
from taskgroup.lab.studies.results import delta_of, mean, steps_per_batch
from taskgroup.lab.studies.workers import Listener, Workers
from taskgroup.lab.train.rehearsal import rehearse
from taskgroup.lab.train.source import check_source
from taskgroup.lab.train.trainer import Trainer, task_names
from taskgroup.lab.user_code import in_words

__all__ = ["HeadShare", "KindRow", "PointRow", "Shares"]

_STUDY = "study.yaml"
_MEASURED = 60  # batches of every kind after its warm-up, from which its later ones are reckoned


@dataclasses.dataclass(frozen=True)
class KindRow:
    """What one kind of training gained at a point.

    Attributes:
        variant: the kind.
        batches: that it got.
        time: seconds that its runs took by what their steps take, relative to what all kinds got;
            the median over the seeds. It is 1 unless the number of groups changed later on.
        steps: optimizer steps of a batch, the mean over the seeds.
        gain: mean gain over the tasks in percent of the best joint training, minus that of the best
            joint training with the same seed.
        verdict: ``"better"`` or ``"worse"`` if the gain is outside both its interval and the noise
            floor, else ``""``.
        diverged: number of runs that diverged.
    """

    variant: Variant
    batches: int
    time: float
    steps: float
    gain: Estimate
    verdict: str
    diverged: int


@dataclasses.dataclass(frozen=True)
class PointRow:
    """What was found at a point.

    Attributes:
        point: what differs from the recipe.
        share: of a joint step that the heads take, from 0 to 1.
        seconds: of a batch of joint training with the batch size of the recipe.
        joint: the joint training that the others are compared with, at its best batch size.
        floor: the noise floor of a gain, from the runs of that joint training.
        kinds: a row for each kind, joint training at each batch size first.
    """

    point: Point
    share: float
    seconds: float
    joint: Variant
    floor: float
    kinds: list[KindRow]


@dataclasses.dataclass(frozen=True)
class Shares:
    """What the study found.

    Attributes:
        problem: the data set.
        recipe: what all runs start from.
        tasks: that were trained.
        seeds: their number.
        points: from the lightest heads to the heaviest.
    """

    problem: Problem
    recipe: Recipe
    tasks: list[str]
    seeds: int
    points: list[PointRow]


class HeadShare:
    """Trains networks with lighter and heavier heads jointly and in groups, for equal time.

    The points are networks that differ in their heads, and maybe in their encoder. At each of them,
    the heads' share of a joint step is measured, and what the batches of every kind of training
    take: joint training at the batch size of the recipe, a half and a quarter of it; selective
    updates with learned groups, with random groups, and with a group per task, observed in every
    batch and in every tenth; and joint steps that use each batch several times. Then every kind
    gets as many batches as take the time of the recipe's number of joint batches. All are compared
    with joint training at the batch size at which it is best, in the mean over the same seeds. So
    the choice favours joint training, if anything.

    The folder holds ``base.yaml``, the recipe; ``study.yaml``, the points and what was measured;
    and ``cells/``, a small file per finished run. Finished runs are not run again, and what was
    measured is not measured again, so a study can be stopped, and more seeds or points added.

    Args:
        recipe: what all points start from.
        seeds: number of runs of every kind at every point.
        out: the folder.
        points: None takes those that ship for the data set.

    Raises:
        ValueError: for fewer than two points, fewer than three tasks, no seed, a point that changes
            more than the network, or a folder of something else.
    """

    def __init__(
        self, recipe: Recipe, seeds: int, out: str | Path, points: Sequence[Point] | None = None
    ) -> None:
        if seeds < 1:
            raise ValueError(f"A difference needs at least one seed, got {seeds}.")
        if recipe.batches < 2:
            raise ValueError("Equal time needs at least two batches; the first is not timed.")
        self.recipe = recipe.replace(batch_repeats=1)
        self.seeds = seeds
        self.out = Path(out)
        self.points = list(shipped_points(recipe) if points is None else points)
        _check_points(recipe, self.points)
        self.problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        self.kinds = kinds(recipe, self.tasks)
        if is_own(recipe.data):
            for point in self.points:
                rehearse(recipe.replace(**point.settings), relative=True)
        else:
            for point in self.points:  # before hours are spent on the others
                Trainer(recipe.replace(**point.settings, device="cpu"))
        self._folder = open_folder(self.out, self.recipe)
        check_source(self.out, recipe.data)
        self._measured = self._known()

    @classmethod
    def read_from(cls, folder: str | Path) -> Shares:
        """Read the results of a study whose runs are all finished.

        Raises:
            ValueError: if the folder holds no such study.
        """
        folder = Path(folder)
        if not (folder / _STUDY).is_file():
            raise ValueError(f"{folder} holds no study of taskgroup head-share.")
        study = yaml.safe_load((folder / _STUDY).read_text())
        recipe = read_recipe(folder / "base.yaml", {"seed": study["seed"]})
        points = [Point(title, known["settings"]) for title, known in study["points"].items()]
        return cls(recipe, study["seeds"], folder, points).read()

    def run(
        self,
        listen: Listener = lambda *_: None,
        jobs: int | None = None,
        executor: Executor | None = None,
    ) -> Shares:
        """Run what is missing, and compare; arguments and errors as of ``Comparison.run``.

        Raises:
            RuntimeError: also if a run failed; finished runs are kept.
        """
        with (
            tg.recording.hold(self.out),
            Workers(self._folder, self.recipe, executor, jobs) as workers,
        ):
            asked = [_Asked(point, self._recipes(point)) for point in self.unmeasured]
            for done, measured in workers.call(_measure, asked):
                self._keep(done.point, measured)
            self._write()
            workers.run("equal time", self._cells(), listen)
        if workers.failed:
            raise RuntimeError(
                f"{len(workers.failed)} runs failed; the others are kept, and the same command "
                f"runs these again. The first error: {workers.failed[0]}"
            )
        return self.read()

    # What is measured, and the budgets that follow from it.

    @property
    def unmeasured(self) -> list[Point]:
        """The points whose costs are not known yet."""
        return [point for point in self.points if point.title not in self._measured]

    def _recipes(self, point: Point) -> dict[str, Recipe]:
        at = self.recipe.replace(**point.settings)
        return {kind.name: at.replace(**kind.settings) for kind in self.kinds}

    def _known(self) -> dict[str, dict[str, Any]]:
        """What the folder says of its points; it stays the same when the study continues."""
        file = self.out / _STUDY
        known: dict[str, dict[str, Any]] = {}
        if file.is_file():
            known = yaml.safe_load(file.read_text())["points"]
        for point in self.points:
            there = known.get(point.title)
            if there is not None and there["settings"] != dict(point.settings):
                raise ValueError(
                    f"{self.out} holds another point {point.title!r}, with {there['settings']}; "
                    "name another folder with --out."
                )
            if there is not None and any(kind.name not in there["batches"] for kind in self.kinds):
                del known[point.title]
        return known

    def _keep(self, point: Point, measured: _Measured) -> None:
        """Keep the budgets of a point: batches that take the time of the joint ones."""
        found = measured.courses
        seconds = found[JOINT].seconds(self.recipe.batches)
        self._measured[point.title] = {
            "settings": dict(point.settings),
            "share": measured.share,
            "seconds": found[JOINT].later,
            "batches": {name: _batches(course, seconds) for name, course in found.items()},
            "courses": {name: dataclasses.asdict(course) for name, course in found.items()},
        }
        self._write()

    def _write(self) -> None:
        study = {"seed": self.recipe.seed, "seeds": self.seeds, "points": self._measured}
        tg.recording.write_text(self.out / _STUDY, yaml.safe_dump(study, sort_keys=False))

    # The runs.

    @property
    def _seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    def _cell(self, point: Point, kind: Variant, seed: int) -> Cell:
        batches = self._measured[point.title]["batches"][kind.name]
        settings = {**point.settings, **kind.settings, "batches": batches, "seed": seed}
        return Cell(kind.name, self.recipe.replace(**settings))

    def _cells(self) -> list[Cell]:
        return [
            self._cell(point, kind, seed)
            for seed in self._seeds
            for point in self.points
            for kind in self.kinds
        ]

    # What is read.

    def read(self) -> Shares:
        """Read the results.

        Raises:
            ValueError: if a run is not finished.
        """
        if self.unmeasured:
            raise ValueError(f"{self.out} is not finished; start the command that began it again.")
        rows = [self._row(point) for point in self.points]
        return Shares(
            problem=self.problem,
            recipe=self.recipe,
            tasks=self.tasks,
            seeds=self.seeds,
            points=sorted(rows, key=lambda row: row.share),
        )

    def _results(self, point: Point, kind: Variant) -> dict[int, Result]:
        results = {}
        for seed in self._seeds:
            result = self._cell(point, kind, seed).read(self._folder)
            if result is None:
                raise ValueError(
                    f"{self.out} is not finished; start the command that began it again."
                )
            results[seed] = result
        return results

    def _row(self, point: Point) -> PointRow:
        results = {kind.name: self._results(point, kind) for kind in self.kinds}
        joint = self._best(results)
        baseline = self._means(results[joint.name])

        def deltas(kind: str) -> dict[int, float]:
            found = {seed: self._delta(result, baseline) for seed, result in results[kind].items()}
            return {seed: delta for seed, delta in found.items() if math.isfinite(delta)}

        others = deltas(joint.name)
        floor = noise_floor(list(others.values()))
        rows = []
        for kind in self.kinds:
            own = deltas(kind.name)
            gain = estimate([own[seed] - others[seed] for seed in own if seed in others])
            rows.append(
                KindRow(
                    variant=kind,
                    batches=self._measured[point.title]["batches"][kind.name],
                    time=self._time(point, kind, results[kind.name]),
                    steps=mean(result["steps_per_batch"] for result in results[kind.name].values()),
                    gain=gain,
                    verdict="" if kind == joint else gain.verdict(floor),
                    diverged=sum(r["diverged"] is not None for r in results[kind.name].values()),
                )
            )
        known = self._measured[point.title]
        return PointRow(point, known["share"], known["seconds"], joint, floor, rows)

    def _best(self, results: Mapping[str, Mapping[int, Result]]) -> Variant:
        """Joint training at its best batch size, by the mean gain over that of the recipe.

        A size at which a run diverged is not taken, unless all sizes are like that.
        """
        sizes = joint_sizes(self.kinds)
        baseline = self._means(results[sizes[0].name])
        best = (-math.inf, sizes[0])
        for size in sizes:
            delta = mean(self._delta(result, baseline) for result in results[size.name].values())
            if delta > best[0]:  # False for NaN
                best = (delta, size)
        return best[1]

    def _means(self, results: Mapping[int, Result]) -> dict[str, float]:
        """The mean held-out metric of each task over the runs that did not diverge."""
        found = [r["metrics"]["held_out"] for r in results.values() if r["diverged"] is None]
        return {task: mean(metrics[task] for metrics in found) for task in self.tasks}

    def _delta(self, result: Result, baseline: Mapping[str, float]) -> float:
        return delta_of(result, "held_out", baseline, self.problem)

    def _time(self, point: Point, kind: Variant, results: Mapping[int, Result]) -> float:
        """The time of the runs, from their median number of steps, relative to the budget."""
        known = self._measured[point.title]
        course = Course(**known["courses"][kind.name])
        batches: int = known["batches"][kind.name]
        early = min(course.warmup, batches)
        later = steps_per_batch(results) * batches - early * len(self.tasks)
        taken: float = course.seconds(early) + later * course.later / course.steps
        return taken / Course(**known["courses"][JOINT]).seconds(self.recipe.batches)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A point that is to be measured, and the recipe of each kind there."""

    point: Point
    recipes: Mapping[str, Recipe]


@dataclasses.dataclass(frozen=True)
class _Measured:
    share: float
    courses: Mapping[str, Course]


def _measure(asked: _Asked) -> _Measured:
    """Measure a point, in whatever process calls it."""

    def measure() -> _Measured:
        return _Measured(head_share(asked.recipes[JOINT]), courses(asked.recipes, _MEASURED))

    data = asked.recipes[JOINT].data
    return in_words(f"{data} fails", measure) if is_own(data) else measure()


def _batches(course: Course, seconds: float) -> int:
    """The batches of a run that takes so many seconds; two for a kind that cannot be trained."""
    batches = course.batches(seconds)
    return max(2, round(batches)) if math.isfinite(batches) else 2


def _check_points(recipe: Recipe, points: Sequence[Point]) -> None:
    if len(points) < 2:
        raise ValueError(
            f"Two points at least make a line, got {len(points)}: give each with --point, such as "
            "--point head_depth=0 --point head_depth=2,head_width=256."
        )
    network = set(NetworkSettings.model_fields) - {"device", "precision"}
    for point in points:
        if wrong := sorted(set(point.settings) - network):
            raise ValueError(
                f"Points differ in the network alone, and {', '.join(wrong)} is no setting of it; "
                "give it to all points with --set."
            )
        recipe.replace(**point.settings)  # raises before the runs if a value is wrong
    networks = [recipe.replace(**point.settings) for point in points]
    titles = [point.title for point in points]
    for k, title in enumerate(titles):
        if networks[k] in networks[:k]:
            raise ValueError(
                f"The points {titles[networks.index(networks[k])]!r} and {title!r} are the same "
                "network; leave one out."
            )
