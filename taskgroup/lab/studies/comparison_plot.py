"""The picture of a comparison: Δm of every variant for every budget, and the time per batch."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from taskgroup.lab.report.colours import HARMS, SERVES
from taskgroup.lab.report.matplotlib_figures import open_axes, save
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.limits import limits
from taskgroup.lab.studies.results import Row, Table
from taskgroup.lab.words import counted

__all__ = ["delta_m_plot"]

_NAME = 34  # characters of a line of a name
_SIZE = 9  # points
_CHARACTER = 0.6 * _SIZE / 72  # inches
_PANEL, _TIME_PANEL = 2.6, 1.7  # inches
_LINE = 0.15  # inches
_LINE_STYLE: dict[str, Any] = {"color": "#888888", "lw": 0.8, "linestyle": "--", "zorder": 1}


class _Kind(NamedTuple):
    """A kind of variant; its shape tells it apart where its colour does not."""

    title: str
    colour: str
    marker: str


_SELECTIVE = _Kind("selective updates", HARMS, "D")
_JOINT = _Kind("joint training (GD)", "#222222", "s")
_OTHER = _Kind("other methods", SERVES, "o")


def delta_m_plot(table: Table, path: str | os.PathLike[str]) -> None:
    """Draw Δm of every variant with its interval, a panel per budget, and the time per batch.

    The best variant of the last budget stands at the top. The noise floor around joint training is
    shaded. A variant that is far from all others would press them together: it has no marker, and
    its Δm is written at the edge of the panel.
    """
    last = table.budgets[-1]
    rows = sorted(table.rows, key=lambda row: _order(row.delta[last, "held_out"]))
    names = [textwrap.fill(row.variant.title, _NAME) for row in rows]
    lines = [name.count("\n") + 1 for name in names]
    longest = max(len(line) for name in names for line in name.split("\n"))

    width = longest * _CHARACTER + len(table.budgets) * _PANEL + _TIME_PANEL + 0.4
    headline = textwrap.fill(table.headline, int(width / (1.3 * _CHARACTER)))
    height = 1.7 + 0.25 * headline.count("\n") + sum(0.11 + _LINE * n for n in lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(headline, x=0.01, ha="left", size="medium", weight="bold")
    ratios = [_PANEL] * len(table.budgets) + [_TIME_PANEL]
    *panels, times = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios)

    # The rows that have more lines are higher.
    ends = [sum(0.11 + _LINE * n for n in lines[: k + 1]) for k in range(len(lines))]
    places = [end - (0.11 + _LINE * n) / 2 for end, n in zip(ends, lines, strict=True)]
    for axes, budget in zip(panels, table.budgets, strict=True):
        _draw_delta(axes, table, rows, places, budget)
    _draw_times(times, rows, places)
    for axes in (*panels, times):
        axes.grid(alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(labelsize=_SIZE)
    panels[0].set_yticks(places, names)
    panels[0].set_ylim(ends[-1] + 0.05, -0.05)
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        if _kind(row) is _SELECTIVE:
            label.set_fontweight("bold")
    shown = _legend([*panels, times])
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="outside lower left",
        ncols=max(1, int(width / 2.3)),
        frameon=False,
        fontsize=_SIZE - 1,
    )
    save(figure, path)


def _order(delta: Estimate) -> float:
    """Descending; variants of which every run diverged are the last."""
    return -delta.mean if delta.n else math.inf


def _draw_delta(
    axes: Axes, table: Table, rows: Sequence[Row], places: Sequence[float], budget: str
) -> None:
    """Δm of the rows: a marker at the mean and a line over the interval."""
    key = (budget, "held_out")
    low, high = limits([row.delta[key].mean for row in rows], [row.delta[key].half for row in rows])
    centre, floor = table.joint.delta[key].mean, table.joint.floor[key]
    if centre - floor < high and centre + floor > low:  # False for NaN: it needs several seeds
        label = "noise floor around GD"
        ends = (centre - floor, centre + floor)
        axes.axvspan(*ends, color="#e4e4e4", linewidth=0, zorder=0, label=label)
    if low <= 0 <= high:
        axes.axvline(0, **_LINE_STYLE, label="single-task training")
    interval = f"95% interval over {counted(table.seeds, 'seed')}"
    for row, y in zip(rows, places, strict=True):
        kind, delta = _kind(row), row.delta[key]
        diverged = row.diverged[budget]
        note = f"{diverged} diverged" if diverged else ""
        if not delta.n:
            note = "diverged" if diverged else "no run"
        elif not low <= delta.mean <= high:
            note = f"{delta.shown()}{note and f', {note}'}"
        else:
            _draw_interval(axes, delta, y, kind.colour, (low, high), interval)
            _draw_marker(axes, delta.mean, y, kind)
        if note:
            _write(axes, note, y, kind.colour, _side(delta, low, high))
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    open_axes(axes, table.title(budget).capitalize(), size="medium")
    axes.set_xlabel("Δm, %   (better →)", fontsize=_SIZE)


def _draw_marker(axes: Axes, x: float, y: float, kind: _Kind) -> None:
    axes.plot(*(x, y, kind.marker), color=kind.colour, markersize=5.5, zorder=3, label=kind.title)


def _draw_interval(
    axes: Axes, delta: Estimate, y: float, colour: str, ends: tuple[float, float], label: str
) -> None:
    """A line with a bar at either end, or with an arrow where it leaves the axis."""
    if math.isnan(delta.half):
        return
    for end, edge, arrow in (
        (delta.mean - delta.half, ends[0], "<"),
        (delta.mean + delta.half, ends[1], ">"),
    ):
        outside = end < edge if arrow == "<" else end > edge
        line = (delta.mean, edge if outside else end)
        axes.plot(line, (y, y), color=colour, linewidth=1.3, zorder=2, label=label)
        if outside:
            place = (line[1], y)
            tip = {"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0}
            towards = (6 if arrow == "<" else -6, 0)
            axes.annotate("", place, towards, textcoords="offset points", arrowprops=tip)
        else:
            axes.plot(end, y, "|", color=colour, markersize=6, zorder=2)


def _side(delta: Estimate, low: float, high: float) -> str:
    """At which edge of the panel a note on a row is written: where its Δm is not."""
    if delta.n and delta.mean < low:
        return "<"
    if delta.n and delta.mean > high:
        return ">"
    return "left" if delta.n and delta.mean > (low + high) / 2 else "right"


def _write(axes: Axes, note: str, y: float, colour: str, side: str) -> None:
    """A note at the edge of a panel, with an arrow if it is a value outside."""
    left = side in ("<", "left")
    if side == "<":
        note = f"◂ {note}"
    elif side == ">":
        note = f"{note} ▸"
    axes.annotate(
        note,
        (0.0 if left else 1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(3 if left else -3, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center_baseline",
        fontsize=_SIZE - 1,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        zorder=4,
    )


def _draw_times(axes: Axes, rows: Sequence[Row], places: Sequence[float]) -> None:
    """The time per batch of the rows, on a logarithmic axis."""
    axes.set_xscale("log")
    known = [row.time for row in rows if math.isfinite(row.time)]
    for row, y in zip(rows, places, strict=True):
        if math.isfinite(row.time):
            _draw_marker(axes, row.time, y, _kind(row))
    axes.axvline(1, **_LINE_STYLE)
    axes.set_xlim(0.8 * min([0.8, *known]), 1.25 * max([2.5, *known]))
    low, high = axes.get_xlim()
    # As many of 1, 2, 5, 10, ... as there is room for.
    subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 200 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    open_axes(axes, "Time per batch", size="medium")
    axes.set_xlabel("relative to GD, log axis\n(← faster)", fontsize=_SIZE)


def _legend(panels: Sequence[Axes]) -> dict[str, Artist]:
    """What was drawn, and nothing else: ``{label: artist}``."""
    drawn: dict[str, Artist] = {}
    for axes in panels:
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, artist)
    kinds = [kind.title for kind in (_SELECTIVE, _JOINT, _OTHER) if kind.title in drawn]
    return {label: drawn[label] for label in dict.fromkeys([*kinds, *drawn])}


def _kind(row: Row) -> _Kind:
    return {"selective": _SELECTIVE, "gd": _JOINT}.get(
        row.variant.settings.get("method", ""), _OTHER
    )
