"""The figures in PNG files: the paper's figures of any runs, and the pictures of one run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from taskgroup.lab.report import affinities, groups
from taskgroup.lab.report.affinities import Pair
from taskgroup.lab.report.colours import (
    HARMS,
    INK,
    RUNS,
    SECTIONS,
    SERVES,
    ZERO,
    colour_of_run,
)
from taskgroup.lab.report.labels import mean_of, short, short_names, titles
from taskgroup.lab.report.run_data import RunData, load_run_data
from taskgroup.lab.report.thinning import Floats
from taskgroup.lab.report.timing import scale_of, seconds_per_batch, three_digits
from taskgroup.lab.train.run import Run

__all__ = ["affinity_over_time", "draw_run", "figures", "grouping", "open_axes", "save"]

PathLike = str | os.PathLike[str]

_DPI = 150
_AFFINITY = LinearSegmentedColormap.from_list("affinity", [HARMS, ZERO, SERVES])
_SHARE = "share of the batches in one group"
_READABLE = 20  # tasks of a matrix whose numbers are written into it


def figures(
    runs: Sequence[RunData], out: PathLike, pair: Pair | None = None
) -> tuple[list[Path], list[str]]:
    """Draw ``time_per_batch.png``, ``grouping.png`` and ``affinity_over_time.png``.

    These are the paper's Figures 2, 3 and 4, for finished runs and for runs that are still
    training. A figure for which no run has data is not drawn.

    Args:
        runs: the runs to draw.
        out: the folder, which is created if needed.
        pair: two tasks whose affinity to draw; None takes the pair of
            :func:`~taskgroup.lab.report.affinities.changed_most`.

    Returns:
        The files that were written, and sentences on what was left out and why.

    Raises:
        ValueError: if there is no run, or no such pair of tasks. Nothing is drawn then.
    """
    if not runs:
        raise ValueError("There are no runs to draw; name the folder of one at least.")
    if pair is not None:
        affinities.check_pair(runs, pair)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = ("time_per_batch.png", "grouping.png", "affinity_over_time.png")
    paths = [out / name for name in names]
    found = [
        time_per_batch(runs, paths[0]),
        grouping(runs, paths[1]),
        affinity_over_time(runs, paths[2], pair),
    ]
    written = [path for path, (done, _) in zip(paths, found, strict=True) if done]
    return written, [note for _, notes in found for note in notes]


def time_per_batch(runs: Sequence[RunData], path: PathLike) -> tuple[bool, list[str]]:
    """Draw bars of the time per batch, divided into sections; the paper's Figure 2.

    Returns whether there was anything to draw, and sentences on what was left out.
    """
    bars, notes = seconds_per_batch(runs)
    if not bars:
        return False, notes
    bars.sort(key=lambda bar: bar.seconds)
    most = max(max(bar.totals) for bar in bars)
    scale, unit = scale_of(most)
    labels = [textwrap.fill(bar.label, 34, break_on_hyphens=False) for bar in bars]
    lines = 1 + max(label.count("\n") for label in labels)
    figure = Figure(figsize=(9, 1.3 + (0.2 + 0.16 * lines) * len(bars)), layout="constrained")
    axes = open_axes(figure.subplots(), "Time per batch")
    ends = np.zeros(len(bars))
    for section, colour in SECTIONS.items():
        if any(section in bar.sections for bar in bars):
            widths = np.array([scale * bar.sections.get(section, 0.0) for bar in bars])
            axes.barh(range(len(bars)), widths, 0.62, ends, color=colour, label=section)
            ends += widths
    for y, bar in enumerate(bars):
        ratio = "" if bar.ratio is None else f"   {bar.ratio:.2f}x"
        axes.annotate(
            f"{three_digits(scale * bar.seconds)} {unit}{ratio}",
            (scale * max(bar.totals), y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    several = [(y, bar.totals) for y, bar in enumerate(bars) if len(bar.totals) > 1]
    for n, (y, found) in enumerate(several):
        axes.plot(
            [scale * total for total in found],
            [y] * len(found),
            "ok",
            markerfacecolor="white",
            markersize=4,
            label=None if n else "one run",
        )
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set(xlim=(0, 1.2 * scale * most), ylim=(len(bars) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    relative_too = any(bar.ratio is not None for bar in bars)
    units = {"s": "seconds", "ms": "milliseconds"}[unit]
    axes.set_xlabel(f"{units} per batch" + (", and ratio to joint training" * relative_too))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
    return True, notes


def grouping(runs: Sequence[RunData], path: PathLike) -> tuple[bool, list[str]]:
    """Draw who shared a group, and the number of groups over time; the paper's Figure 3.

    On the left is the share of the batches in which two tasks were in the same group, averaged over
    the selective runs; tasks that often share a group are neighbours. On the right is the number of
    groups of each run. If the runs have different tasks, those with the most common ones are drawn.
    """
    drawn, notes = groups.with_groups(runs)
    if not drawn:
        return False, notes
    shared = groups.average_share(drawn)
    order = groups.order_by_share(shared)

    cell = max(3.0, min(12.0, 0.36 * len(order))) / len(order)  # inches
    shown = titles(drawn[0])
    names = [short(shown[drawn[0].tasks[k]]) for k in order]
    size = max(2.0, min(9.0, 0.75 * 72 * cell))  # points
    room = max(map(len, names)) * 0.62 * size / 72  # inches of the longest name
    of_runs = short_names(drawn)
    columns = 2 if max(map(len, of_runs)) <= 30 else 1
    below = 4.7 + 0.18 * (len(of_runs) + 1) / columns  # the picture on the right and its legend
    side = cell * len(order) + room
    figure = Figure(figsize=(side + 8.0, max(side + 0.6, below)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side + 1, 7))
    left.set_anchor("N")
    image = _draw_share(left, shared, order, names, size, digits=2)
    bar = figure.colorbar(image, cax=left.inset_axes((1.02, 0, 0.03, 1)))
    bar.set_label(_SHARE)
    left.set_title("Who shared a group" + mean_of(len(drawn)), loc="left")
    _draw_counts(right, drawn, of_runs)
    right.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns
    )
    save(figure, path)
    return True, notes


def affinity_over_time(
    runs: Sequence[RunData], path: PathLike, pair: Pair | None = None
) -> tuple[bool, list[str]]:
    """Draw the affinity between two tasks over time, one line per decay; the paper's Figure 4.

    The entries are drawn as they were recorded, not divided by a self-affinity. Of several seeds
    the mean is a thick line and each run a thin one. If the runs have different tasks, those with
    the most common ones are drawn.
    """
    drawn, notes = affinities.with_affinity(runs, pair)
    if not drawn:
        return False, notes
    pair = affinities.changed_most(drawn) if pair is None else pair
    courses = affinities.affinity_courses(drawn, pair)
    notes += [
        f"The mean of {course.label} ends at batch {course.batches[-1]}, where its shortest run "
        "ends."
        for course in courses
        if any(batches[-1] > course.batches[-1] for batches, _ in course.runs)
    ]
    labels = [course.label + mean_of(len(course.runs)) for course in courses]
    columns = max(1, min(len(labels), 130 // (8 + max(map(len, labels)))))
    height = 4.0 + 0.18 * -(-len(labels) // columns)
    figure = Figure(figsize=(10.5, height), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shown = titles(drawn[0])
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(courses)))
    for direction, axes in enumerate(panels):
        step, effect = (short(shown[pair[d]]) for d in (direction, 1 - direction))
        open_axes(axes, f"step on {step}, effect on {effect}", size=10, y=1.06)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        for course, label, colour in zip(courses, labels, shades, strict=True):
            for batches, values in course.runs if len(course.runs) > 1 else ():
                axes.plot(batches, values[:, direction], color=colour, lw=0.6, alpha=0.45)
            axes.plot(
                course.batches,
                course.mean[:, direction],
                color=colour,
                marker="." if len(course.batches) < 3 else "",  # a line of one point is invisible
                linewidth=1.6,
                label=label,
            )
        axes.set_xlabel("batch")
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
    panels[0].set_ylabel("affinity, entry of the matrix as recorded")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize=8, loc="outside lower left", ncols=columns)
    save(figure, path)
    return True, notes


def draw_run(run: Run) -> None:
    """Draw the pictures of a finished run into its folder.

    For a selective run, ``affinity.png`` is the matrix that tasks are grouped by,
    ``cogrouping.png`` shows which tasks shared a group, and ``groups.png`` is the number of groups
    over time. In the first two, the tasks of a group are neighbours, and the groups of the last
    batch are framed. If the data are images, ``predictions.png`` shows what the network predicts.
    """
    trainer, data = run.trainer, load_run_data(run.out)
    affinity = trainer.affinity().cpu().double().numpy()
    at = [list(trainer.tasks).index(task) for task in data.tasks]
    if data.method == "selective":
        _draw_groups(data, affinity[np.ix_(at, at)], run.out)
    trainer.problem.draw(trainer.model, run.out)


def _draw_groups(run: RunData, affinity: Floats, out: Path) -> None:
    """Draw the pictures of affinity and groups; ``affinity`` is [K, K] in the run's task order."""
    order = groups.task_order(run, [run])
    shown = titles(run)
    names = [short(shown[run.tasks[k]]) for k in order]
    framed = groups.blocks(run.groups[-1][order])
    matrix = 0.42 * max(6, min(len(names), 40))  # inches of its side
    size = max(3.0, min(9.0, 0.75 * 72 * matrix / len(names)))
    room = max(map(len, names)) * 0.62 * size / 72  # inches of the longest name
    turned = 45 if len(names) <= 40 else 90  # where slanted names would touch
    below = 0.75 * room if turned == 45 else room
    sides = (1.05 * matrix + room + 1.5, matrix + below + 0.9)

    figure = Figure(figsize=sides, layout="constrained")
    axes = figure.subplots()
    values = affinities.normalised(affinity)[np.ix_(order, order)]
    end = affinities.largest(values)
    image = axes.imshow(values, cmap=_AFFINITY, vmin=-end, vmax=end)
    _name_tasks(axes, names, size, turned)
    _write_values(axes, values, 2, [INK] * 2)
    _frame(axes, framed)
    beside = axes.inset_axes((1.02, 0, 0.03, 1))
    # Arrows where the colours end before the values do.
    beyond = np.abs(values[np.isfinite(values)]).max(initial=0) > end
    bar = figure.colorbar(
        image, cax=beside, extend="both" if beyond else "neither", extendfrac=0.03
    )
    bar.set_label("harm   ←   normalised affinity   →   help")
    unmeasured = np.isnan(values) & ~np.eye(len(values), dtype=bool)
    if unmeasured.any():
        place = ((1, 1), (0, 4), "axes fraction", "offset points")
        axes.annotate("empty: not measured", *place, ha="right", fontsize=8)
    title = "Affinity by which tasks are grouped"
    axes.set_title(title, loc="left", pad=22 if unmeasured.any() else 12)
    save(figure, out / "affinity.png")

    learned = groups.learned(run)
    after = learned if len(learned) else run.groups
    figure = Figure(figsize=sides, layout="constrained")
    axes = figure.subplots()
    image = _draw_share(axes, groups.share(after), order, names, size, digits=1, turned=turned)
    _frame(axes, framed)
    figure.colorbar(image, cax=axes.inset_axes((1.02, 0, 0.03, 1))).set_label(_SHARE)
    axes.set_title(f"Who shared a group, over {len(after)} batches", loc="left", pad=12)
    save(figure, out / "cogrouping.png")

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    _draw_smoothed_count(figure.subplots(), run)
    save(figure, out / "groups.png")


def _draw_smoothed_count(axes: Axes, run: RunData) -> None:
    """Draw the number of groups after every batch, and its running mean after the warm-up."""
    counts, n_batches = run.groups.max(1) + 1, len(run.batches)
    axes.step(run.batches, counts, where="mid", color="#9ecae1", linewidth=1, label="each batch")
    begin = min(run.warmup, n_batches - 1)
    settled = counts[begin:]
    width = max(1, min(25, len(settled) // 10))
    kernel = np.ones(width)
    mean = np.convolve(settled, kernel, "same") / np.convolve(np.ones_like(settled), kernel, "same")
    axes.plot(run.batches[begin:], mean, color="#08519c", label=f"mean of {width} batches")
    if 0 < run.warmup < n_batches:
        axes.axvspan(1, run.warmup, color="#e8e8e8", zorder=0, label="warm-up")
    open_axes(axes, "Number of groups")
    axes.set(
        xlabel="batch", ylabel="groups", xlim=(1, max(2, n_batches)), ylim=(0, max(counts) + 1)
    )
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.legend(frameon=False, loc="upper right")


def _draw_counts(axes: Axes, runs: Sequence[RunData], names: Sequence[str]) -> None:
    """Draw the number of groups of several runs."""
    width = 1
    for n, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = groups.group_counts(run)
        width = max(width, points.width)
        faint = min(0.15, 0.4 / len(runs))  # or the bands of many runs hide the lines
        band = (points.batches, points.low, points.high)
        axes.fill_between(*band, color=colour_of_run(n), alpha=faint, linewidth=0)
        style = ("-", "--", ":")[n // len(RUNS) % 3]
        # The first line is the widest, so that all of the runs that agree are seen.
        wide = 1.4 + 4 * (len(runs) - 1 - n) / max(3, len(runs) - 1)
        line = (points.batches, points.mean, style)
        axes.plot(*line, color=colour_of_run(n), linewidth=wide, label=name)
    if warmup := max(run.warmup for run in runs):
        axes.axvspan(0, warmup, color="#e8e8e8", zorder=0, linewidth=0, label="warm-up")
    last = max(int(run.batches[-1]) for run in runs)
    most = max(int(run.groups.max()) for run in runs) + 1
    of = f" (means of {width} batches; shaded: minimum to maximum)" if width > 1 else ""
    axes.set(xlabel=f"batch{of}", ylabel="groups", xlim=(0, last), ylim=(0, 1.05 * most + 0.2))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.set_box_aspect(0.55)
    axes.set_anchor("N")
    open_axes(axes, "Number of groups")


def _draw_share(
    axes: Axes,
    shared: Floats,
    order: Sequence[int],
    names: Sequence[str],
    size: float,
    digits: int,
    turned: int | None = None,
) -> AxesImage:
    """Draw the share of the batches in which two tasks were in the same group."""
    values = shared[np.ix_(order, order)]
    _name_tasks(axes, names, size, turned)
    _write_values(axes, values, digits)
    return axes.imshow(values, cmap="Blues", vmin=0, vmax=1)


def _name_tasks(axes: Axes, names: Sequence[str], size: float, turned: int | None = None) -> None:
    turned = turned or (45 if size == 9 else 90)
    align = "right" if turned == 45 else "center"
    axes.set_xticks(range(len(names)), names, rotation=turned, ha=align, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write_values(
    axes: Axes, values: Floats, digits: int, colours: Sequence[str] = ("black", "white")
) -> None:
    """Write the values into the cells of a matrix that is small enough to read them.

    The second of the ``colours`` is for values above 0.6.
    """
    if len(values) > _READABLE:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{round(value, digits) + 0:.{digits}f}",  # + 0 turns -0.0 into 0.0
                ha="center",
                va="center",
                fontsize=7,
                color=colours[int(abs(value) > 0.6)],
            )


def _frame(axes: Axes, blocks: Iterable[tuple[int, int, int, int]]) -> None:
    """Frame the blocks of a matrix in which tasks share a group, so that any colour shows it."""
    lines = (("white", 3.6, 2), ("black", 1.8, 3))  # the white ones below all black ones
    for top, bottom, left, right in blocks:
        corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)
        for colour, width, above in lines:
            axes.add_patch(
                Rectangle(
                    corner,
                    *sides,
                    fill=False,
                    edgecolor=colour,
                    linewidth=width,
                    zorder=above,
                    clip_on=False,
                )
            )


def open_axes(axes: Axes, title: str, size: float | str = "large", y: float | None = None) -> Axes:
    """Give axes a title, and remove the frame at the top and on the right.

    With ``y`` the title stands at that height of the axes, whatever else stands above them.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", size=size, y=y)
    return axes


def save(figure: Figure, path: PathLike) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=_DPI)
