"""The time that steps and batches of each method take, measured side by side."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping

import torch
from torch import nn

import taskgroup as tg
from taskgroup.lab.processes import alone
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.train.trainer import Trainer

__all__ = ["Course", "courses", "head_share", "step_seconds"]

_AT_A_TIME = 5  # batches of a turn
_MOST = 500  # batches of each recipe


@dataclasses.dataclass(frozen=True)
class Course:
    """What the batches of a run take.

    Attributes:
        warmup: batches in which every task is a group; 0 for a method that has no warm-up.
        first: seconds of a batch of the warm-up; that of a later one if there is none.
        later: seconds of a batch after it; NaN if the run failed before.
        steps: optimizer steps of a batch after the warm-up.

    Example:
        >>> course = Course(warmup=10, first=4.0, later=1.0, steps=3.0)
        >>> course.seconds(30), course.batches(60.0), course.batches(20.0)
        (60.0, 30.0, 5.0)
    """

    warmup: int
    first: float
    later: float
    steps: float

    def seconds(self, batches: float) -> float:
        """The seconds that so many batches take."""
        early = min(self.warmup, batches)
        return early * self.first + (batches - early) * self.later

    def batches(self, seconds: float) -> float:
        """The batches that take so many seconds."""
        early = self.warmup * self.first
        return (
            seconds / self.first
            if seconds < early
            else self.warmup + (seconds - early) / self.later
        )


def step_seconds(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Seconds per optimizer step of each recipe, including everything else that a batch takes.

    On the CPU this is processor time of the calling thread; other threads of the process, such as
    those of a cluster's worker, do not count. On a GPU it is the time between events on its stream,
    idle time included; they are read later, so the measurement adds no synchronisation.

    The recipes take turns, a few batches each, from the beginning of a run to its end (or to batch
    500). So the groups that they form are those of real runs, and a machine that is slow for a
    while is slow for all recipes. Runs minutes or days apart could not be compared. A recipe that
    diverges or fails at once gets NaN.
    """
    with alone():
        return _step_seconds(recipes)


def _step_seconds(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    seconds = {}
    for name, phases in _timed(recipes, dict.fromkeys(recipes, _MOST)).items():
        steps = sum(phase.steps for phase in phases)
        seconds[name] = sum(phase.seconds for phase in phases) / steps if steps else math.nan
    return seconds


def courses(recipes: Mapping[str, Recipe], batches: int) -> dict[str, Course]:
    """What the batches of each recipe take; clocks and turns are those of :func:`step_seconds`.

    The warm-up and so many ``batches`` after it are measured, up to the end of the run.
    """
    with alone():
        most = {name: recipe.warmup + batches for name, recipe in recipes.items()}
        timed = _timed(recipes, most)
    found = {}
    for name, (warmup, later) in timed.items():
        known = later if later.batches else warmup  # a run may end before its warm-up
        early = warmup if warmup.batches else later
        found[name] = Course(
            warmup=recipes[name].warmup if warmup.batches else 0,
            first=early.per_batch,
            later=known.per_batch,
            steps=known.steps / known.batches if known.batches else math.nan,
        )
    return found


def head_share(recipe: Recipe) -> float:
    """The share of a joint step that the heads take, from 0 to 1, by :func:`taskgroup.step_costs`.

    It is measured on the first batch of a run.
    """
    with alone():
        trainer = Trainer(recipe.replace(method="joint", workers=0))
        batch = next(trainer.batches)
        modules = {
            task: head for task, head in trainer.parts.heads.items() if isinstance(head, nn.Module)
        }
        half = recipe.precision == "bfloat16"
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=half):
            costs = tg.step_costs(
                trainer.model,
                trainer.problem.inputs(batch),
                lambda outputs: trainer.losses(outputs, batch),
                torch.optim.Adam(trainer.model.parameters(), fused=True),
                heads=modules if len(modules) == len(trainer.tasks) else None,
            )
    return costs.head_share


@dataclasses.dataclass
class _Phase:
    """Batches of one recipe that were timed."""

    seconds: float = 0.0
    steps: int = 0
    batches: int = 0

    @property
    def per_batch(self) -> float:
        return self.seconds / self.batches if self.batches else math.nan


def _timed(
    recipes: Mapping[str, Recipe], most: Mapping[str, int]
) -> dict[str, tuple[_Phase, _Phase]]:
    """The batches in the warm-up and those after it, of up to ``most`` batches of each recipe."""
    trainers = {name: Trainer(recipe.replace(workers=0)) for name, recipe in recipes.items()}
    phases = {name: (_Phase(), _Phase()) for name in recipes}
    seconds: dict[str, dict[str, float]] = {name: {} for name in recipes}
    clocks = {
        name: tg.recording.Clock(seconds[name], trainer.device, time.thread_time)
        for name, trainer in trainers.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # losses that diverge warn
        for trainer in trainers.values():
            _step(trainer)  # allocates, so it is not timed
        for _ in range(math.ceil(max(most.values()) / _AT_A_TIME)):
            for name, trainer in trainers.items():
                clocks[name].start()
                for _ in range(min(_AT_A_TIME, most[name] - trainer.batch)):
                    if not (steps := _step(trainer)):
                        break
                    warm = trainer.groups.warming_up
                    clocks[name].lap("warmup" if warm else "later")
                    phase = phases[name][0 if warm else 1]
                    phase.batches += 1
                    phase.steps += steps
                clocks[name].read()
    for name, clock in clocks.items():
        clock.read(wait=True)
        for phase, key in zip(phases[name], ("warmup", "later"), strict=True):
            phase.seconds = seconds[name].get(key, 0.0)
    return phases


def _step(trainer: Trainer) -> int:
    """Train on a batch; the steps taken, one if it found no weights, and 0 after the last batch."""
    if trainer.batch == trainer.recipe.batches:
        return 0
    try:
        return max(1, len(trainer.step().groups))
    except Exception:  # its own run reports the error; the others are still measured
        return 0
