"""What a step of each method takes, measured side by side."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping

from taskgroup.lab.train.clock import Clock
from taskgroup.lab.train.recipe import Recipe
from taskgroup.lab.train.trainer import Trainer

__all__ = ["step_seconds"]

_AT_A_TIME = 5  # batches
_MOST = 500  # batches of each recipe


def step_seconds(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Seconds of an optimizer step by each recipe, all that a batch takes included.

    Of the processor; on a GPU by events on its stream, idle time included, which are read later and
    so take no synchronisation that training does without.

    The recipes take turns, a few batches each, from the beginning of a run to its end (or to batch
    500), so that the groups they form are those of real runs, and a machine that is faster at one
    time than at another is so for all of them. Runs that are minutes or days apart would not do.

    Args:
        recipes: by name.

    Returns:
        ``{name: seconds}``; NaN for one that diverges or fails at once.
    """
    trainers = {name: Trainer(recipe.replace(workers=0)) for name, recipe in recipes.items()}
    seconds = dict.fromkeys(recipes, 0.0)
    steps = dict.fromkeys(recipes, 0)
    clocks = {
        name: Clock(seconds, trainer.device, time.process_time)
        for name, trainer in trainers.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that diverge
        for trainer in trainers.values():
            _train(trainer, 1)  # which allocates
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
    """The steps of so many batches, to the end of the run at most; at least one a batch."""
    steps = 0
    for _ in range(min(batches, trainer.recipe.batches - trainer.batch)):
        try:
            steps += max(1, len(trainer.step().groups))
        except Exception:  # its run says what is wrong; the others are measured on
            break
    return steps
