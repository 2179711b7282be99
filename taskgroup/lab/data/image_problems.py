"""The data sets of images as problems to train on: their networks, losses, metrics and pictures."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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
from taskgroup.lab.data.dense_dataset import Transform
from taskgroup.lab.data.files import read_photo
from taskgroup.lab.data.motorcycle import Motorcycle
from taskgroup.lab.problem import Problem
from taskgroup.lab.recipe import ProblemSettings
from taskgroup.lab.vision import predictions
from taskgroup.lab.vision.backbones import ViTFeatures, backbone, save_config
from taskgroup.lab.vision.dense_losses import criterion
from taskgroup.lab.vision.metrics import evaluate
from taskgroup.lab.vision.models import dense_model
from taskgroup.lab.vision.samples import Samples

__all__ = ["BenchmarkProblem", "DenseProblem", "MotorcycleProblem"]

_FIXED_TRAINING = 64  # images or crops that the training metrics are computed on
_PICTURED = 4  # held-out images or crops in predictions.png
_ROWS = 250  # of the photograph


class DenseProblem(Problem):
    """A data set of images with the network and the losses of the published runs.

    ``kind`` defines the tasks and the scale of the images. The losses are distances without an
    upper bound, so there is no score in (0, 1).
    """

    def __init__(
        self, settings: ProblemSettings, kind: type[DenseDataset], splits: Sequence[str]
    ) -> None:
        self._settings = settings
        self._kind = kind
        self._tasks = kind.TASKS
        self.splits = splits
        self.tasks = {name: task.title for name, task in self._tasks.items()}
        self.metrics = {name: task.metric_name for name, task in self._tasks.items()}
        self.better = {
            name: "lower" if task.lower_is_better else "higher"
            for name, task in self._tasks.items()
        }

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
        width = settings.head_width or 256
        return dense_model(encoder, channels, decoder=settings.decoder, width=width)

    def inputs(self, batch: Samples) -> Tensor:
        """The images ``[B, 3, H, W]``."""
        return batch.images

    def losses(self, outputs: Mapping[str, Tensor], batch: Samples) -> dict[str, Tensor]:
        """The masked losses of the published runs."""
        return criterion(outputs, batch.labels, batch.masks, self._tasks)

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Draw input, target and prediction of some held-out samples: ``predictions.png``."""
        some = self._pictured()
        if some is not None:
            rgb = self._kind.to_rgb(some.images)
            predictions.draw(model, some, rgb, self._tasks, folder / "predictions.png")

    def keep(self, model: nn.Module, folder: Path) -> None:
        """Write the configuration of a pretrained backbone, whose source may be gone later."""
        assert isinstance(model, tg.MultiTaskModel)
        save_config(model.encoder, folder / "backbone")

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """Draw a panel of all predictions for an image file of any size, as a PNG."""
        photo = read_photo(image)
        scene = self._to_size(photo.shape)(Scene(photo, {}, {}), np.random.default_rng(0))
        rgb = torch.from_numpy(scene.image.copy()).movedim(-1, 0).float() / 255
        predictions.draw_panel(model, self._kind.normalise(rgb), rgb, self._tasks, out)

    def _pictured(self) -> Samples | None:
        """The held-out samples to draw; None if there is none."""
        raise NotImplementedError

    def _to_size(self, shape: tuple[int, ...]) -> Transform:
        """The transform of a whole image of a shape to a size that the network takes."""
        raise NotImplementedError


class MotorcycleProblem(DenseProblem):
    """Crops of the embedded photograph; all metrics are errors."""

    def __init__(self, settings: ProblemSettings) -> None:
        super().__init__(settings, Taskonomy, ("train", "held_out"))
        self.scene = _scene(settings.size)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Samples]:
        """Random crops from both sides of the held-out band."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (self.scene.sample(batch_size, generator) for _ in count())
        return islice(drawn, start, None)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The error of every task on the fixed crops of a split."""
        return evaluate(model, _crops(self._settings.size, split))

    def _pictured(self) -> Samples:
        held_out = self.scene.held_out()
        last = len(held_out.images) - 1
        rows = torch.linspace(0, last, _PICTURED, dtype=torch.float32, device="cpu").round().long()
        some: Samples = tree_map(lambda tensor: tensor[rows], held_out)
        return some

    def _to_size(self, shape: tuple[int, ...]) -> Transform:
        # Large images are reduced to the rows of the photograph, sides are cut to whole patches.
        scale = min(1.0, _ROWS / shape[0])
        patch = self._settings.patch
        height, width = (max(patch, round(n * scale) // patch * patch) for n in shape[:2])
        return Resize((height, width))


_scene = cache(Motorcycle)  # the runs of one process share it


@cache
def _crops(size: tuple[int, int], split: str) -> Samples:
    scene = _scene(size)
    return scene.held_out() if split == "held_out" else scene.fixed_train(_FIXED_TRAINING)


class BenchmarkProblem(DenseProblem):
    """One of the paper's benchmarks, read from a folder: NYUD-v2, PASCAL-Context or Taskonomy.

    The data is opened when it is first needed. Training opens all splits at once, so that a folder
    in which something is missing is refused before the first batch; predictions need no data.
    """

    def __init__(self, settings: ProblemSettings) -> None:
        kind = DATASETS[settings.data]
        super().__init__(settings, kind, tuple(kind.ROLES))
        size = settings.size
        self._augmented: Transform
        self._whole: Transform
        if kind is Taskonomy:
            self._augmented, self._whole = Resize(size, mirror=True), Resize(size)
        else:
            self._augmented, self._whole = Augment(size, self._tasks), Fit(size, self._tasks)
        self._opened: dict[str, DenseDataset] = {}
        self._workers = min(settings.workers, len(os.sched_getaffinity(0)))

    def _split(self, role: str) -> DenseDataset:
        """The whole images of a split, which is opened when it is first needed."""
        settings = self._settings
        if settings.root is None:
            raise ValueError(
                f"{settings.data} is read from a folder: name it with --data DIR. A small one to "
                f"try with is made by: taskgroup data mini {settings.data} DIR"
            )
        if role not in self._opened:
            known = [task for task in settings.tasks or self._tasks if task in self._tasks]
            split = self._kind.ROLES[role]
            self._opened[role] = self._kind(
                settings.root,
                f"{settings.subset}/{split}" if self._kind is Taskonomy else split,
                tasks=known or None,
                transform=self._whole,
                bad=settings.bad,
            )
        return self._opened[role]

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Samples]:
        """Augmented training batches, read by worker processes.

        Raises:
            ValueError: if there is no root, or it does not hold the data set.
        """
        for split in self.splits:  # so that mistakes in the others are reported now
            self._split(split)
        data = copy.copy(self._split("train"))
        data.transform = self._augmented
        return training_batches(data, batch_size, seed=seed, start=start, workers=self._workers)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The metric of every task on a split; for ``"train"`` on 64 images, not augmented."""
        return self._evaluate(model, split, self._split(split))

    def evaluate_quickly(self, model: nn.Module, split: str) -> dict[str, float]:
        """The same without edges, whose metric takes longest."""
        data = copy.copy(self._split(split))
        data.tasks = [name for name in data.tasks if self._tasks[name].metric != "ods_f"]
        return self._evaluate(model, split, data) if data.tasks else {}

    def _evaluate(self, model: nn.Module, split: str, data: DenseDataset) -> dict[str, float]:
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

    def _pictured(self) -> Samples | None:
        return next(all_batches(self._split("held_out"), _PICTURED, limit=_PICTURED), None)

    def _to_size(self, shape: tuple[int, ...]) -> Transform:
        return self._whole
