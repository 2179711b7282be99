"""Affinities and gains: tables and a picture."""

from __future__ import annotations

import math
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import RenderableType
from rich.text import Text

from taskgroup.lab.report.colours import SERVES
from taskgroup.lab.report.matplotlib_figures import open_axes, save
from taskgroup.lab.studies.affinity_gain import AFFINITIES, Gains
from taskgroup.lab.studies.formats import TerminalTable, markdown_table, save_csv
from taskgroup.lab.studies.intervals import Correlation, Floats
from taskgroup.lab.studies.limits import limits
from taskgroup.lab.words import counted

__all__ = ["affinity_gain_plot", "markdown", "tables", "write_csv"]

_HEADER = ("Rank correlation with the gain", "of ordered pairs", "of pairs")


def tables(gains: Gains) -> list[RenderableType]:
    """The correlations, for a terminal."""
    rows = [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in _rows(gains)]
    table = TerminalTable(_HEADER, rows)
    return [Text(_headline(gains), style="bold"), table, Text(_note(gains), style="dim")]


def markdown(gains: Gains, command: str) -> str:
    """The correlations and the gains as Markdown, with the command line that made them."""
    titles = [gains.problem.titles[task] for task in gains.tasks]
    rows = [
        [title, *("" if math.isnan(value) else f"{value:+.1f}" for value in row)]
        for title, row in zip(titles, gains.gain.tolist(), strict=True)
    ]
    parts = [
        f"# {_headline(gains)}",
        f"```\n{command}\n```",
        markdown_table(_HEADER, _rows(gains)),
        _note(gains),
        "## Gains",
        "Gain in percent of the task of the column when it is trained with the task of the row.",
        markdown_table(["", *titles], rows),
    ]
    return "\n\n".join(parts) + "\n"


def write_csv(gains: Gains, path: str | os.PathLike[str]) -> None:
    """Write a line per ordered pair: the gain and every affinity."""
    matrices = [gains.gain, *gains.affinity.values()]
    rows = [
        [other, task, *(float(matrix[i, k]) for matrix in matrices)]
        for i, other in enumerate(gains.tasks)
        for k, task in enumerate(gains.tasks)
        if i != k
    ]
    save_csv(path, ["with", "task", "gain_percent", *gains.affinity], rows)


def affinity_gain_plot(gains: Gains, path: str | os.PathLike[str]) -> None:
    """Draw the gain of every ordered pair against its affinity, a panel for each affinity.

    Pairs that are far from all others would press them together: they are counted at the edge.
    """
    figure = Figure(figsize=(3.9 * len(gains.affinity), 4.2), layout="constrained")
    figure.suptitle(_headline(gains), x=0.01, ha="left", size="medium", weight="bold")
    (panels,) = figure.subplots(1, len(gains.affinity), sharey=True, squeeze=False)
    off_diagonal = ~np.eye(len(gains.tasks), dtype=bool)
    gain = gains.gain[off_diagonal]
    bottom, top = limits(gain.tolist())
    for axes, (kind, found) in zip(panels, gains.affinity.items(), strict=True):
        affinity = found[off_diagonal]
        # A task with hardly any effect on itself has huge ratios.
        left, right = limits(affinity[np.isfinite(gain)].tolist())
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        axes.axvline(0, color="#bbbbbb", linewidth=0.8)
        axes.plot(affinity, gain, "o", color=SERVES, markersize=4, alpha=0.6)
        axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.set_xlabel("affinity / self-affinity", fontsize=9)
        inside = (affinity >= left) & (affinity <= right) & (gain >= bottom) & (gain <= top)
        outside = np.isfinite(affinity) & np.isfinite(gain) & ~inside
        if outside.any():
            axes.set_xlabel(
                f"affinity / self-affinity\n{counted(int(outside.sum()), 'pair')} outside: "
                f"affinity {_range(affinity[outside])},\ngain {_range(gain[outside])} %",
                fontsize=9,
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        correlation = f"rank correlation {_shown(gains.directed[kind])}"
        open_axes(axes, f"{AFFINITIES[kind]}\n{correlation}", size=10)
    panels[0].set_ylabel("gain of the task when the pair is\ntrained together, %   (better →)")
    save(figure, path)


def _range(values: Floats) -> str:
    ends = dict.fromkeys(f"{value:+.3g}" for value in (values.min(), values.max()))
    return " to ".join(ends)


def _rows(gains: Gains) -> list[list[str]]:
    rows = [
        [AFFINITIES[kind], _shown(gains.directed[kind]), _shown(gains.symmetric[kind])]
        for kind in gains.affinity
    ]
    if gains.repeatable is not None:
        rows.append(["The gains of other seeds", _shown(gains.repeatable), ""])
    return rows


def _headline(gains: Gains) -> str:
    seeds = counted(gains.seeds, "seed")
    return f"{gains.recipe.data}: affinity and gain, pairs of {len(gains.tasks)} tasks, {seeds}"


def _note(gains: Gains) -> str:
    note = (
        "Gain: how much the held-out metric of a task improves when the task is trained with "
        f"another task instead of alone, for {gains.recipe.batches} batches. Correlations are "
        "Spearman's, with the 95% interval of a bootstrap over the tasks in brackets."
    )
    if gains.repeatable is not None:
        note += (
            " Last row: the correlation between the gains of half of the seeds and the gains of "
            "the other half. It bounds what an affinity can predict."
        )
    return note


def _shown(correlation: Correlation) -> str:
    value, low, high = correlation
    if math.isnan(value):
        return "unknown"
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})".replace(" ", "\N{NO-BREAK SPACE}")
