"""When group steps pay: tables and a picture over the heads' share of a joint step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import RenderableType
from rich.text import Text

from taskgroup.lab.report.colours import RUNS
from taskgroup.lab.report.matplotlib_figures import open_axes, save
from taskgroup.lab.studies.formats import TerminalTable, markdown_table, save_csv
from taskgroup.lab.studies.head_share import KindRow, PointRow, Shares
from taskgroup.lab.studies.limits import limits
from taskgroup.lab.studies.presets import JOINT
from taskgroup.lab.words import counted

__all__ = ["head_share_plot", "markdown", "tables", "write_csv"]

_OFF = 0.05  # from which on the time of runs differs from the budget in a note
_RECIPE_SIZE = "Joint, batch size of the recipe"
_SHIFT = 0.006  # of the share, between lines, so that their intervals are told apart


class _Line(NamedTuple):
    """How a kind is drawn; its marker and dashes tell it apart where its colour does not."""

    colour: str
    marker: str
    dashes: str


_LINES = {
    "learned-10": _Line(RUNS[1], "D", "-"),
    "learned-1": _Line(RUNS[1], "D", ":"),
    "random-10": _Line(RUNS[0], "o", "-"),
    "random-1": _Line(RUNS[0], "o", ":"),
    "singletons-10": _Line(RUNS[2], "^", "-"),
    "singletons-1": _Line(RUNS[2], "^", ":"),
    "repeated": _Line(RUNS[3], "s", "-"),
    JOINT: _Line("#222222", "", "--"),
}


def tables(shares: Shares) -> list[RenderableType]:
    """The differences and the batches, for a terminal."""
    shown: list[RenderableType] = [Text(_headline(shares), style="bold")]
    for header, rows in (_gain_table(shares), _batch_table(shares)):
        short = [[cell.replace("\N{NO-BREAK SPACE}", "").strip("*") for cell in r] for r in rows]
        shown.append(TerminalTable(header, short))
    return [*shown, *(Text(f"{note}\n", style="dim") for note in _notes(shares))]


def markdown(studies: Sequence[Shares], command: str) -> str:
    """The tables as Markdown, with the command line that made them."""
    parts = [f"# {_headline(studies[0])}", f"```\n{command}\n```"]
    for k, shares in enumerate(studies):
        parts += [
            *([f"# {_headline(shares)}"] if k else []),
            markdown_table(*_gain_table(shares)),
            "\n".join(f"- {note}" for note in _notes(shares)),
            "## Batches at equal time",
            "In brackets: the time of a batch, in batches of joint training at the batch size of "
            "the recipe.",
            markdown_table(*_batch_table(shares)),
        ]
    return "\n\n".join(parts) + "\n"


def write_csv(studies: Sequence[Shares], path: str | os.PathLike[str]) -> None:
    """Write a line for every kind of training at every point."""
    header = ["data", "point", "head_share", "joint_seconds", "best_joint", "noise_floor", "kind"]
    header += ["batches", "joint_batches_per_batch", "time", "steps", "gain", "gain_half"]
    rows = [
        [
            *(shares.recipe.data, row.point.title, row.share, row.seconds, row.joint.name),
            *(row.floor, kind.variant.name, kind.batches, shares.recipe.batches / kind.batches),
            kind.time,
            *(kind.steps, kind.gain.mean, kind.gain.half, kind.verdict, kind.diverged),
        ]
        for shares in studies
        for row in shares.points
        for kind in row.kinds
    ]
    save_csv(path, [*header, "verdict", "diverged"], rows)


def head_share_plot(studies: Sequence[Shares], path: str | os.PathLike[str]) -> None:
    """Draw the difference to the best joint training over the share, a panel for each data set.

    The noise floor is shaded. What is far from joint training would press all others together: it
    is written at the edge.
    """
    figure = Figure(figsize=(1.2 + 6.2 * len(studies), 5.2), layout="constrained")
    (panels,) = figure.subplots(1, len(studies), squeeze=False)
    for axes, shares in zip(panels, studies, strict=True):
        _draw(axes, shares)
    panels[0].set_ylabel("difference to the best joint training\nat equal time, %   (better →)")
    drawn = {
        label: artist
        for axes in panels
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        drawn.values(),
        drawn.keys(),
        loc="outside lower left",
        ncols=2 * len(studies),
        frameon=False,
        fontsize=9,
    )
    save(figure, path)


def _draw(axes: Axes, shares: Shares) -> None:
    lines = {name: _line(shares, name) for name in _LINES}
    # A group per task is far below where heads are light: it does not stretch the axis.
    near = [k.gain for name in lines if "singletons" not in name for _, k in lines[name]]
    low, high = limits([gain.mean for gain in near], [gain.half for gain in near])
    _draw_floor(axes, shares)
    for k, (name, line) in enumerate(lines.items()):
        style = _LINES[name]
        x = [share + (k - len(_LINES) / 2) * _SHIFT for share, _ in line]
        means = [kind.gain.mean for _, kind in line]
        often = style.dashes == ":"
        axes.errorbar(
            x,
            means,
            [kind.gain.half for _, kind in line],
            color=style.colour,
            marker=style.marker,
            linestyle=style.dashes,
            markerfacecolor="white" if often else style.colour,
            markersize=5,
            linewidth=1.0 if often else 1.8,
            elinewidth=0.9,
            capsize=2,
            zorder=2 if often or not style.marker else 3,
            label=_RECIPE_SIZE if name == JOINT else line[0][1].variant.title,
        )
        for place, mean in zip(x, means, strict=True):
            if not low <= mean <= high and not math.isnan(mean):
                _write_outside(axes, place, mean, low, high, style.colour, often)
    axes.set(xlim=(0, 1), ylim=(low, high))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.set_xlabel("share of a joint step that the heads take")
    seeds = counted(shares.seeds, "seed")
    open_axes(axes, f"{shares.recipe.data}: 95% intervals over {seeds}", size="medium")


def _line(shares: Shares, name: str) -> list[tuple[float, KindRow]]:
    """A kind at every point, with the share there."""
    return [
        (row.share, kind)
        for row in shares.points
        for kind in row.kinds
        if kind.variant.name == name
    ]


def _draw_floor(axes: Axes, shares: Shares) -> None:
    """Shade what joint training differs from itself by chance."""
    known = [row for row in shares.points if math.isfinite(row.floor)]
    if known:
        floor = np.array([row.floor for row in known])
        label = "noise floor of joint training"
        style: dict[str, Any] = {"color": "#e4e4e4", "linewidth": 0, "zorder": 0, "label": label}
        axes.fill_between([row.share for row in known], -floor, floor, **style)
    axes.axhline(0, color="#888888", linewidth=0.8, zorder=1)


def _write_outside(
    axes: Axes, x: float, mean: float, low: float, high: float, colour: str, second: bool
) -> None:
    """A value that is not on the axis, at its nearer edge; a second one further inside."""
    below = mean < low
    room = 14 if second else 4
    axes.annotate(
        f"{mean:.0f} {'▾' if below else '▴'}",
        (x, low if below else high),
        xytext=(0, room if below else -room),
        textcoords="offset points",
        ha="center",
        va="bottom" if below else "top",
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        zorder=4,
    )


def _headline(shares: Shares) -> str:
    recipe = shares.recipe
    return (
        f"{recipe.data}: when group steps pay, {len(shares.tasks)} tasks, the time of "
        f"{recipe.batches} joint batches of {recipe.batch_size}, {counted(shares.seeds, 'seed')}"
    )


def _gain_table(shares: Shares) -> tuple[list[str], list[list[str]]]:
    points = shares.points
    floors = ["" if math.isnan(row.floor) else f"{row.floor:.1f}" for row in points]
    rows = [
        ["Share of a joint step", *(f"{row.share:.0%}" for row in points)],
        ["Joint batch, ms", *(f"{1e3 * row.seconds:.1f}" for row in points)],
        ["Noise floor", *floors],
        *(
            [kinds[0].variant.title, *map(_shown, points, kinds)]
            for kinds in zip(*(row.kinds for row in points), strict=True)
        ),
    ]
    return ["Heads", *(row.point.title for row in points)], rows


def _batch_table(shares: Shares) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            kinds[0].variant.title,
            *(
                f"{kind.batches}\N{NO-BREAK SPACE}({shares.recipe.batches / kind.batches:.2f})"
                for kind in kinds
            ),
        ]
        for kinds in zip(*(row.kinds for row in shares.points), strict=True)
    ]
    return ["Batches", *(row.point.title for row in shares.points)], rows


def _shown(row: PointRow, kind: KindRow) -> str:
    if kind.variant == row.joint:
        return "best"
    if kind.gain.n == 0:
        return "diverged" if kind.diverged else ""
    text = kind.gain.shown() + (f" ({kind.diverged} diverged)" if kind.diverged else "")
    return f"**{text}**" if kind.verdict else text


def _notes(shares: Shares) -> list[str]:
    notes = [
        "Every kind of training gets the time of the same number of joint batches at the batch "
        "size of the recipe. Times are processor seconds on one thread, measured in turns.",
        "The numbers are mean gains over the tasks on held-out data, in percent of the metrics of "
        "joint training at its best batch size (best), with the 95% interval over the seeds. "
        "Higher is better. The batch size is chosen by the same seeds, which favours joint "
        "training.",
        "Noise floor: how far two sets of runs of that joint training differ by chance. Numbers in "
        "bold are outside both this floor and their own interval.",
    ]
    notes += [
        f"{row.point.title}: {kind.variant.title} took {kind.time:.2f} times the time of the "
        "others, because its number of groups changed after its batches were measured."
        for row in shares.points
        for kind in row.kinds
        if abs(kind.time - 1) > _OFF
    ]
    return notes
