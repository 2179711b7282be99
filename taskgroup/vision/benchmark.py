"""The paper's benchmarks as problems to train on: NYUD-v2, PASCAL-Context and Taskonomy."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import taskgroup as tg
from taskgroup.vision import pictures
from taskgroup.vision.backbones import ViTFeatures, backbone
from taskgroup.vision.datasets import (
    DATASETS,
    Augment,
    DenseDataset,
    Fit,
    Resize,
    Scene,
    Taskonomy,
    all_batches,
    training_batches,
)
from taskgroup.vision.datasets.dense import Transform
from taskgroup.vision.datasets.files import read_photo
from taskgroup.vision.datasets.loader import leave_signals_to_parent
from taskgroup.vision.losses import criterion
from taskgroup.vision.metrics import evaluate
from taskgroup.vision.models import dense_model
from taskgroup.vision.samples import Samples

__all__ = ["Benchmark"]

_FIXED_TRAINING = 64  # images that the training metrics are computed on
_PICTURED = 4  # held-out images in predictions.png


class Settings(Protocol):
    """Where the data is, and what the network is made by; see ``Recipe``."""

    data: str
    root: str | None
    subset: str
    tasks: tuple[str, ...] | None
    size: tuple[int, int]
    batch_size: int
    bad: Literal["stop", "skip"]
    workers: int
    backbone: str
    weights: str | None
    decoder: Literal["linear", "conv"]
    drop_path: float
    patch: int
    dim: int
    depth: int
    attention_heads: int
    dropout: float


class Benchmark:
    """One of the three data sets, its tasks, and the network of the published runs.

    Data is opened when it is first asked for, all splits at once: a folder that lacks something
    says so before the training, and a network predicts without any.

    Args:
        settings: where the data is, sizes, and what the network is made by.
    """

    score = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kind = DATASETS[settings.data]
        self._tasks = self._kind.TASKS
        self.titles: Mapping[str, str] = {name: task.title for name, task in self._tasks.items()}
        self.metrics = {name: task.metric_name for name, task in self._tasks.items()}
        self.lower_is_better = {name: task.lower_is_better for name, task in self._tasks.items()}
        self.splits: Sequence[str] = tuple(self._kind.ROLES)
        self._augmented, self._whole = self._transforms()
        self._workers = min(settings.workers, len(os.sched_getaffinity(0)))

    @cached_property
    def _data(self) -> dict[str, DenseDataset]:
        """Every split, whole images; with "augmented" the training data to train on."""
        if self._settings.root is None:
            raise ValueError(
                f"{self._settings.data} is read from a folder: name it with --data DIR. A small "
                f"one to try with is made by: taskgroup data mini {self._settings.data} DIR"
            )
        data = {split: self._open(split, self._whole) for split in self.splits}
        data["augmented"] = copy.copy(data["train"])
        data["augmented"].transform = self._augmented
        return data

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
        workers = self._workers
        data = self._data["augmented"]
        return training_batches(data, batch_size, seed=seed, start=start, workers=workers)

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
        settings = self._settings
        only = [name for name, task in self._tasks.items() if task.metric != "ods_f"]
        batches = all_batches(
            self._data[split],
            settings.batch_size,
            limit=_FIXED_TRAINING if split == "train" else None,
            workers=self._workers,
        )
        if quick:
            return evaluate(model, batches, tasks=self._tasks, only=only)
        with self._matchers(model) as executor:
            return evaluate(model, batches, tasks=self._tasks, executor=executor)

    def _matchers(self, model: nn.Module) -> AbstractContextManager[Executor | None]:
        """Processes that match edges, one for each that reads data."""
        assert isinstance(model, tg.MultiTaskModel)
        matched = any(self._tasks[task].metric == "ods_f" for task in model.heads)
        if not matched or not self._workers:
            return nullcontext()
        # Spawned: a forked process would inherit the threads of torch in an unknown state.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._workers, context, leave_signals_to_parent)

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Input, target and prediction on some held-out images: ``predictions.png``."""
        dataset = self._data["held_out"]
        some = next(all_batches(dataset, _PICTURED, limit=_PICTURED))
        pictures.draw(
            model, some, self._kind.to_rgb(some.images), self._tasks, folder / "predictions.png"
        )

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """A panel of all predictions for an image file of any size, as a PNG."""
        scene = self._whole(Scene(read_photo(image), {}, {}), np.random.default_rng(0))
        rgb = torch.from_numpy(scene.image.copy()).movedim(-1, 0) / 255
        pictures.draw_panel(model, self._kind.normalise(rgb), rgb, self._tasks, out)
