"""What a data set offers to a training run, and the one that a recipe names."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

import taskgroup as tg
from taskgroup.lab.recipe import PROBLEMS, Recipe

__all__ = ["Batch", "Problem", "make_problem"]

#: A batch of a data set: a tuple, list or dict of tensors. Only the data set knows which.
Batch: TypeAlias = Any


class Problem(Protocol):
    """A data set with its tasks, network, losses and metrics.

    A class may derive from this one, and then leaves out what has a default.

    Attributes:
        titles: ``{task: name as shown}`` for all tasks of the data set, in their order.
        lower_is_better: ``{task: whether a smaller metric is better}``.
        metrics: ``{task: name of its metric}``.
        score: a function from ``{task: loss}`` to ``{task: score}`` in (0, 1), higher is better;
            None, the default, if the losses give no such score.
        splits: the splits that can be evaluated: ``"train"`` (fixed training data) and
            ``"held_out"``, the default, and ``"validation"`` if there is data to choose settings
            on.
    """

    titles: Mapping[str, str]
    lower_is_better: Mapping[str, bool]
    metrics: Mapping[str, str]
    score: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None
    splits: Sequence[str] = ("train", "held_out")

    def __init__(self, settings: Recipe) -> None:
        """Take the settings of the run; the default ignores them."""

    def model(self, tasks: Sequence[str]) -> tg.MultiTaskModel:
        """A new network for some of the tasks, initialised by torch's global generator."""
        ...

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """An endless stream of random training batches that begins with batch ``start``.

        Batch n depends on the seed and n alone. Its tensors are on the CPU.
        """
        ...

    def inputs(self, batch: Batch) -> Tensor:
        """The part of a batch that the model is called with; the default is ``batch[0]``."""
        inputs: Tensor = batch[0]
        return inputs

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """``{task: scalar loss}`` for the tasks of the outputs."""
        ...

    def evaluate(self, model: nn.Module, split: str, quick: bool = False) -> dict[str, float]:
        """``{task: metric}`` over all of a split; ``quick`` may leave out slow metrics."""
        ...

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Write pictures of what the model predicts; the default writes none."""

    def keep(self, model: nn.Module, folder: Path) -> None:
        """Write what is needed, besides the settings, to build the network again."""

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """Write a picture of what the model predicts for an image file.

        Raises:
            ValueError: by default, because the data are not images.
        """
        raise ValueError("taskgroup predict draws images, and this run was not trained on images.")


def make_problem(recipe: Recipe) -> Problem:
    """The data set that a recipe names, with the recipe's settings.

    Raises:
        ImportError: if a library that it needs is missing; the sentence says what to install.
    """
    # Imported when it is asked for: each data set needs libraries of its own.
    made = pkgutil.resolve_name(f"taskgroup.lab.data.{PROBLEMS[recipe.data]}")(recipe)
    problem: Problem = made
    return problem
