"""The embedded photograph as a problem to train on: eleven dense tasks of one scene."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import taskgroup as tg
from taskgroup.lab.data import Resize, Scene
from taskgroup.lab.data.files import read_photo
from taskgroup.lab.data.motorcycle import Motorcycle
from taskgroup.lab.data.samples import Samples
from taskgroup.lab.train.recipe import Recipe
from taskgroup.lab.vision import pictures
from taskgroup.lab.vision.dense_losses import criterion
from taskgroup.lab.vision.metrics import evaluate
from taskgroup.lab.vision.models import vit
from taskgroup.lab.vision.tasks import TASKONOMY

__all__ = ["Photograph"]

_TRAINING_CROPS = 64  # that the training metrics are computed on
_PICTURED = 4  # held-out crops in predictions.png
_ROWS = 250  # of the photograph


class Photograph:
    """The crops of :class:`~taskgroup.lab.vision.Motorcycle` and the network of the published runs.

    Metrics are errors. The losses are distances without an upper bound, so there is no score in
    (0, 1).

    Args:
        settings: size of the crops and of the network.
    """

    titles: Mapping[str, str] = {name: task.title for name, task in TASKONOMY.items()}
    lower_is_better: Mapping[str, bool] = dict.fromkeys(TASKONOMY, True)
    metrics: Mapping[str, str] = {name: task.metric_name for name, task in TASKONOMY.items()}
    score = None
    splits = ("train", "held_out")

    def __init__(self, settings: Recipe) -> None:
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

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Samples]:
        """Random crops from both sides of the held-out band."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (self.scene.sample(batch_size, generator) for _ in count())
        return islice(drawn, start, None)

    def inputs(self, batch: Samples) -> Tensor:
        """The images ``[B, 3, H, W]``."""
        return batch.images

    def losses(self, outputs: Mapping[str, Tensor], batch: Samples) -> dict[str, Tensor]:
        """The masked losses of the published Taskonomy runs."""
        return criterion(outputs, batch.labels, batch.masks)

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Input, target and prediction on some held-out crops: ``predictions.png``."""
        held_out = self.scene.held_out()
        last = len(held_out.images) - 1
        rows = torch.linspace(0, last, _PICTURED, dtype=torch.float32, device="cpu").round().long()
        some: Samples = tree_map(lambda tensor: tensor[rows], held_out)
        rgb = (some.images + 1) / 2
        pictures.draw(model, some, rgb, TASKONOMY, folder / "predictions.png")

    def keep(self, model: nn.Module, folder: Path) -> None:
        """Nothing: the settings say it all."""

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """A panel of all predictions for an image file, as a PNG; sides are cut to whole patches.

        Large images are brought down to the 250 rows that the photograph has.
        """
        photo = read_photo(image)
        scale = min(1.0, _ROWS / photo.shape[0])
        patch = self._settings.patch
        size = tuple(max(patch, round(n * scale) // patch * patch) for n in photo.shape[:2])
        scene = Resize((size[0], size[1]))(Scene(photo, {}, {}), np.random.default_rng(0))
        rgb = torch.from_numpy(scene.image.copy()).movedim(-1, 0).float() / 255
        pictures.draw_panel(model, 2 * rgb - 1, rgb, TASKONOMY, out)

    def evaluate(self, model: nn.Module, split: str, quick: bool = False) -> dict[str, float]:
        """The error of every task on the fixed crops of a split."""
        return evaluate(model, _crops(self._settings.size, split))


@cache  # runs of one process share it
def _scene(size: tuple[int, int]) -> Motorcycle:
    return Motorcycle(size)


@cache
def _crops(size: tuple[int, int], split: str) -> Samples:
    scene = _scene(size)
    return scene.held_out() if split == "held_out" else scene.fixed_train(_TRAINING_CROPS)
