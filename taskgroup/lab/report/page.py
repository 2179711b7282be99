"""The report: runs on one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

import taskgroup as tg
from taskgroup.lab.report import plotly_figures as figures
from taskgroup.lab.report import plotly_matrices as matrices
from taskgroup.lab.report.affinities import has_affinity
from taskgroup.lab.report.colours import colour_of_run
from taskgroup.lab.report.groups import task_order
from taskgroup.lab.report.labels import differences, short, short_names, titles
from taskgroup.lab.report.plotly_parts import Card, Shown
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.report.timing import seconds_per_batch, three_digits
from taskgroup.lab.words import listed

__all__ = ["write_report"]

_FEW_COLUMNS = 4  # of a table that a narrow window has room for


class _Section(NamedTuple):
    """A heading, a text, and figures (side by side where there is room) or a table in HTML.

    ``lines`` are the runs whose colours the figures use, if they show several.
    """

    title: str
    words: str
    cards: Sequence[Card] = ()
    table: str = ""
    lines: Sequence[Shown] = ()


def write_report(
    runs: Sequence[RunData], path: str | os.PathLike[str], notes: Sequence[str] = ()
) -> list[str]:
    """Write an HTML page on runs, finished or still training.

    The page shows the affinity and the groups over time, the losses, the time per batch, gradient
    conflicts and metrics, as far as the runs have recorded them. It opens without a network.

    Args:
        runs: the runs to show.
        path: of the HTML file, which is written whole or not at all.
        notes: sentences to show on what was left out before.

    Returns:
        The notes of the page, which are ``notes`` and what else was left out and why.

    Raises:
        ValueError: if there is no run, or no run has finished its first batch.
        OSError: if the file cannot be written.
    """
    begun = [run for run in runs if len(run.batches)]
    if not begun:
        raise ValueError(
            f"There is nothing to report: {listed([run.name for run in runs])} "
            "has not finished its first batch yet."
        )
    notes = [
        *notes,
        *(f"{run.name} has not finished its first batch yet." for run in runs if run not in begun),
    ]
    names = short_names(begun)
    shown = [
        Shown(run, name, task_order(run, begun), n, titles(run))
        for n, (run, name) in enumerate(zip(begun, names, strict=True))
    ]
    related = [run for run in shown if len(run.data.tasks) > 1]
    bars, left_out = seconds_per_batch(begun)
    losses, loss_cards, lines = figures.losses(shown)
    counts, count_cards = figures.number_of_groups(shown)
    sections = [
        _Section("Runs", "", table=_runs_table(shown)),
        _Section(
            "Affinity over time",
            "How much the steps on two tasks lower each other's losses: the mean of both effects, "
            "each relative to the effect of a task's own step. Affinity propagation groups the "
            "tasks by these values; frames show the groups after the batch. Blue: the steps help. "
            "Red: they harm. Empty: the tasks were never measured together, or one of them has no "
            "positive self-affinity yet. Point at a cell for the effect of its row on its column.",
            [matrices.affinity(run) for run in shown if has_affinity(run.data)],
        ),
        _Section(
            "Groups over time",
            "A row for each task, a colour for each group; below are the groups after the last "
            "batch. Grey: the task is alone in its group. A group keeps its colour while tasks "
            "join and leave it. The dotted line marks the end of the warm-up.",
            [figures.partition(run) for run in related if run.data.method == "selective"],
        ),
        _Section(
            "Number of groups",
            counts,
            count_cards,
            lines=figures.with_groups(shown),
        ),
        _Section("Losses", losses, loss_cards, lines=shown if lines else ()),
        _Section(
            "Time per batch",
            "The time that each section of a batch takes, averaged over all batches so far, the "
            "warm-up included. A bar is the mean of the runs whose settings that affect the time "
            "are the same, such as runs with different seeds.",
            [figures.time_per_batch(bars)] if bars else [],
        ),
        _Section(
            "Gradient conflicts",
            "Cosine similarity of the gradients of two tasks on the shared parameters, measured "
            "before the batch. Blue: the gradients point in the same direction. Red: they point in "
            "opposite directions. Frames: the groups after the batch.",
            [matrices.conflicts(run) for run in related if len(run.data.conflicts.batches)],
        ),
        _Section(
            "Held-out data over time",
            "The metric of each task on held-out data, evaluated during training and at its end. "
            "↑: higher is better. ↓: lower is better.",
            figures.evaluations(shown),
            lines=[run for run in shown if len(run.data.evaluations.batches)],
        ),
        _Section(
            "Held-out data",
            "The metric of each task at the end of training. ↑: higher is better. ↓: lower is "
            "better. Where the direction is known, the best value in a row is bold.",
            table=_metrics_table(shown),
        ),
    ]
    if not any(len(run.conflicts.batches) for run in begun):
        notes.append(
            "Gradient conflicts are not shown because no run has measured them. To measure them "
            "every 100 batches, train with: taskgroup train --set conflicts_every=100. In your own "
            "loop, call the recorder's method conflicts()."
        )
    notes += left_out
    page = _page([s for s in sections if s.cards or s.table], names, notes)
    tg.checkpoint.write_atomically(Path(path), lambda file: file.write(page.encode()))
    return notes


def _runs_table(runs: Sequence[Shown]) -> str:
    rows = []
    for run, other in zip(runs, differences([run.data for run in runs]), strict=True):
        data, settings, finished = run.data, run.data.settings, run.data.finished
        batches, planned = int(data.batches[-1]), settings.get("batches")
        selective = data.method == "selective"
        delta = peak = ""
        if finished is not None and finished.delta_m is not None:
            delta = f"{finished.delta_m:+.2f} % against {short(str(settings.get('baseline')))}"
        if finished is not None and finished.peak_bytes is not None:
            peak = f"{finished.peak_bytes / 2**30:.2f} GiB"
        state = "" if finished is None else "finished"
        if finished is None and planned:
            state = f"{100 * batches // planned} %"
        ways = [data.method]
        if selective:
            inside = settings.get("group_weights")
            ways += [str(settings.get("grouping", "")), f"{inside} inside" if inside else ""]
        cells = {
            "method": ", ".join(filter(None, ways)),
            "seed": str(settings.get("seed", "")),
            "batches": f"{batches:,} of {planned:,}" if planned else f"{batches:,}",
            "state": state,
            "groups": str(int(data.groups[-1].max()) + 1) if selective else "",
            "time per batch": _duration(data.seconds["everything"]) if data.seconds else "",
            "GPU memory": peak,
            "Δm": delta,
            "other settings": other,
        }
        rows.append(
            {"run": _key(run.name, run.number)}
            | {column: html.escape(cell) for column, cell in cells.items()}
        )
    header = [column for column in rows[0] if any(row[column] for row in rows)]
    return _table(header, [[row[column] for column in header] for row in rows])


def _key(name: str, n: int) -> str:
    """The name of the n-th run behind its colour."""
    return f"{_swatch(colour_of_run(n))}{html.escape(name)}"


def _swatch(colour: str) -> str:
    return f'<i style="background:{colour}"></i>'


def _duration(seconds: float) -> str:
    scale, unit = (1e3, "ms") if seconds < 0.9995 else (1.0, "s")
    return f"{three_digits(scale * seconds)} {unit}"


def _metrics_table(runs: Sequence[Shown]) -> str:
    """A row for each task and metric of a data set, a column for each finished run."""
    measured = [(run, run.data.finished) for run in runs if run.data.finished is not None]
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for run, finished in measured:
        for task, value in finished.metrics.items():
            title = run.titles.get(task, task)
            key = str(run.data.settings.get("data")), title, finished.metric_names.get(task, "")
            found.setdefault(key, {})[run.number] = value
    rows = []
    for (_, title, metric), values in found.items():
        best = None
        choose = {"↓": min, "↑": max}.get(metric[-1:])  # a recorder need not be told
        if choose is not None and len(values) > 1:
            best = choose(filter(np.isfinite, values.values()), default=None)
        shown = {
            n: f"<b>{value:.4f}</b>" if value == best else f"{value:.4f}"
            for n, value in values.items()
        }
        cells = (shown.get(run.number, "") for run, _ in measured)
        rows.append([html.escape(title), html.escape(metric), *cells])
    header = ["task", "metric", *(html.escape(run.name) for run, _ in measured)]
    return _table(header, rows) if rows else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; in a narrow window each row of one with many columns becomes a list."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, header, row))}</tr>" for row in rows)
    kind = ' class="many"' if len(header) > _FEW_COLUMNS else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>{body}</table></div>'


def _cell(column: str, cell: str) -> str:
    return f'<td data-column="{html.escape(column)}">{cell}</td>'


def _key_line(entries: Iterable[tuple[str, str]]) -> str:
    """A legend: the colour and the text of each entry."""
    spans = [f"<span>{_swatch(colour)}{html.escape(text)}</span>" for colour, text in entries]
    return f'<p class="key">{"".join(spans)}</p>' if spans else ""


def _player(card: Card) -> str:
    """The controls of a figure of several moments; the page's script moves the figure."""
    moments = len(card.figure.frames) - 1
    if moments < 1:
        return ""
    return (
        '<div class="player"><button type="button" disabled>Play</button>'
        f'<input type="range" min="0" max="{moments}" value="{moments}" disabled '
        'aria-label="batch">'
        f"<output>batch {card.figure.frames[-1].name}</output></div>"
    )


def _page(sections: Sequence[_Section], names: Sequence[str], notes: Sequence[str]) -> str:
    body: list[str] = []
    scripts: list[str] = []
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        if section.words:
            body.append(f"<p>{html.escape(section.words)}</p>")
        if len(names) > 1:
            body.append(_key_line((colour_of_run(run.number), run.name) for run in section.lines))
        body.append(section.table)
        least = max((card.width for card in section.cards), default=0)
        body.append(f'<div class="cards" style="--least:{least}px">' if section.cards else "")
        for card in section.cards:
            title = f"<h3>{html.escape(card.title)}</h3>" if card.title else ""
            height = f"height:{card.figure.layout.height:.0f}px"
            widest = "" if card.widest is None else f' style="max-width:{card.widest}px"'
            body.append(
                f'<div class="card"{widest}>{title}{_player(card)}'
                f'<div class="plot" data-figure="figure-{len(scripts)}" '
                f'data-numbers="{card.numbers}" style="{height}"></div>'
                f"{_key_line(card.key)}</div>"
            )
            scripts.append(
                f'<script type="application/json" id="figure-{len(scripts)}">{card.json()}</script>'
            )
        body.append("</div></section>" if section.cards else "</section>")
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(f"<section><h2>Notes</h2><ul>{items}</ul></section>")
    template = Template(_file("page.html"))
    return template.substitute(
        title=html.escape(", ".join(names[:3]) + (", ..." if len(names) > 3 else "")),
        version=tg.__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        body="\n".join(part for part in body if part),
        figures="\n".join(scripts),
        plotly=plotly_program(),
    )


def plotly_program() -> str:
    """The part of plotly.js that draws flat axes; it starts in about half the time of the whole.

    It is version 4.1.1 of plotly.js-cartesian-dist-min from npm, unchanged.
    """
    return _file("plotly-cartesian.min.js")


def _file(name: str) -> str:
    return (resources.files("taskgroup.lab.report") / name).read_text("utf-8")
