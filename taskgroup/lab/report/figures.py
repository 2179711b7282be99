"""The paper's figures of any runs: time per batch, grouping, affinity over time."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from taskgroup.lab.report import run_data as history
from taskgroup.lab.report.run_data import Floats, Pair, RunData

__all__ = ["affinity_over_time", "figures", "grouping", "time_per_batch"]

_DPI = 150


def figures(
    runs: Sequence[RunData], out: str | os.PathLike[str], pair: Pair | None = None
) -> tuple[list[Path], list[str]]:
    """Draw ``time_per_batch.png``, ``grouping.png`` and ``affinity_over_time.png``.

    The paper's Figures 2, 3 and 4, of finished runs and of runs that are still training. A picture
    that no run has the data for is not drawn.

    Args:
        runs: those to draw.
        out: the folder, made where it is missing.
        pair: two tasks whose affinity to draw; None is the pair of
            :func:`~taskgroup.lab.report.run_data.changed_most`.

    Returns:
        The pictures that were drawn, and sentences on what was left out and why.

    Raises:
        ValueError: if there is no run, or no such pair of tasks. Nothing is drawn then.
    """
    if not runs:
        raise ValueError("There are no runs to draw; name the folder of one at least.")
    if pair is not None:
        history.check_pair(runs, pair)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = ("time_per_batch.png", "grouping.png", "affinity_over_time.png")
    times, groups, affinities = paths = [out / name for name in names]
    found = [
        time_per_batch(runs, times),
        grouping(runs, groups),
        affinity_over_time(runs, affinities, pair),
    ]
    written = [path for path, (done, _) in zip(paths, found, strict=True) if done]
    return written, [note for _, notes in found for note in notes]


def time_per_batch(runs: Sequence[RunData], path: str | os.PathLike[str]) -> tuple[bool, list[str]]:
    """Bars of the time of a batch, divided into sections; the paper's Figure 2.

    Args:
        runs: those to draw.
        path: of the PNG.

    Returns:
        Whether there was anything to draw, and what was left out.
    """
    bars, notes = history.seconds_per_batch(runs)
    if not bars:
        return False, notes
    bars.sort(key=lambda bar: sum(bar.sections.values()))
    totals = [sum(bar.sections.values()) for bar in bars]
    most = max(max(bar.totals) for bar in bars)
    scale, unit, units = (1e3, "ms", "milliseconds") if most < 0.5 else (1.0, "s", "seconds")
    labels = [textwrap.fill(bar.label, 34, break_on_hyphens=False) for bar in bars]
    lines = 1 + max(label.count("\n") for label in labels)
    pitch = 0.2 + 0.16 * lines
    figure = Figure(figsize=(9, 1.3 + pitch * len(bars)), layout="constrained")
    axes = figure.subplots()
    ends = np.zeros(len(bars))
    for section, colour in history.SECTIONS.items():
        if not any(section in bar.sections for bar in bars):
            continue
        widths = np.array([scale * bar.sections.get(section, 0.0) for bar in bars])
        axes.barh(range(len(bars)), widths, 0.62, ends, color=colour, label=section)
        ends += widths
    for y, (bar, total) in enumerate(zip(bars, totals, strict=True)):
        ratio = "" if bar.ratio is None else f"   {bar.ratio:.2f}x"
        axes.annotate(
            f"{scale * total:.3g} {unit}{ratio}",
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
    relative = any(bar.ratio is not None for bar in bars)
    axes.set_xlabel(f"{units} per batch" + (", and times joint training" if relative else ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Time per batch", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=_DPI)
    return True, notes


def grouping(runs: Sequence[RunData], path: str | os.PathLike[str]) -> tuple[bool, list[str]]:
    """Who shared a group, and the number of groups over time; the paper's Figure 3.

    Left the share of the batches in which two tasks shared a group, the mean over the selective
    runs, tasks that go together side by side; right the number of groups of each run. Of runs on
    different tasks those of the most common ones are drawn.

    Args:
        runs: those to draw.
        path: of the PNG.

    Returns:
        Whether there was anything to draw, and what was left out.
    """
    drawn, notes = history.with_groups(runs)
    if not drawn:
        return False, notes
    tasks = drawn[0].tasks
    share = history.average_share(drawn)
    order = history.order_by_share(share)

    cell = max(3.0, min(12.0, 0.36 * len(tasks))) / len(tasks)  # inches
    names = [history.short(tasks[k]) for k in order]
    size = max(2.0, min(9.0, 0.75 * 72 * cell))  # points
    room = max(map(len, names)) * 0.62 * size / 72  # inches of the longest name
    of_runs = history.short_names(drawn)
    columns = 2 if max(map(len, of_runs)) <= 30 else 1
    below = 4.7 + 0.18 * (len(of_runs) + 1) / columns  # the picture on the right and its legend
    side = cell * len(tasks) + room
    figure = Figure(figsize=(side + 8.0, max(side + 0.6, below)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side + 1, 7))
    left.set_anchor("N")
    image = left.imshow(share[np.ix_(order, order)], cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, cax=left.inset_axes((1.02, 0, 0.03, 1)))
    bar.set_label("share of the batches in one group")
    _name_tasks(left, names, size)
    if len(tasks) <= 20:
        _write_values(left, share[np.ix_(order, order)])
    left.set_title("Who shared a group" + _mean_of(len(drawn)), loc="left")
    _draw_counts(right, drawn, of_runs)
    right.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns
    )
    figure.savefig(path, dpi=_DPI)
    return True, notes


def affinity_over_time(
    runs: Sequence[RunData], path: str | os.PathLike[str], pair: Pair | None = None
) -> tuple[bool, list[str]]:
    """The affinity between two tasks over the batches, a line for each decay; Figure 4.

    Entries of the matrix as they were recorded, not divided by a self-affinity. Of several seeds
    the mean is drawn, and the runs thin. Of runs on different tasks those of the most common ones
    are drawn.

    Args:
        runs: those to draw.
        path: of the PNG.
        pair: two tasks; None is the pair of :func:`~taskgroup.lab.report.run_data.changed_most`.

    Returns:
        Whether there was anything to draw, and what was left out.

    Raises:
        ValueError: if there is no such pair of tasks.
    """
    if pair is not None:
        history.check_pair(runs, pair)
    drawn, notes = history.with_affinity(runs, pair)
    if not drawn:
        return False, notes
    first, second = history.changed_most(drawn) if pair is None else pair
    courses = history.affinity_courses(drawn, (first, second))
    for course in courses:
        if short := [b[-1] for b, _ in course.runs if b[-1] < max(c[-1] for c, _ in course.runs)]:
            notes.append(
                f"The mean of {course.label} ends at batch {min(short)}, as far as all its runs go."
            )

    titles = [course.label + _mean_of(len(course.runs)) for course in courses]
    columns = max(1, min(len(titles), 130 // (8 + max(map(len, titles)))))
    height = 4.0 + 0.18 * -(-len(titles) // columns)
    figure = Figure(figsize=(10.5, height), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(courses)))
    for direction, axes in enumerate(panels):
        step, effect = [(first, second), (second, first)][direction]
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        for course, title, colour in zip(courses, titles, shades, strict=True):
            if len(course.runs) > 1:
                for batches, values in course.runs:
                    axes.plot(batches, values[:, direction], color=colour, lw=0.6, alpha=0.45)
            mark = "." if len(course.batches) < 3 else ""  # a line of one point is none
            axes.plot(
                course.batches,
                course.mean[:, direction],
                color=colour,
                marker=mark,
                linewidth=1.6,
                label=title,
            )
        axes.set_xlabel("batch")
        step, effect = history.short(step), history.short(effect)
        axes.set_title(f"step on {step}, effect on {effect}", loc="left", size=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("affinity, entry of the matrix as recorded")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize=8, loc="outside lower left", ncols=columns)
    figure.savefig(path, dpi=_DPI)
    return True, notes


def _draw_counts(axes: Axes, runs: Sequence[RunData], names: Sequence[str]) -> None:
    width = 1
    for n, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = colormaps["tab10"](n % 10)
        points = history.group_counts(run)
        width = max(width, points.width)
        faint = min(0.15, 0.4 / len(runs))  # or the bands of many hide the lines
        axes.fill_between(
            points.batches, points.low, points.high, color=colour, alpha=faint, linewidth=0
        )
        style = "-" if n < 10 else "--"
        # The first the widest: runs that agree are all seen.
        wide = 1.4 + 4 * (len(runs) - 1 - n) / max(3, len(runs) - 1)
        axes.plot(points.batches, points.mean, style, color=colour, linewidth=wide, label=name)
    warmup = max(run.warmup for run in runs)
    last = max(int(run.batches[-1]) for run in runs)
    if warmup:
        axes.axvspan(0, warmup, color="#e8e8e8", zorder=0, linewidth=0, label="warm-up")
    most = max(int(run.groups.max()) for run in runs) + 1
    axes.set(xlabel="batch", ylabel="groups", xlim=(0, last), ylim=(0, 1.05 * most + 0.2))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(0.55)
    axes.set_anchor("N")
    of = f", mean of {width} batches; shaded: least and most" if width > 1 else ""
    axes.set_title(f"Number of groups{of}", loc="left")


def _mean_of(runs: int) -> str:
    return f", mean of {runs} runs" if runs > 1 else ""


def _name_tasks(axes: Axes, names: Sequence[str], size: float) -> None:
    turned, align = (45, "right") if size == 9 else (90, "center")
    axes.set_xticks(range(len(names)), names, rotation=turned, ha=align, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write_values(axes: Axes, values: Floats) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
