"""The report: runs on one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import os
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import taskgroup as tg
from taskgroup.report import history
from taskgroup.report.history import RunData
from taskgroup.report.thinning import Thinned, evenly, thin
from taskgroup.sentences import listed

try:
    from plotly import colors
    from plotly import graph_objects as go
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise ImportError(
        f"The report needs {error.name}; install it with: pip install 'taskgroup[report]'"
    ) from None

__all__ = ["write_report"]

_FEW = 24  # tasks that have a picture each, and numbers in their matrices
_ENTRIES = 500_000  # of all matrices of a slider: 3 MB
_MATRICES = 200  # on a slider
_COLUMNS = 800  # of a partition
_POINTS = 200  # of a line
_SLIDER = 260  # pixels that it and its buttons take at least
_LETTER = 6.7  # pixels, of a name
_LABEL = 26  # letters of a line of a bar's label
_LINES = colors.qualitative.D3
_GROUPS = [
    colour
    for colour in (*colors.qualitative.D3, *colors.qualitative.Dark24)
    if colour not in ("#7F7F7F", "#1CA71C")  # grey is for tasks that are alone, and one green twice
]
_DIVERGING = [(0, "#d6604d"), (0.5, "#ffffff"), (1, "#4393c3")]  # numbers in ink are legible
_ALONE = "#dddddd"
_INK = "#24292f"
_FAINT = "#d0d7de"


class _Card(NamedTuple):
    """A figure on the page.

    Attributes:
        title: above it; plain text.
        figure: that is drawn when it comes into sight.
        width: the least that it can be read at, pixels; a narrower window scrolls it.
        widest: that it looks well at.
        below: said under it; plain text.
    """

    title: str
    figure: go.Figure
    width: int
    widest: int | None = None
    below: str = ""


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
    cards: Sequence[_Card] = ()
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
    bars, left_out = history.seconds_per_batch(shown)
    sections = [
        _Section("Runs", "", table=_runs_table(shown, names)),
        _Section(
            "Affinity over time",
            "What a step on one task (row) does to the loss of another (column), in units of what "
            "a step on that other task does to it: blue serves, red harms. Blank where a task has "
            "not been measured yet. Tasks that often share a group are side by side.",
            [
                _affinities(run, name, order[run.name])
                for run, name in zip(shown, names, strict=True)
                if run.affinities.any() and len(run.tasks) > 1
            ],
        ),
        _Section(
            "Groups over time",
            "A row for each task, a colour for each group; grey is a task that is alone. A group "
            "keeps its colour while tasks join and leave it. Dotted: the end of the warm-up.",
            [
                _partition(run, name, order[run.name])
                for run, name in zip(shown, names, strict=True)
                if run.method == "selective" and len(run.tasks) > 1
            ],
        ),
        _Section("Number of groups", "", _group_counts(shown, names), lines=True),
        *_losses(shown, names, order),
        _Section(
            "Time of a batch",
            "Where the time of a batch goes, warm-up included; of a run that is training, so far. "
            "The mean of runs that differ in nothing that takes time.",
            [_times(bars)] if bars else [],
        ),
        _Section(
            "Conflicts",
            "Cosines of the tasks' gradients on the shared parameters: red where two tasks pull "
            "apart, blue where they pull together.",
            [
                _conflicts(run, name, order[run.name])
                for run, name in zip(shown, names, strict=True)
                if len(run.conflicts) and len(run.tasks) > 1
            ],
        ),
        _Section(
            "Held-out data over time",
            "Metrics of each task, evaluated on the way.",
            _evaluations(shown, names),
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


def _affinities(run: RunData, name: str, order: list[int]) -> _Card:
    """Each column in units of its task's self-affinity; blank where it has none."""
    chosen = _with_room(run.affinities)
    matrices = run.affinities[chosen]
    own = matrices.diagonal(axis1=1, axis2=2)[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        matrices = np.where(own > 0, matrices / own, np.float32(np.nan))
    hover = "step on %{y}<br>effect on %{x}<br>affinity %{z:.3f}<extra></extra>"
    title = _of_matrices(name, run.affinity_batches, chosen)
    return _matrices(run, title, order, run.affinity_batches[chosen], matrices, hover)


def _conflicts(run: RunData, name: str, order: list[int]) -> _Card:
    chosen = _with_room(run.conflicts)
    hover = "%{y}<br>%{x}<br>cosine %{z:.3f}<extra></extra>"
    title = _of_matrices(name, run.conflict_batches, chosen)
    batches, matrices = run.conflict_batches[chosen], run.conflicts[chosen]
    return _matrices(run, title, order, batches, matrices, hover)


def _with_room(matrices: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which of them a page has room for."""
    most = min(_MATRICES, _ENTRIES // matrices[0].size)
    return evenly(len(matrices), max(3, most))


def _of_matrices(name: str, batches: NDArray[np.int64], chosen: NDArray[np.int64]) -> str:
    if len(batches) == 1:
        return f"{name}, batch {batches[0]}"
    left_out = len(chosen) < len(batches)
    return f"{name}; {len(chosen)} of {len(batches)} matrices" if left_out else name


def _matrices(
    run: RunData,
    name: str,
    order: list[int],
    batches: NDArray[np.int64],
    matrices: NDArray[np.float32],
    hover: str,
) -> _Card:
    """A heatmap with a slider over the batches; it begins with the last one."""
    matrices = matrices[:, order][:, :, order] + np.float32(0)  # no -0.0
    tasks = [run.tasks[k] for k in order]
    cell = _cell(len(tasks))
    room = _room(tasks, cell)
    side = max(_SLIDER, round(cell * len(tasks)))
    least = max(_SLIDER, round(min(cell, 25) * len(tasks)))
    frames = [
        go.Frame(name=str(batch), data=[{"type": "heatmap", "z": matrix}])
        for batch, matrix in zip(batches, matrices, strict=True)
    ]
    few = len(tasks) <= _FEW
    figure = go.Figure(
        {
            "type": "heatmap",
            "x": tasks,
            "y": tasks,
            "z": matrices[-1],
            "zmin": -1,
            "zmax": 1,
            "colorscale": _DIVERGING,
            "xgap": 1 if few else 0,
            "ygap": 1 if few else 0,
            "texttemplate": "%{z:.1f}" if few else None,
            "textfont": {"size": 10, "color": _INK},
            "hovertemplate": hover,
            "colorbar": {"thickness": 12, "outlinewidth": 0, "tickvals": [-1, -0.5, 0, 0.5, 1]},
        },
        _layout(
            round(cell * len(tasks)) + room + 84,
            margin={"l": room, "r": 56, "t": 84, "b": room},
            xaxis=_named_axis(tasks, cell, tickangle=-90),
            yaxis=_named_axis(tasks, cell, autorange="reversed"),
            **(_player([frame.name for frame in frames]) if len(frames) > 1 else {}),
        ),
        frames,
    )
    width = side + room + 56
    return _Card(name, figure, least + room + 56, max(width, min(800, 2 * width)))


def _player(frames: Sequence[str]) -> dict[str, Any]:
    """Above the figure: a slider with a step for each frame, and buttons to play and pause."""
    above = {"x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"}
    at_once = {"mode": "immediate", "transition": {"duration": 0}}
    show = {**at_once, "frame": {"duration": 0, "redraw": True}}
    play = {**at_once, "frame": {"duration": 120, "redraw": True}, "fromcurrent": True}
    stop = {**at_once, "frame": {"duration": 0, "redraw": False}}
    slider = {
        **above,
        "active": len(frames) - 1,
        "currentvalue": {"prefix": "batch ", "xanchor": "left", "font": {"size": 12}},
        "pad": {"b": 2, "l": 122, "r": 4},  # beside the buttons
        "ticklen": 0,
        "minorticklen": 0,
        "font": {"size": 10},
        "steps": [{"label": name, "method": "animate", "args": [[name], show]} for name in frames],
    }
    buttons = {
        **above,
        "type": "buttons",
        "direction": "right",
        "showactive": False,
        "pad": {"b": 26, "r": 4, "t": 0},
        "font": {"size": 11},
        "buttons": [
            {"label": "Play", "method": "animate", "args": [None, play]},
            {"label": "Pause", "method": "animate", "args": [[None], stop]},
        ],
    }
    return {"sliders": [slider], "updatemenus": [buttons]}


def _partition(run: RunData, name: str, order: list[int]) -> _Card:
    """A row for each task over the batches, coloured by group."""
    chosen = evenly(len(run.batches), _COLUMNS)
    every = len(chosen) == len(run.batches)
    seen = "" if every else f"; {len(chosen)} of {len(run.batches):,} are shown"
    groups = run.groups[chosen][:, order]
    colours = history.group_colours(groups)
    sizes = np.stack([np.bincount(row)[row] for row in groups])
    tasks = [run.tasks[k] for k in order]
    cell = _cell(len(tasks), most=24)
    room = _room(tasks, cell)
    values = np.where(colours < 0, 0, 1 + colours % len(_GROUPS))
    palette = [_ALONE, *_GROUPS][: int(values.max()) + 1]
    counts = groups.max(1) + 1
    figure = go.Figure(
        {
            "type": "heatmap",
            "x": run.batches[chosen],
            "y": tasks,
            "z": values.T.astype(np.uint8),
            "zmin": -0.5,
            "zmax": len(palette) - 0.5,
            "colorscale": _stepped(palette),
            "showscale": False,
            "ygap": 1 if cell > 6 else 0,
            "customdata": np.stack(
                [sizes.T, np.broadcast_to(counts, sizes.T.shape)], 2, dtype=np.int16
            ),
            "hovertemplate": "%{y}, batch %{x}<br>in a group of %{customdata[0]} tasks"
            "<br>one of %{customdata[1]} groups<extra></extra>",
        },
        _layout(
            round(cell * len(tasks)) + 80,
            margin={"l": room, "r": 10, "t": 30, "b": 50},
            xaxis={"title": {"text": f"batch{seen}"}, "showgrid": False},
            yaxis=_named_axis(tasks, cell, autorange="reversed"),
            shapes=_warmup(run),
        ),
    )
    title = name
    if (n_colours := int(colours.max()) + 1) > len(_GROUPS):
        title += f"; {n_colours} groups have {len(_GROUPS)} colours, so some have the same"
    now = [
        ", ".join(run.tasks[k] for k in order if run.groups[-1, k] == group)
        for group in dict.fromkeys(run.groups[-1, order].tolist())
    ]
    return _Card(title, figure, room + 260, below=f"Groups now: {'; '.join(now)}.")


def _group_counts(runs: Sequence[RunData], names: Sequence[str]) -> list[_Card]:
    figure = go.Figure(
        layout=_layout(
            300,
            margin={"l": 46, "r": 10, "t": 10, "b": 50},
            yaxis={"title": {"text": "groups"}, "rangemode": "tozero"},
        )
    )
    width, most = 0, 0.0
    for n, (run, name) in enumerate(zip(runs, names, strict=True)):
        if run.method == "selective":
            points = thin(run.batches, run.groups.max(1) + 1, run.warmup, _POINTS)
            figure.add_traces(_line(points, name, n, "%{y:.3~g} groups"))
            width = max(width, points.width)
            most = max(most, points.high.max())
    if not figure.data:
        return []
    figure.update_xaxes(title={"text": f"batch{_means(width)}"})
    if most < 10:
        figure.update_yaxes(dtick=1)
    if width == 1:
        figure.update_traces(line_shape="hv")
    return [_Card("", figure, 300)]


def _losses(
    runs: Sequence[RunData], names: Sequence[str], order: dict[str, list[int]]
) -> list[_Section]:
    """A picture for each of a few tasks; of many, a row for each."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if len(tasks) > _FEW:
        cards = [
            _loss_map(run, name, order[run.name]) for run, name in zip(runs, names, strict=True)
        ]
        words = (
            "The loss of each task in units of what it was at the start, on a scale of powers of "
            "two: green has fallen, brown has risen."
        )
        return [_Section("Losses", words, cards)]
    spread = [thin(run.batches, run.losses, points=_POINTS) for run in runs]
    words = f"Before the first step of a batch{_means(max(points.width for points in spread))}."
    return [_Section("Losses", words, _of_tasks(tasks, runs, names, spread), lines=True)]


def _evaluations(runs: Sequence[RunData], names: Sequence[str]) -> list[_Card]:
    """A picture for each of a few tasks."""
    spread = [thin(run.evaluation_batches, run.evaluations, points=_POINTS) for run in runs]
    tasks = [
        task
        for task in dict.fromkeys(task for run in runs for task in run.tasks)
        if any(
            task in run.tasks and np.isfinite(run.evaluations[:, run.tasks.index(task)]).any()
            for run in runs
        )
    ]
    return _of_tasks(tasks, runs, names, spread) if len(tasks) <= _FEW else []


def _of_tasks(
    tasks: Sequence[str],
    runs: Sequence[RunData],
    names: Sequence[str],
    spread: Sequence[Thinned],
) -> list[_Card]:
    """A picture for each task with a line for each run, of values ``[P, K]``."""
    cards = []
    for task in tasks:
        figure = go.Figure(layout=_layout(190, margin={"l": 46, "r": 8, "t": 6, "b": 28}))
        least = np.inf
        for n, (run, name) in enumerate(zip(runs, names, strict=True)):
            if task in run.tasks and len(spread[n].batches):
                points = spread[n].of(run.tasks.index(task))
                figure.add_traces(_line(points, name, n, "%{y:.4~g}"))
                least = np.nanmin(points.low, initial=least)
        if least > 0:
            figure.update_yaxes(type="log", nticks=5, tickformat="~g", minor={"nticks": 2})
        cards.append(_Card(task, figure, 250))
    return cards


def _loss_map(run: RunData, name: str, order: list[int]) -> _Card:
    points = thin(run.batches, run.losses[:, order], points=_POINTS)
    mean = points.mean.T  # [K, P]
    known = np.isfinite(mean).argmax(1)
    start = mean[np.arange(len(mean)), known][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(mean / start)
    largest = float(np.nanmax(np.abs(np.where(np.isfinite(change), change, np.nan)), initial=0.1))
    tasks = [run.tasks[k] for k in order]
    cell = _cell(len(tasks))
    room = _room(tasks, cell)
    of = f"; means of up to {points.width} batches" if points.width > 1 else ""
    step = max(1, round(largest / 4)) if largest >= 1 else 0.25
    powers = np.arange(-(largest // step), largest // step + 1) * step
    figure = go.Figure(
        {
            "type": "heatmap",
            "x": points.batches,
            "y": tasks,
            "z": change.astype(np.float32),
            "zmin": -largest,
            "zmax": largest,
            "colorscale": "BrBG_r",
            "customdata": mean.astype(np.float32),
            "hovertemplate": "%{y}, batch %{x:.0f}<br>loss %{customdata:.4~g}<extra></extra>",
            "colorbar": {
                "thickness": 12,
                "outlinewidth": 0,
                "tickvals": powers,
                "ticktext": [f"{2.0**power:.3g}" for power in powers],
            },
        },
        _layout(
            round(cell * len(tasks)) + 80,
            margin={"l": room, "r": 60, "t": 30, "b": 50},
            xaxis={
                "title": {"text": f"batch{of}"},
                "showgrid": False,
            },
            yaxis=_named_axis(tasks, cell, autorange="reversed"),
        ),
    )
    return _Card(name, figure, room + 320)


def _times(bars: Sequence[history.Bar]) -> _Card:
    bars = sorted(bars, key=lambda bar: sum(bar.sections.values()), reverse=True)
    most = max(sum(bar.sections.values()) for bar in bars)
    lines = max(label.count("<br>") + 1 for label in [_wrapped(bar.label) for bar in bars])
    scale, unit = (1e3, "ms") if most < 0.5 else (1.0, "s")
    labels = [_wrapped(bar.label) for bar in bars]
    room = 16 + round(_LETTER * _LABEL)
    figure = go.Figure(
        layout=_layout(
            100 + (18 + 16 * lines) * len(bars),
            barmode="stack",
            margin={"l": room, "r": 90, "t": 40, "b": 50},
            showlegend=True,
            legend={"orientation": "h", "y": 1, "yanchor": "bottom", "traceorder": "normal"},
            xaxis={"title": {"text": f"{unit} per batch"}, "rangemode": "tozero"},
            yaxis={"showgrid": False, "tickvals": list(range(len(bars))), "ticktext": labels},
        )
    )
    for section, colour in history.SECTIONS.items():
        if any(section in bar.sections for bar in bars):
            figure.add_bar(
                orientation="h",
                name=section,
                x=[scale * bar.sections.get(section, 0.0) for bar in bars],
                y=list(range(len(bars))),
                marker={"color": colour},
                hovertemplate=f"{section}: %{{x:.3~g}} {unit}<extra>%{{y}}</extra>",
            )
    for place, bar in enumerate(bars):
        total = sum(bar.sections.values())
        ratio = "" if bar.ratio is None else f", {bar.ratio:.2f}x joint"
        figure.add_annotation(
            x=scale * total,
            y=place,
            text=f"{scale * total:.3g} {unit}{ratio}",
            showarrow=False,
            xanchor="left",
            xshift=4,
        )
    return _Card("", figure, room + 320)


def _line(points: Thinned, name: str, n: int, value: str) -> list[go.Scatter]:
    """The mean, and around it the least and the most."""
    colour = _LINES[n % len(_LINES)]
    red, green, blue = colors.hex_to_rgb(colour)
    bounds = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "x": points.batches}
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.13)"}
    spread = points.width > 1
    return [
        *([go.Scatter(y=points.low, **bounds)] if spread else []),
        *([go.Scatter(y=points.high, **bounds, **fill)] if spread else []),
        go.Scatter(
            x=points.batches,
            y=points.mean,
            mode="lines" if len(points.batches) > 1 else "markers",
            line={"color": colour, "width": 1.6, "dash": "solid" if n < len(_LINES) else "dot"},
            connectgaps=True,
            name=_escaped(name),
            hovertemplate=f"batch %{{x:.0f}}: {value}<extra>{_escaped(name)}</extra>",
        ),
    ]


def _layout(height: int, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "#eaeef2", "zeroline": False, "linecolor": _FAINT, "ticks": ""}
    layout = {
        "template": "none",
        "height": height,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hoverlabel": {"font": {"size": 12}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8c959f", "activecolor": _INK},
        **more,
    }
    return {**layout, **{name: {**axis, **more.get(name, {})} for name in ("xaxis", "yaxis")}}


def _cell(n_tasks: int, most: float = 34) -> float:
    """Pixels of a row: the names of up to 150 tasks have room."""
    return max(min(most, 1100 / n_tasks), 11.0 if n_tasks <= 150 else 1600 / n_tasks)


def _letters(cell: float) -> float:
    return max(8.5, min(12.0, cell - 2))


def _room(names: Iterable[str], cell: float) -> int:
    """Pixels of the longest name."""
    longest = max(len(history.short(name)) for name in names)
    return round(16 + _LETTER * _letters(cell) / 12 * longest)


def _named_axis(names: Sequence[str], cell: float, **more: Any) -> dict[str, Any]:
    """Of categories; where there is no room for all names, some."""
    named = range(0, len(names), -(-11 // max(1, round(cell))))
    return {
        "type": "category",
        "showgrid": False,
        "tickfont": {"size": _letters(cell)},
        "tickvals": list(named),
        "ticktext": [_escaped(names[k]) for k in named],
        **more,
    }


def _stepped(palette: Sequence[str]) -> list[tuple[float, str]]:
    n = len(palette)
    return [(edge / n, colour) for k, colour in enumerate(palette) for edge in (k, k + 1)]


def _warmup(run: RunData) -> list[dict[str, Any]]:
    if not 0 < run.warmup < run.batches[-1]:
        return []
    line = {"color": _INK, "width": 1, "dash": "dot"}
    x = run.warmup + 0.5
    return [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}]


def _means(width: int) -> str:
    return f"; means of up to {width} batches, shaded from least to most" if width > 1 else ""


def _escaped(name: str) -> str:
    return html.escape(history.short(name), quote=False)


def _wrapped(label: str) -> str:
    return "<br>".join(
        html.escape(line, quote=False)
        for line in textwrap.wrap(label, _LABEL, break_on_hyphens=False)
    )


def _runs_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    header = ["run", "method", "seed", "batches", "state", "groups", "time of a batch", "Δm"]
    header.append("what else differs")
    rows = []
    for n, (run, name, other) in enumerate(
        zip(runs, names, history.differences(runs), strict=True)
    ):
        batches, planned = int(run.batches[-1]), int(run.settings["batches"])
        selective = run.method == "selective"
        against = history.short(str(run.settings["baseline"]))
        rows.append(
            [
                f'<i style="background:{_LINES[n % len(_LINES)]}"></i>{html.escape(name)}',
                html.escape(f"selective, {run.settings['grouping']}" if selective else run.method),
                str(run.settings["seed"]),
                f"{batches:,} of {planned:,}",
                "finished" if run.metrics is not None else f"{100 * batches // planned} %",
                str(int(run.groups[-1].max()) + 1) if selective else "",
                _duration(run.seconds["everything"]) if run.seconds else "",
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
    key = "".join(
        f'<span><i style="background:{_LINES[n % len(_LINES)]}"></i>{html.escape(name)}</span>'
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
            # A "<" may not end the script that holds it.
            text = to_json_plotly(card.figure).replace("<", "\\u003c")
            figures.append(
                f'<script type="application/json" id="figure-{len(figures)}">{text}</script>'
            )
        body.append("</div></section>" if section.cards else "</section>")
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(f"<section><h2>Notes</h2><ul>{items}</ul></section>")
    template = Template((resources.files("taskgroup.report") / "page.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape(", ".join(names[:3]) + (", ..." if len(names) > 3 else "")),
        version=tg.__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        body="\n".join(part for part in body if part),
        figures="\n".join(figures),
        plotly=get_plotlyjs(),
    )
