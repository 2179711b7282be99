"""The time that a step of each method takes, measured side by side."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping

import taskgroup as tg
from taskgroup.lab.processes import alone
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.train.trainer import Trainer

__all__ = ["step_seconds"]

_AT_A_TIME = 5  # batches of a turn
_MOST = 500  # batches of each recipe


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
    trainers = {name: Trainer(recipe.replace(workers=0)) for name, recipe in recipes.items()}
    seconds = dict.fromkeys(recipes, 0.0)
    steps = dict.fromkeys(recipes, 0)
    clocks = {
        name: tg.recording.Clock(seconds, trainer.device, time.thread_time)
        for name, trainer in trainers.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # losses that diverge warn
        for trainer in trainers.values():
            _train(trainer, 1)  # allocates, so it is not timed
        for _ in range(_MOST // _AT_A_TIME):
            for name, trainer in trainers.items():
                clocks[name].start()
                if taken := _train(trainer, _AT_A_TIME):
                    clocks[name].lap(name)
                    steps[name] += taken
                clocks[name].read()
    for clock in clocks.values():
        clock.read(wait=True)
    return {name: seconds[name] / steps[name] if steps[name] else math.nan for name in recipes}


def _train(trainer: Trainer, batches: int) -> int:
    """Train on some batches, up to the end of the run; the steps taken, at least one per batch."""
    steps = 0
    for _ in range(min(batches, trainer.recipe.batches - trainer.batch)):
        try:
            steps += max(1, len(trainer.step().groups))
        except Exception:  # its own run reports the error; the others are still measured
            break
    return steps
