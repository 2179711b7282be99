"""Pictures of predictions and labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn
from torch.nn import functional as F

from taskgroup.lab.vision.samples import Samples
from taskgroup.lab.vision.tasks import Task

__all__ = ["colour", "draw", "draw_panel", "predict"]

_UNKNOWN = 0.75  # grey
_DPI = 150


def colour(task: Task, values: Tensor, known: Tensor, low: float, high: float) -> Tensor:
    """Convert the values [N, C, H, W] of a task to RGB, [N, H, W, 3] in [0, 1].

    Every class has a colour. A probability and a single channel become grey levels from ``low`` to
    ``high`` (0 to 1 for a probability), two channels red and green, and three channels red, green
    and blue. Pixels that are not ``known``, [N, 1, H, W], become grey.
    """
    if task.kind == "classes":
        picture = _palette(task.channels)[values[:, 0].long().clamp(0, task.channels - 1)]
    else:
        if task.kind == "binary":
            low, high = 0.0, 1.0
        scaled = ((values.float() - low) / (high - low)).clamp(0, 1)
        channels = {1: [0, 0, 0], 2: [0, 1, 1], 3: [0, 1, 2]}[scaled.shape[1]]
        picture = scaled[:, channels].movedim(1, -1).clone()
        if scaled.shape[1] == 2:
            picture[..., 2] = 0.5
    return torch.where(known.movedim(1, -1), picture, _UNKNOWN)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
    """Predict labels for images [N, 3, H, W]: {task: [N, C, H, W]}, on the CPU.

    Outputs become class numbers, probabilities, normals of unit length, or stay as they are. The
    model predicts in evaluation mode.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    outputs = model.eval()(images.to(device))
    model.train(training)
    found = {}
    for name, output in outputs.items():
        task, output = tasks[name], output.float().cpu()
        if task.kind == "classes":
            output = output.argmax(1, keepdim=True)
        elif task.kind == "binary":
            output = output.sigmoid()
        elif task.loss in ("cosine", "unit_l1"):
            output = F.normalize(output, dim=1)
        found[name] = output
    return found


def draw(
    model: nn.Module, samples: Samples, rgb: Tensor, tasks: Mapping[str, Task], path: Path
) -> None:
    """Draw some samples, their targets and predictions as a PNG; ``rgb`` is in [0, 1]."""
    outputs = predict(model, samples.images, tasks)
    n_samples, columns = len(rgb), len(outputs) + 1
    aspect = rgb.shape[2] / rgb.shape[3]
    figure = Figure(figsize=(1.15 * columns, 2.3 * aspect * n_samples + 0.35), layout=_tight())
    grid = _empty_grid(figure, 2 * n_samples, columns)
    for n in range(n_samples):
        grid[2 * n][0].imshow(rgb[n].movedim(0, -1).numpy())
        grid[2 * n][0].set_ylabel("target", fontsize=8)
        grid[2 * n + 1][0].set_ylabel("prediction", fontsize=8)
    grid[0][0].set_title("input", fontsize=8)
    for column, (name, output) in enumerate(outputs.items(), start=1):
        label, known = samples.labels[name], samples.masks[name]
        low, high = _range(label, known)
        for row, values in enumerate((label, output)):
            pictures = colour(tasks[name], values, known, low, high)
            for n in range(n_samples):
                grid[2 * n + row][column].imshow(pictures[n].numpy())
        grid[0][column].set_title(tasks[name].title.replace(" ", "\n", 1), fontsize=8)
    figure.savefig(path, dpi=_DPI)


def draw_panel(
    model: nn.Module, image: Tensor, rgb: Tensor, tasks: Mapping[str, Task], path: Path
) -> None:
    """Draw an image without labels and all predictions for it, as a PNG.

    The image [3, H, W] is given twice: normalised for the model, and as ``rgb`` in [0, 1].
    """
    pictures = {"input": rgb.movedim(0, -1)}
    for name, output in predict(model, image[None], tasks).items():
        known = torch.ones_like(output[:, :1], dtype=torch.bool)
        limits = _range(output, known)
        pictures[tasks[name].title] = colour(tasks[name], output, known, *limits)[0]
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    height = 2.6 * rgb.shape[1] / rgb.shape[2] + 0.25
    figure = Figure(figsize=(2.6 * columns, height * rows), layout=_tight())
    places = _empty_grid(figure, rows, columns).flat
    for axes, (title, picture) in zip(places, pictures.items(), strict=False):
        axes.imshow(picture.numpy())
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _tight() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, hspace=0.02, wspace=0.02)


def _empty_grid(figure: Figure, rows: int, columns: int) -> np.ndarray:
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return grid


def _palette(n_classes: int) -> Tensor:
    """A colour for each class, [n, 3]; classes with neighbouring numbers differ in hue."""
    numbers = np.arange(n_classes)
    colours = colormaps["hsv"](numbers * 0.618034 % 1)[:, :3] * (1 - 0.25 * (numbers[:, None] % 3))
    colours[0] = 0.15  # dark grey for the background, which is the first class of most tasks
    return torch.from_numpy(colours).float()


def _range(values: Tensor, known: Tensor) -> tuple[float, float]:
    """The values for black and white: the 2nd and 98th percentile of the known values."""
    inside = values[known.expand_as(values)].float()
    if inside.numel() == 0:
        return -1.0, 1.0
    inside = inside[:: max(1, inside.numel() // 10**6)]  # quantile takes at most 16 million
    low, high = torch.quantile(inside, inside.new_tensor([0.02, 0.98])).tolist()
    return low, max(high, low + 1e-6)
