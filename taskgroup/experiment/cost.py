"""What a step of each method takes, measured side by side."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Mapping

from taskgroup.experiment.recipe import Recipe
from taskgroup.experiment.trainer import Trainer

__all__ = ["step_seconds"]

_ROUNDS = 5
_BATCHES = 8  # of each recipe in a round


def step_seconds(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Processor seconds of an optimizer step by each recipe, all that it takes included.

    The recipes take turns, some batches each, round after round, and the median of the rounds
    counts: a machine that is faster at one time than at another is so for all of them. (The runs of
    a comparison, minutes or days apart, would not do.)

    Args:
        recipes: by name.

    Returns:
        ``{name: seconds}``; NaN for one that diverges at once.
    """
    trainers = {name: Trainer(recipe) for name, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that diverge
        for round_ in range(1 + _ROUNDS):
            for name, trainer in trainers.items():
                try:
                    taken = _seconds_per_step(trainer)
                except FloatingPointError:
                    taken = math.nan
                if round_:  # the first one allocates
                    seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _seconds_per_step(trainer: Trainer) -> float:
    steps = 0
    started = time.process_time()
    for _ in range(_BATCHES):
        steps += max(1, len(trainer.step().groups))
    return (time.process_time() - started) / steps
