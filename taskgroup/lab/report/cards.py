"""The figures of the report, for plotly to draw in a browser."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.report import run_data as history
from taskgroup.lab.report.plots import BLANK
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.report.thinning import Thinned, evenly, thin

try:
    from plotly import colors
    from plotly import graph_objects as go
    from plotly.io.json import to_json_plotly
except ImportError as error:
    raise ImportError(
        f"The report needs {error.name}; install it with: pip install 'taskgroup[report]'"
    ) from None

__all__ = [
    "Card",
    "affinities",
    "colour_of_run",
    "conflicts",
    "evaluations",
    "group_counts",
    "losses",
    "partition",
    "times",
]

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


class Card(NamedTuple):
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

    def json(self) -> str:
        """The figure, for a script of the page: a "<" may not end what holds it."""
        return str(to_json_plotly(self.figure)).replace("<", "\\u003c")


def affinities(run: RunData, name: str, order: list[int]) -> Card:
    """Each column in units of its task's self-affinity; blank where it has none.

    Blank as well where the affinity was never measured.
    """
    chosen = _with_room(run.affinities)
    measured = run.affinities[chosen]
    own = measured.diagonal(axis1=1, axis2=2)[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        matrices = np.where(own > 0, measured / own, np.float32(np.nan))
    blank = np.where(np.isnan(measured), "never measured", "no self-affinity yet")
    hover = "step on %{y}<br>effect on %{x}<br>affinity: "
    title = _of_matrices(name, run.affinity_batches, chosen)
    return _matrices(run, title, order, run.affinity_batches[chosen], matrices, hover, blank)


def conflicts(run: RunData, name: str, order: list[int]) -> Card:
    """Cosines, as they were measured."""
    chosen = _with_room(run.conflicts)
    hover = "%{y}<br>%{x}<br>cosine: "
    title = _of_matrices(name, run.conflict_batches, chosen)
    batches, matrices = run.conflict_batches[chosen], run.conflicts[chosen]
    blank = np.full(matrices.shape, "not measured")
    return _matrices(run, title, order, batches, matrices, hover, blank)


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
    blank: NDArray[np.str_],
) -> Card:
    """A heatmap with a slider over the batches; it begins with the last one.

    The pointer is told ``hover`` and the value, or where that is NaN what ``blank`` has there.
    """
    matrices = matrices[:, order][:, :, order] + np.float32(0)  # no -0.0
    shown = [
        _with_words(matrix, hover, words)
        for matrix, words in zip(matrices, blank[:, order][:, :, order], strict=True)
    ]
    tasks = [run.tasks[k] for k in order]
    cell = _cell(len(tasks))
    room = _room(tasks, cell)
    side = max(_SLIDER, round(cell * len(tasks)))
    least = max(_SLIDER, round(min(cell, 25) * len(tasks)))
    frames = [
        go.Frame(name=str(batch), data=[{"type": "heatmap", **values}])
        for batch, values in zip(batches, shown, strict=True)
    ]
    few = len(tasks) <= _FEW
    figure = go.Figure(
        {
            "type": "heatmap",
            "x": tasks,
            "y": tasks,
            **shown[-1],
            "zmin": -1,
            "zmax": 1,
            "colorscale": _DIVERGING,
            "xgap": 1 if few else 0,
            "ygap": 1 if few else 0,
            "texttemplate": "%{z:.1f}" if few else None,
            "textfont": {"size": 10, "color": _INK},
            "colorbar": {"thickness": 12, "outlinewidth": 0, "tickvals": [-1, -0.5, 0, 0.5, 1]},
        },
        _layout(
            round(cell * len(tasks)) + room + 84,
            margin={"l": room, "r": 56, "t": 84, "b": room},
            xaxis=_named_axis(tasks, cell, tickangle=-90),
            yaxis=_named_axis(tasks, cell, autorange="reversed"),
            plot_bgcolor=BLANK if np.isnan(matrices).any() else "rgba(0,0,0,0)",
            **(_player([frame.name for frame in frames]) if len(frames) > 1 else {}),
        ),
        frames,
    )
    width = side + room + 56
    return Card(name, figure, least + room + 56, max(width, min(800, 2 * width)))


def _with_words(matrix: NDArray[np.float32], hover: str, blank: NDArray[np.str_]) -> dict[str, Any]:
    """A matrix and what the pointer is told of it; words take more room than the numbers."""
    if not np.isnan(matrix).any():
        return {"z": matrix, "hovertemplate": f"{hover}%{{z:.3f}}<extra></extra>"}
    return {
        "z": matrix,
        "customdata": np.where(np.isnan(matrix), blank, np.char.mod("%.3f", matrix)),
        "hovertemplate": f"{hover}%{{customdata}}<extra></extra>",
    }


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


def partition(run: RunData, name: str, order: list[int]) -> Card:
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
    return Card(title, figure, room + 260, below=f"Groups now: {'; '.join(now)}.")


def group_counts(runs: Sequence[RunData], names: Sequence[str]) -> list[Card]:
    """A line for each selective run; no card if there is none."""
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
            points = history.group_counts(run, _POINTS)
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
    return [Card("", figure, 300)]


def losses(
    runs: Sequence[RunData], names: Sequence[str], order: dict[str, list[int]]
) -> tuple[str, list[Card], bool]:
    """A picture for each of a few tasks; of many, a row for each.

    Returns:
        What there is to see, the figures, and whether a line is a run.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if len(tasks) > _FEW:
        cards = [
            _loss_map(run, name, order[run.name]) for run, name in zip(runs, names, strict=True)
        ]
        words = (
            "The loss of each task in units of what it was at the start, on a scale of powers of "
            "two: green has fallen, brown has risen."
        )
        return words, cards, False
    spread = [thin(run.batches, run.losses, points=_POINTS) for run in runs]
    words = f"Before the first step of a batch{_means(max(points.width for points in spread))}."
    return words, _of_tasks(tasks, runs, names, spread), True


def evaluations(runs: Sequence[RunData], names: Sequence[str]) -> list[Card]:
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
) -> list[Card]:
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
        cards.append(Card(task, figure, 250))
    return cards


def _loss_map(run: RunData, name: str, order: list[int]) -> Card:
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
    return Card(name, figure, room + 320)


def times(bars: Sequence[history.Bar]) -> Card:
    """Bars of the time of a batch, divided into sections."""
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
                customdata=labels,
                marker={"color": colour},
                hovertemplate=f"{section}: %{{x:.3~g}} {unit}<extra>%{{customdata}}</extra>",
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
    return Card("", figure, room + 320)


def _line(points: Thinned, name: str, n: int, value: str) -> list[go.Scatter]:
    """The mean, and around it the least and the most."""
    colour = colour_of_run(n)
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


def colour_of_run(n: int) -> str:
    """The colour of the n-th run of a page, ``"#rrggbb"``."""
    return str(_LINES[n % len(_LINES)])


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
