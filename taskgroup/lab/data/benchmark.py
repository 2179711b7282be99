"""The paper's benchmarks as problems to train on: NYUD-v2, PASCAL-Context and Taskonomy."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import taskgroup as tg
from taskgroup.lab.data import (
    DATASETS,
    Augment,
    BadSampleError,
    DenseDataset,
    Fit,
    Resize,
    Scene,
    Taskonomy,
    all_batches,
    training_batches,
)
from taskgroup.lab.data.dense import Transform
from taskgroup.lab.data.files import read_photo
from taskgroup.lab.data.samples import Samples
from taskgroup.lab.train.recipe import Recipe
from taskgroup.lab.vision import pictures
from taskgroup.lab.vision.backbones import ViTFeatures, backbone, save_config
from taskgroup.lab.vision.dense_losses import criterion
from taskgroup.lab.vision.metrics import evaluate
from taskgroup.lab.vision.models import dense_model

__all__ = ["Benchmark"]

_FIXED_TRAINING = 64  # images that the training metrics are computed on
_PICTURED = 4  # held-out images in predictions.png


class Benchmark:
    """One of the three data sets, its tasks, and the network of the published runs.

    Data is opened when it is first asked for, to train on all splits at once: a folder that lacks
    something says so before the training, and a network predicts without any.

    Args:
        settings: where the data is, sizes, and what the network is made by.
    """

    score = None

    def __init__(self, settings: Recipe) -> None:
        self._settings = settings
        self._kind = DATASETS[settings.data]
        self._tasks = self._kind.TASKS
        self.titles: Mapping[str, str] = {name: task.title for name, task in self._tasks.items()}
        self.metrics = {name: task.metric_name for name, task in self._tasks.items()}
        self.lower_is_better = {name: task.lower_is_better for name, task in self._tasks.items()}
        self.splits: Sequence[str] = tuple(self._kind.ROLES)
        self._augmented, self._whole = self._transforms()
        self._opened: dict[str, DenseDataset] = {}
        self._workers = min(settings.workers, len(os.sched_getaffinity(0)))

    def _split(self, split: str) -> DenseDataset:
        """A split, whole images; opened when it is first asked for."""
        if self._settings.root is None:
            raise ValueError(
                f"{self._settings.data} is read from a folder: name it with --data DIR. A small "
                f"one to try with is made by: taskgroup data mini {self._settings.data} DIR"
            )
        if split not in self._opened:
            self._opened[split] = self._open(split, self._whole)
        return self._opened[split]

    def _transforms(self) -> tuple[Transform, Transform]:
        size = self._settings.size
        if self._kind is Taskonomy:
            return Resize(size, mirror=True), Resize(size)
        return Augment(size, self._tasks), Fit(size, self._tasks)

    def _open(self, role: str, transform: Transform) -> DenseDataset:
        settings = self._settings
        assert settings.root is not None
        known = [task for task in settings.tasks or self._tasks if task in self._tasks]
        split = self._kind.ROLES[role]
        if self._kind is Taskonomy:
            split = f"{settings.subset}/{split}"
        return self._kind(
            settings.root, split, tasks=known or None, transform=transform, bad=settings.bad
        )

    def model(self, tasks: Sequence[str]) -> tg.MultiTaskModel:
        """The backbone with a head for each of the tasks."""
        settings = self._settings
        encoder: nn.Module
        if settings.backbone == "tiny":
            encoder = ViTFeatures(
                settings.size,
                settings.patch,
                settings.dim,
                settings.depth,
                settings.attention_heads,
                settings.dropout,
            )
        else:
            encoder = backbone(
                settings.backbone,
                size=settings.size,
                weights=settings.weights,
                drop_path=settings.drop_path,
            )
        channels = {task: self._tasks[task].channels for task in tasks}
        return dense_model(encoder, channels, decoder=settings.decoder)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Samples]:
        """Augmented training batches, read by worker processes.

        Raises:
            ValueError: if there is no root, or it does not hold the data set.
        """
        for split in self.splits:  # what is wrong with the others is said now
            self._split(split)
        data = copy.copy(self._split("train"))
        data.transform = self._augmented
        return training_batches(data, batch_size, seed=seed, start=start, workers=self._workers)

    def inputs(self, batch: Samples) -> Tensor:
        """The images ``[B, 3, H, W]``."""
        return batch.images

    def losses(self, outputs: Mapping[str, Tensor], batch: Samples) -> dict[str, Tensor]:
        """The masked losses of the published runs."""
        return criterion(outputs, batch.labels, batch.masks, self._tasks)

    def evaluate(self, model: nn.Module, split: str, quick: bool = False) -> dict[str, float]:
        """The metric of every task on a split; of the training data on 64 images, not augmented.

        Args:
            model: as :meth:`model` makes it.
            split: one of :attr:`splits`.
            quick: leave edges out, whose metric takes seconds an image.
        """
        data = self._split(split)
        if quick:
            data = copy.copy(data)
            data.tasks = [name for name in data.tasks if self._tasks[name].metric != "ods_f"]
        if not data.tasks:
            return {}
        batches = all_batches(
            data,
            self._settings.batch_size,
            limit=_FIXED_TRAINING if split == "train" else None,
            workers=self._workers,
        )
        metrics = evaluate(
            model, batches, tasks=self._tasks, only=data.tasks, workers=self._workers
        )
        if not metrics:
            raise BadSampleError(f"No sample of {data.root}, split {data.split}, can be read.")
        return metrics

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Input, target and prediction on some held-out images: ``predictions.png``."""
        some = next(all_batches(self._split("held_out"), _PICTURED, limit=_PICTURED), None)
        if some is not None:  # all of them bad, and skipped
            rgb = self._kind.to_rgb(some.images)
            pictures.draw(model, some, rgb, self._tasks, folder / "predictions.png")

    def keep(self, model: nn.Module, folder: Path) -> None:
        """The configuration of a pretrained backbone, whose source may be gone later."""
        assert isinstance(model, tg.MultiTaskModel)
        save_config(model.encoder, folder / "backbone")

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """A panel of all predictions for an image file of any size, as a PNG."""
        scene = self._whole(Scene(read_photo(image), {}, {}), np.random.default_rng(0))
        rgb = torch.from_numpy(scene.image.copy()).movedim(-1, 0).float() / 255
        pictures.draw_panel(model, self._kind.normalise(rgb), rgb, self._tasks, out)
