"""Affinities against gains: the tables and the picture."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["affinity_gain_plot", "markdown", "tables", "write_csv"]

_DPI = 150
_TITLES = {
    "proximal": "Proximal",
    "gradient": "From gradients",
    "lookahead": "Lookahead",
}
_HEADER = ("Rank correlation with the gain", "of ordered pairs", "of pairs")


class _Correlation(Protocol):
    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def tables(gains: Any) -> list[RenderableType]:
    """The correlations, for a terminal.

    Args:
        gains: a :class:`taskgroup.lab.compare.affinity_gain.Gains`.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for k, column in enumerate(_HEADER):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
    for row in _rows(gains):
        table.add_row(*row)
    return [Text(_headline(gains), style="bold"), table, Text(_note(gains), style="dim")]


def markdown(gains: Any, command: str) -> str:
    """The correlations and the gains, as Markdown.

    Args:
        gains: a :class:`taskgroup.lab.compare.affinity_gain.Gains`.
        command: that made it.
    """
    titles = [gains.problem.titles[task] for task in gains.tasks]
    lines = [f"# {_headline(gains)}", "", f"```\n{command}\n```", ""]
    lines += [f"| {' | '.join(_HEADER)} |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(gains)]
    lines += ["", _note(gains), "", "## Gains"]
    lines += ["", "What the task of the column gains with the task of the row, percent.", ""]
    lines += [f"| | {' | '.join(titles)} |", "|---" + "|---:" * len(titles) + "|"]
    for title, row in zip(titles, gains.gain, strict=True):
        cells = ["" if math.isnan(value) else f"{value:+.1f}" for value in row]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(gains: Any, path: str | os.PathLike[str]) -> None:
    """A line per ordered pair: the gain and every affinity."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["with", "task", "gain_percent", *gains.affinity])
        for i, other in enumerate(gains.tasks):
            for k, task in enumerate(gains.tasks):
                if i != k:
                    values = [gains.gain[i, k], *(found[i, k] for found in gains.affinity.values())]
                    known = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
                    writer.writerow([other, task, *known])


def affinity_gain_plot(gains: Any, path: str | os.PathLike[str]) -> None:
    """The gain of every ordered pair against its affinity, a panel for each kind of affinity.

    Args:
        gains: a :class:`taskgroup.lab.compare.affinity_gain.Gains`.
        path: of the PNG.
    """
    figure = Figure(figsize=(4.1 * len(gains.affinity), 3.7), layout="constrained")
    panels: Any = figure.subplots(1, len(gains.affinity), sharey=True, squeeze=False)
    off_diagonal = ~np.eye(len(gains.tasks), dtype=bool)
    for axes, (kind, found) in zip(panels[0], gains.affinity.items(), strict=True):
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        axes.axvline(0, color="#bbbbbb", linewidth=0.8)
        # A task with hardly any effect on itself makes huge ratios, which would squeeze the rest.
        shown = np.clip(found[off_diagonal], -3, 3)
        axes.plot(shown, gains.gain[off_diagonal], "o", color="#4393c3", markersize=4, alpha=0.6)
        axes.set(xlabel="affinity / self-affinity")
        axes.set_title(f"{_TITLES[kind]}: {_shown(gains.directed[kind])}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("gain of training the pair together, %")
    figure.savefig(path, dpi=_DPI)


def _rows(gains: Any) -> list[list[str]]:
    rows = [
        [_TITLES[kind], _shown(gains.directed[kind]), _shown(gains.symmetric[kind])]
        for kind in gains.affinity
    ]
    if gains.repeatable is not None:
        rows.append(["The gains of other seeds", _shown(gains.repeatable), ""])
    return rows


def _headline(gains: Any) -> str:
    seeds = f"{gains.seeds} seed{'s' if gains.seeds > 1 else ''}"
    return f"{gains.recipe.data}: affinity and gain, pairs of {len(gains.tasks)} tasks, {seeds}"


def _note(gains: Any) -> str:
    note = (
        "Gain: of the held-out metric of a task when trained with another, over training alone, "
        f"for {gains.recipe.batches} batches. Spearman's correlation, in brackets the 95% interval "
        "of a bootstrap over the tasks."
    )
    if gains.repeatable is not None:
        note += (
            " The last row: the gains of half the seeds with those of the other half, which bounds "
            "what an affinity can foretell."
        )
    return note


def _shown(correlation: _Correlation) -> str:
    value, low, high = correlation.value, correlation.low, correlation.high
    if math.isnan(value):
        return "unknown"
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})".replace(" ", "\N{NO-BREAK SPACE}")
