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
from taskgroup.lab.report import cards
from taskgroup.lab.report import run_data as history
from taskgroup.lab.report.cards import Card, colour_of_run
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.words import listed

__all__ = ["write_report"]


class _Section(NamedTuple):
    """A heading, what to see, and figures or a table.

    Attributes:
        title: plain text.
        words: plain text.
        cards: side by side where the window is wide enough.
        table: HTML.
        lines: whether a line is a run.
    """

    title: str
    words: str
    cards: Sequence[Card] = ()
    table: str = ""
    lines: bool = False


def write_report(
    runs: Sequence[RunData], path: str | os.PathLike[str], notes: Sequence[str] = ()
) -> list[str]:
    """Write a page on runs, finished or still training.

    It shows the affinity and the groups over time, the losses, the time of a batch, conflicts and
    metrics, as far as the runs have recorded them, and opens without a network.

    Args:
        runs: those to show.
        path: of the HTML file, which is written whole or not at all.
        notes: sentences on what was left out before.

    Returns:
        The notes, and what else was left out and why, as the page has them.

    Raises:
        ValueError: if there is no run, or none has trained on a batch yet.
        OSError: if the file cannot be written.
    """
    shown = [run for run in runs if len(run.batches)]
    if not shown:
        raise ValueError(
            f"There is nothing to report: {listed([run.name for run in runs])} "
            "has trained on no batch yet."
        )
    begun = [f"{run.name} has trained on no batch yet." for run in runs if run not in shown]
    notes = [*notes, *begun]
    names = history.short_names(shown)
    order = {run.name: _order(run, shown) for run in shown}
    words, loss_cards, lines = cards.losses(shown, names, order)
    bars, left_out = history.seconds_per_batch(shown)
    sections = [
        _Section("Runs", "", table=_runs_table(shown, names)),
        _Section(
            "Affinity over time",
            "What a step on one task (row) does to the loss of another (column), in units of what "
            "a step on that other task does to it: blue serves, red harms. Grey where two tasks "
            "have never been measured together, or the other task not by itself. Tasks that often "
            "share a group are side by side.",
            [
                cards.affinities(run, name, order[run.name])
                for run, name in zip(shown, names, strict=True)
                if history.has_affinity(run)
            ],
        ),
        _Section(
            "Groups over time",
            "A row for each task, a colour for each group; grey is a task that is alone. A group "
            "keeps its colour while tasks join and leave it. Dotted: the end of the warm-up.",
            [
                cards.partition(run, name, order[run.name])
                for run, name in zip(shown, names, strict=True)
                if run.method == "selective" and len(run.tasks) > 1
            ],
        ),
        _Section("Number of groups", "", cards.group_counts(shown, names), lines=True),
        _Section("Losses", words, loss_cards, lines=lines),
        _Section(
            "Time of a batch",
            "Where the time of a batch goes, warm-up included; of a run that is training, so far. "
            "The mean of runs that differ in nothing that takes time.",
            [cards.times(bars)] if bars else [],
        ),
        _Section(
            "Conflicts",
            "Cosines of the tasks' gradients on the shared parameters: red where two tasks pull "
            "apart, blue where they pull together.",
            [
                cards.conflicts(run, name, order[run.name])
                for run, name in zip(shown, names, strict=True)
                if len(run.conflicts) and len(run.tasks) > 1
            ],
        ),
        _Section(
            "Held-out data over time",
            "Metrics of each task, evaluated on the way.",
            cards.evaluations(shown, names),
            lines=True,
        ),
        _Section(
            "Held-out data",
            "At the end. ↑ higher is better, ↓ lower; the best of each row is bold.",
            table=_metrics_table(shown, names),
        ),
    ]
    if not any(len(run.conflicts) for run in shown):
        notes.append(
            "No conflicts are shown: no run has measured any (taskgroup train --set "
            "conflicts_every=100 does)."
        )
    notes += left_out
    page = _page([s for s in sections if s.cards or s.table], shown, names, notes)
    tg.checkpoint.write_atomically(Path(path), lambda file: file.write(page.encode()))
    return notes


def _order(run: RunData, runs: Sequence[RunData]) -> list[int]:
    """Positions of the tasks as they are shown: the same in all runs on the same tasks."""
    peers = [
        other
        for other in runs
        if other.method == "selective"
        and set(other.tasks) == set(run.tasks)
        and other.batches[-1] > other.warmup
    ]
    if not peers:
        return list(range(len(run.tasks)))
    tasks = peers[0].tasks
    found = history.order_by_share(history.average_share(peers))
    return [run.tasks.index(tasks[k]) for k in found]


def _runs_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    header = ["run", "method", "seed", "batches", "state", "groups", "time of a batch"]
    header += ["GPU memory", "Δm", "what else differs"]
    rows = []
    for n, (run, name, other) in enumerate(
        zip(runs, names, history.differences(runs), strict=True)
    ):
        batches, planned = int(run.batches[-1]), int(run.settings["batches"])
        selective = run.method == "selective"
        against = history.short(str(run.settings["baseline"]))
        rows.append(
            [
                f'<i style="background:{colour_of_run(n)}"></i>{html.escape(name)}',
                html.escape(f"selective, {run.settings['grouping']}" if selective else run.method),
                str(run.settings["seed"]),
                f"{batches:,} of {planned:,}",
                "finished" if run.metrics is not None else f"{100 * batches // planned} %",
                str(int(run.groups[-1].max()) + 1) if selective else "",
                _duration(run.seconds["everything"]) if run.seconds else "",
                "" if run.peak_bytes is None else f"{run.peak_bytes / 2**30:.2f} GiB",
                ""
                if run.delta_m is None
                else html.escape(f"{run.delta_m:+.2f} % against {against}"),
                html.escape(other),
            ]
        )
    keep = [0, *(c for c in range(1, len(header)) if any(row[c] for row in rows))]
    return _table([header[c] for c in keep], [[row[c] for c in keep] for row in rows])


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _metrics_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    measured = [(run, name) for run, name in zip(runs, names, strict=True) if run.metrics]
    found: dict[tuple[str, str, str], dict[int, float]] = {}  # of one data set, task and metric
    for n, (run, _) in enumerate(measured):
        for task, value in (run.metrics or {}).items():
            key = str(run.settings["data"]), task, run.metric_names.get(task, "")
            found.setdefault(key, {})[n] = value
    rows = []
    for (_, task, metric), values in found.items():
        finite = [value for value in values.values() if np.isfinite(value)]
        best = (
            (min if metric.endswith("↓") else max)(finite) if len(values) > 1 and finite else None
        )
        cells = ["" if n not in values else f"{values[n]:.4f}" for n in range(len(measured))]
        cells = [
            f"<b>{cell}</b>" if best is not None and values.get(n) == best else cell
            for n, cell in enumerate(cells)
        ]
        rows.append([html.escape(task), html.escape(metric), *cells])
    header = ["task", "metric", *(html.escape(name) for _, name in measured)]
    return _table(header, rows) if rows else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _page(
    sections: Sequence[_Section],
    runs: Sequence[RunData],
    names: Sequence[str],
    notes: Sequence[str],
) -> str:
    from plotly.offline import get_plotlyjs  # cards has told if it is not there

    key = "".join(
        f'<span><i style="background:{colour_of_run(n)}"></i>{html.escape(name)}</span>'
        for n, name in enumerate(names)
    )
    body: list[str] = []
    figures: list[str] = []
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        if section.words:
            body.append(f"<p>{html.escape(section.words)}</p>")
        if section.lines and len(names) > 1:
            body.append(f'<p class="key">{key}</p>')
        body.append(section.table)
        least = max((card.width for card in section.cards), default=0)
        body.append(f'<div class="cards" style="--least:{least}px">' if section.cards else "")
        for card in section.cards:
            title = f"<h3>{html.escape(card.title)}</h3>" if card.title else ""
            size = f"height:{card.figure.layout.height:.0f}px;min-width:{card.width}px"
            below = f"<p>{html.escape(card.below)}</p>" if card.below else ""
            widest = "" if card.widest is None else f' style="max-width:{card.widest}px"'
            body.append(
                f'<div class="card"{widest}>{title}<div class="wide">'
                f'<div class="plot" data-figure="figure-{len(figures)}" style="{size}"></div>'
                f"</div>{below}</div>"
            )
            figures.append(
                f'<script type="application/json" id="figure-{len(figures)}">{card.json()}</script>'
            )
        body.append("</div></section>" if section.cards else "</section>")
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(f"<section><h2>Notes</h2><ul>{items}</ul></section>")
    template = Template((resources.files("taskgroup.lab.report") / "page.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape(", ".join(names[:3]) + (", ..." if len(names) > 3 else "")),
        version=tg.__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        body="\n".join(part for part in body if part),
        figures="\n".join(figures),
        plotly=get_plotlyjs(),
    )
