"""Pictures of a run, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["BLANK", "affinity", "cogrouping", "number_of_groups", "panel", "predictions"]

Path = str | os.PathLike[str]
Titles = Mapping[str, str]  # task -> what a figure calls it
Partition = Sequence[Sequence[str]]

_DPI = 150
#: Of cells without a value: white is a value of 0.
BLANK = "#e4e4e4"


def affinity(matrix: Tensor, titles: Titles, partition: Partition, path: Path) -> None:
    """Heatmap of the affinity, the tasks of a group side by side and framed.

    Each column is divided by the self-affinity of its task, the scale on which tasks are grouped;
    a column without a self-affinity is left blank, and so is what was never measured.

    Args:
        matrix: ``[K, K]``, row i the effect of stepping task i; NaN where it was never measured.
        titles: of the K tasks, in the order of the matrix.
        partition: the groups to frame.
        path: of the PNG.
    """
    order, names = _by_group(titles, partition)
    values = matrix.detach().cpu().double().numpy()[np.ix_(order, order)]
    diagonal = values.diagonal()
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(diagonal > 0, values / diagonal, np.nan)
    figure, axes = _square(len(order))
    if np.isnan(values).any():
        axes.set_facecolor(BLANK)
        axes.annotate(
            "grey: not measured",
            (1, 1),
            (0, 4),
            "axes fraction",
            "offset points",
            ha="right",
            fontsize=8,
        )
    image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    _name_axes(axes, names, "effect on task", "step on task")
    _frame(axes, partition)
    _write_values(axes, values)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend="both")
    bar.set_label("harms   ←   affinity / self-affinity   →   serves")
    axes.set_title("Proximal inter-task affinity", loc="left", pad=12)
    figure.savefig(path, dpi=_DPI)


def cogrouping(partitions: Sequence[Partition], titles: Titles, path: Path) -> None:
    """Heatmap of how often two tasks shared a group.

    Args:
        partitions: one per batch; the last one is framed.
        titles: of the K tasks.
        path: of the PNG.
    """
    position = {task: k for k, task in enumerate(titles)}
    shared = np.zeros((len(titles), len(titles)))
    for partition in partitions:
        for group in partition:
            members = [position[task] for task in group]
            shared[np.ix_(members, members)] += 1
    shared /= len(partitions)
    order, names = _by_group(titles, partitions[-1])
    values = shared[np.ix_(order, order)]
    figure, axes = _square(len(order))
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    _name_axes(axes, names, "", "")
    _frame(axes, partitions[-1])
    _write_values(axes, values)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the batches in one group")
    axes.set_title(f"Who shared a group, over {len(partitions)} batches", loc="left", pad=12)
    figure.savefig(path, dpi=_DPI)


def number_of_groups(counts: Sequence[int], warmup: int, path: Path) -> None:
    """The number of groups, batch by batch.

    Args:
        counts: one per batch.
        warmup: batches to shade as warm-up.
        path: of the PNG.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    batches = np.arange(1, len(counts) + 1)
    axes.step(batches, counts, where="mid", color="#9ecae1", linewidth=1)
    width = max(1, min(25, len(counts) // 10))
    kernel = np.ones(width)
    mean = np.convolve(counts, kernel, "same") / np.convolve(np.ones(len(counts)), kernel, "same")
    settled = slice(min(warmup, len(counts) - 1), None)
    axes.plot(batches[settled], mean[settled], color="#08519c", label=f"mean of {width} batches")
    if 0 < warmup < len(counts):
        axes.axvspan(1, warmup, color="#e8e8e8", zorder=0, label="warm-up")
    axes.set(
        xlabel="batch", ylabel="groups", xlim=(1, max(2, len(counts))), ylim=(0, max(counts) + 1)
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("Number of groups", loc="left")
    figure.savefig(path, dpi=_DPI)


def predictions(
    images: Tensor,
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    titles: Titles,
    path: Path,
) -> None:
    """Input, target and prediction of every task on some samples.

    Args:
        images: ``[N, H, W, 3]`` in [0, 1], as all pictures.
        targets: ``{task: [N, H, W, 3]}``.
        outputs: ``{task: [N, H, W, 3]}``.
        titles: of the tasks, in the order of the columns.
        path: of the PNG.
    """
    n_samples, columns = len(images), len(titles) + 1
    aspect = images.shape[1] / images.shape[2]
    figure = Figure(figsize=(1.15 * columns, 2.3 * aspect * n_samples + 0.35), layout=_tight())
    grid = _empty_grid(figure, 2 * n_samples, columns)
    for n in range(n_samples):
        target_row, output_row = grid[2 * n], grid[2 * n + 1]
        target_row[0].imshow(images[n].numpy())
        target_row[0].set_ylabel("target", fontsize=8)
        output_row[0].set_ylabel("prediction", fontsize=8)
        for column, task in enumerate(titles, start=1):
            target_row[column].imshow(targets[task][n].numpy())
            output_row[column].imshow(outputs[task][n].numpy())
    grid[0][0].set_title("input", fontsize=8)
    for column, title in enumerate(titles.values(), start=1):
        grid[0][column].set_title(title.replace(" ", "\n", 1), fontsize=8)
    figure.savefig(path, dpi=_DPI)


def panel(image: Tensor, outputs: Mapping[str, Tensor], titles: Titles, path: Path) -> None:
    """One image and what was predicted for it, side by side, four in a row.

    Args:
        image: ``[H, W, 3]`` in [0, 1], as all pictures.
        outputs: ``{task: [H, W, 3]}``.
        titles: of the tasks, in order.
        path: of the PNG.
    """
    pictures = {"input": image, **{title: outputs[task] for task, title in titles.items()}}
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    height = 2.6 * image.shape[0] / image.shape[1] + 0.25
    figure = Figure(figsize=(2.6 * columns, height * rows), layout=_tight())
    places = _empty_grid(figure, rows, columns).flat
    for axes, (title, picture) in zip(places, pictures.items(), strict=False):
        axes.imshow(picture.numpy())
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _tight() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, hspace=0.02, wspace=0.02)


def _empty_grid(figure: Figure, rows: int, columns: int) -> Any:
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return grid


def _by_group(titles: Titles, partition: Partition) -> tuple[list[int], list[str]]:
    """Positions and titles of the tasks, group by group."""
    position = {task: k for k, task in enumerate(titles)}
    tasks = [task for group in partition for task in group]
    return [position[task] for task in tasks], [titles[task] for task in tasks]


def _square(tasks: int) -> tuple[Figure, Axes]:
    side = 3.0 + 0.42 * min(tasks, 40)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    return figure, figure.subplots()


def _name_axes(axes: Axes, names: list[str], along: str, down: str) -> None:
    size = 9 if len(names) <= 20 else max(3, 180 / len(names))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel=along, ylabel=down)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, partition: Partition) -> None:
    start = -0.5
    for group in partition:
        axes.add_patch(Rectangle((start, start), len(group), len(group), fill=False, linewidth=1.8))
        start += len(group)


def _write_values(axes: Axes, values: np.ndarray) -> None:
    if len(values) > 20:  # unreadable
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(
                column,
                row,
                f"{round(value, 1) + 0:.1f}",  # + 0 turns -0.0 into 0.0
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )
