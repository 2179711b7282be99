"""The embedded photograph as a problem to train on: eleven dense tasks of one scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskgroup as tg
from taskgroup.report import plots
from taskgroup.vision.losses import criterion
from taskgroup.vision.metrics import evaluate
from taskgroup.vision.models import vit
from taskgroup.vision.motorcycle import Motorcycle, Samples
from taskgroup.vision.tasks import TASKONOMY

__all__ = ["Photograph"]

_TRAINING_CROPS = 64  # that the training metrics are computed on
_PICTURED = 4  # held-out crops in predictions.png


class Settings(Protocol):
    """What the network and the crops are made by."""

    size: int
    patch: int
    dim: int
    depth: int
    attention_heads: int
    dropout: float


class Photograph:
    """The crops of :class:`~taskgroup.vision.Motorcycle` and the network of the published runs.

    Metrics are errors. The losses are distances without an upper bound, so there is no score in
    (0, 1).

    Args:
        settings: size of the crops and of the network.
    """

    titles: Mapping[str, str] = {name: task.title for name, task in TASKONOMY.items()}
    lower_is_better = True
    metric = "error"
    score = None
    splits = ("train", "held_out")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.scene = _scene(settings.size)

    def model(self, tasks: Sequence[str]) -> tg.MultiTaskModel:
        """The ViT with a head for each of the tasks."""
        settings = self._settings
        return vit(
            tasks,
            size=settings.size,
            patch=settings.patch,
            dim=settings.dim,
            depth=settings.depth,
            attention_heads=settings.attention_heads,
            dropout=settings.dropout,
        )

    def sample(self, batch_size: int, generator: torch.Generator) -> Samples:
        """Random crops from both sides of the held-out band."""
        return self.scene.sample(batch_size, generator)

    def inputs(self, batch: Samples) -> Tensor:
        """The images ``[B, 3, H, W]``."""
        return batch.images

    def losses(self, outputs: Mapping[str, Tensor], batch: Samples) -> dict[str, Tensor]:
        """The masked losses of the published Taskonomy runs."""
        return criterion(outputs, batch.labels, batch.masks)

    @torch.no_grad()
    def draw(self, model: nn.Module, folder: Path) -> None:
        """Input, target and prediction on some held-out crops: ``predictions.png``."""
        held_out = self.scene.held_out()
        some = torch.linspace(0, len(held_out.images) - 1, _PICTURED).round().long()
        training = model.training
        outputs = model.eval()(held_out.images[some])
        model.train(training)
        if "normal" in outputs:
            outputs["normal"] = F.normalize(outputs["normal"], dim=1)
        plots.predictions(
            held_out.images[some],
            {task: held_out.labels[task][some] for task in outputs},
            {task: held_out.masks[task][some] for task in outputs},
            outputs,
            {task: self.titles[task] for task in outputs},
            folder / "predictions.png",
        )

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The error of every task on the fixed crops of a split."""
        return evaluate(model, _crops(self._settings.size, split))


@cache  # runs of one process share it
def _scene(size: int) -> Motorcycle:
    return Motorcycle(size)


@cache
def _crops(size: int, split: str) -> Samples:
    scene = _scene(size)
    return scene.held_out() if split == "held_out" else scene.fixed_train(_TRAINING_CROPS)
