"""What a data set offers to a training run, and where those that ship are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

import taskgroup as tg

__all__ = ["IN_MEMORY", "Problem", "data_names", "where"]

# Imported when asked for: each needs libraries of its own.
_WHERE = {
    "motorcycle": ("taskgroup.lab.data.dense_problems", "MotorcycleProblem"),
    "yeast": ("taskgroup.lab.data.yeast", "Yeast"),
    "nyud-v2": ("taskgroup.lab.data.dense_problems", "BenchmarkProblem"),
    "pascal-context": ("taskgroup.lab.data.dense_problems", "BenchmarkProblem"),
    "taskonomy": ("taskgroup.lab.data.dense_problems", "BenchmarkProblem"),
}


#: Those that are not read from a folder.
IN_MEMORY = ("motorcycle", "yeast")


class Problem(Protocol):
    """A data set with its tasks, network, losses and metrics.

    Attributes:
        titles: ``{task: name}`` as shown, all tasks of the data set in their order.
        lower_is_better: ``{task: whether a smaller metric is the better one}``.
        metrics: ``{task: what its metric is}``, in a word or two.
        score: from ``{task: loss}`` to ``{task: score}`` in (0, 1), higher is better; None where
            the losses give no such score.
        splits: what can be evaluated: ``"train"`` (fixed training data), ``"held_out"``, and
            ``"validation"`` where there is data to choose settings on.
    """

    titles: Mapping[str, str]
    lower_is_better: Mapping[str, bool]
    metrics: Mapping[str, str]
    score: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None
    splits: Sequence[str]

    def model(self, tasks: Sequence[str]) -> tg.MultiTaskModel:
        """A fresh network for some of the tasks, from torch's global generator."""
        ...

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Any]:
        """An endless stream of random training batches, from one on.

        What batch n holds follows from the seed and n alone. Batches are tuples, lists and dicts of
        tensors on the CPU.
        """
        ...

    def inputs(self, batch: Any) -> Tensor:
        """What of a batch the model is called with."""
        ...

    def losses(self, outputs: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """``{task: scalar}`` for the tasks of the outputs."""
        ...

    def evaluate(self, model: nn.Module, split: str, quick: bool = False) -> dict[str, float]:
        """``{task: metric}`` over all of a split; ``quick`` may leave out what takes long."""
        ...

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Pictures of what the model predicts, where the data has any."""
        ...

    def keep(self, model: nn.Module, folder: Path) -> None:
        """Write what it takes, besides the settings, to build the network again."""
        ...

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """A picture of what the model predicts for an image file."""
        ...


def data_names() -> list[str]:
    """The data sets that ship with the package."""
    return list(_WHERE)


def where(data: str) -> tuple[str, str]:
    """The module and the name of the class of a data set that ships with the package."""
    return _WHERE[data]
