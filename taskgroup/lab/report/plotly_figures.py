"""The figures of the HTML report, which plotly draws in the browser."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.report.affinities import relative
from taskgroup.lab.report.colours import BLANK, HARMS, INK, RUNS, SECTIONS, SERVES, colour_of_run
from taskgroup.lab.report.groups import group_colours, group_counts
from taskgroup.lab.report.labels import short
from taskgroup.lab.report.run_data import Recorded, RunData
from taskgroup.lab.report.thinning import Thinned, evenly, thin
from taskgroup.lab.report.timing import Bar, scale_of

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
    "Shown",
    "affinity",
    "conflicts",
    "evaluations",
    "losses",
    "number_of_groups",
    "partition",
    "time_per_batch",
]

_FEW = 24  # tasks that have a figure each, and numbers in their matrices
_ENTRIES = 500_000  # of all matrices of a slider: 3 MB
_MATRICES = 200  # on a slider
_COLUMNS = 800  # of a partition
_POINTS = 200  # of a line
_SLIDER = 260  # pixels that it and its buttons take at least
_LETTER = 6.7  # pixels, of a name
_LABEL = 26  # letters of a line of a bar's label
_GROUPS = [
    colour.lower()
    for colour in (*RUNS, *colors.qualitative.Dark24)
    if colour.lower() not in ("#7f7f7f", "#1ca71c")  # grey marks single tasks; a second green
]
_DIVERGING = [(0, HARMS), (0.5, "#ffffff"), (1, SERVES)]
_ALONE = "#dddddd"
_FAINT = "#d0d7de"
_CLEAR = "rgba(0,0,0,0)"
_COLORBAR = {"thickness": 12, "outlinewidth": 0}


class Shown(NamedTuple):
    """A run on the page, with its name there, in plain text, and its number, which is its colour.

    ``order`` holds the positions of its tasks in the order in which figures show them.
    """

    data: RunData
    name: str
    order: list[int]
    number: int

    @property
    def tasks(self) -> list[str]:
        """Its tasks in the order in which figures show them."""
        return [self.data.tasks[k] for k in self.order]


class Card(NamedTuple):
    """A figure on the page, drawn when it comes into view; the texts are plain.

    In a window narrower than ``width`` pixels it scrolls; up to ``widest`` pixels it looks well.
    """

    title: str
    figure: go.Figure
    width: int
    widest: int | None = None
    below: str = ""

    def json(self) -> str:
        """The figure for a script of the page, in which a "<" must not end the element."""
        return str(to_json_plotly(self.figure)).replace("<", "\\u003c")


def affinity(run: Shown) -> Card:
    """Each column in units of the self-affinity of its task, over the batches."""
    recorded, title = _with_room(run.data.affinity, run.name)
    blank = np.where(np.isnan(recorded.values), "never measured", "no self-affinity yet")
    values = recorded._replace(values=relative(recorded.values))
    return _matrices(run, title, values, "step on %{y}<br>effect on %{x}<br>affinity: ", blank)


def conflicts(run: Shown) -> Card:
    """Cosines between gradients over the batches."""
    recorded, title = _with_room(run.data.conflicts, run.name)
    blank = np.full(recorded.values.shape, "not measured")
    return _matrices(run, title, recorded, "%{y}<br>%{x}<br>cosine: ", blank)


def _with_room(recorded: Recorded, name: str) -> tuple[Recorded, str]:
    """As many matrices as a slider has room for, and the title of their figure."""
    batches, values = recorded
    most = min(_MATRICES, _ENTRIES // values[0].size)
    chosen = evenly(len(values), max(3, most))
    if len(batches) == 1:
        name = f"{name}, batch {batches[0]}"
    elif len(chosen) < len(batches):
        name = f"{name} ({len(chosen)} of {len(batches)} recorded matrices)"
    return Recorded(batches[chosen], values[chosen]), name


def _matrices(
    run: Shown, title: str, recorded: Recorded, hover: str, blank: NDArray[np.str_]
) -> Card:
    """A heatmap with a slider over the batches, which starts at the last one.

    The pointer shows ``hover`` and the value, or the text in ``blank`` where the value is NaN.
    """
    matrices = recorded.values[:, run.order][:, :, run.order] + np.float32(0)  # turns -0.0 into 0.0
    blank = blank[:, run.order][:, :, run.order]
    traces = [_with_hover(z, hover, words) for z, words in zip(matrices, blank, strict=True)]
    frames = [
        go.Frame(name=str(batch), data=[{"type": "heatmap", **trace}])
        for batch, trace in zip(recorded.batches, traces, strict=True)
    ]
    tasks = run.tasks
    cell = _cell(len(tasks))
    room = _room(tasks, cell)
    few = len(tasks) <= _FEW
    figure = _heatmap(
        tasks,
        cell,
        {
            "x": tasks,
            **traces[-1],
            "zmin": -1,
            "zmax": 1,
            "colorscale": _DIVERGING,
            "xgap": 1 if few else 0,
            "ygap": 1 if few else 0,
            "texttemplate": "%{z:.1f}" if few else None,
            "textfont": {"size": 10, "color": INK},
            "colorbar": {**_COLORBAR, "tickvals": [-1, -0.5, 0, 0.5, 1]},
        },
        {"r": 56, "t": 84, "b": room},
        frames,
        xaxis=_task_axis(tasks, cell, tickangle=-90),
        plot_bgcolor=BLANK if np.isnan(matrices).any() else _CLEAR,
        **(_player([frame.name for frame in frames]) if len(frames) > 1 else {}),
    )
    width, least = (
        max(_SLIDER, round(side * len(tasks))) + room + 56 for side in (cell, min(cell, 25))
    )
    return Card(title, figure, least, max(width, min(800, 2 * width)))


def _with_hover(matrix: NDArray[np.float32], hover: str, blank: NDArray[np.str_]) -> dict[str, Any]:
    """A matrix and the text at the pointer; words take more room than numbers."""
    if not np.isnan(matrix).any():
        return {"z": matrix, "hovertemplate": f"{hover}%{{z:.3f}}<extra></extra>"}
    return {
        "z": matrix,
        "customdata": np.where(np.isnan(matrix), blank, np.char.mod("%.3f", matrix)),
        "hovertemplate": f"{hover}%{{customdata}}<extra></extra>",
    }


def _player(frames: Sequence[str]) -> dict[str, Any]:
    """A slider with a step for each frame, and buttons to play and pause, above the figure."""
    above = {"x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"}

    def animate(label: str, to: list[str | None] | None, how: dict[str, Any]) -> dict[str, Any]:
        how = {"mode": "immediate", "transition": {"duration": 0}, **how}
        return {"label": label, "method": "animate", "args": [to, how]}

    show = {"frame": {"duration": 0, "redraw": True}}
    play = {"frame": {"duration": 120, "redraw": True}, "fromcurrent": True}
    stop = {"frame": {"duration": 0, "redraw": False}}
    slider = {
        **above,
        "active": len(frames) - 1,
        "currentvalue": {"prefix": "batch ", "xanchor": "left", "font": {"size": 12}},
        "pad": {"b": 2, "l": 122, "r": 4},  # beside the buttons
        "ticklen": 0,
        "minorticklen": 0,
        "font": {"size": 10},
        "steps": [animate(name, [name], show) for name in frames],
    }
    buttons = {
        **above,
        "type": "buttons",
        "direction": "right",
        "showactive": False,
        "pad": {"b": 26, "r": 4, "t": 0},
        "font": {"size": 11},
        "buttons": [animate("Play", None, play), animate("Pause", [None], stop)],
    }
    return {"sliders": [slider], "updatemenus": [buttons]}


def partition(run: Shown) -> Card:
    """A row for each task over the batches, coloured by group."""
    data, tasks = run.data, run.tasks
    chosen = evenly(len(data.batches), _COLUMNS)
    every = len(chosen) == len(data.batches)
    groups = data.groups[chosen][:, run.order]
    colours = group_colours(groups)
    sizes = np.stack([np.bincount(row)[row] for row in groups])
    cell = _cell(len(tasks), most=24)
    values = np.where(colours < 0, 0, 1 + colours % len(_GROUPS))
    palette = [_ALONE, *_GROUPS][: int(values.max()) + 1]
    counts = np.broadcast_to(groups.max(1) + 1, sizes.T.shape)
    figure = _heatmap(
        tasks,
        cell,
        {
            "x": data.batches[chosen],
            "z": values.T.astype(np.uint8),
            "zmin": -0.5,
            "zmax": len(palette) - 0.5,
            "colorscale": _stepped(palette),
            "showscale": False,
            "ygap": 1 if cell > 6 else 0,
            "customdata": np.stack([sizes.T, counts], 2, dtype=np.int16),
            "hovertemplate": "%{y}, batch %{x}<br>tasks in its group: %{customdata[0]}"
            "<br>groups in all: %{customdata[1]}<extra></extra>",
        },
        {"r": 10, "t": 30, "b": 50},
        xaxis=_batch_axis(
            "" if every else f"{len(chosen)} of {len(data.batches):,} are shown", showgrid=False
        ),
        shapes=_end_of_warmup(data),
    )
    title = run.name
    if (n_colours := int(colours.max()) + 1) > len(_GROUPS):
        title += f": {n_colours} groups share {len(_GROUPS)} colours, so some look alike"
    last = data.groups[-1]
    now = [
        ", ".join(data.tasks[k] for k in run.order if last[k] == group)
        for group in dict.fromkeys(last[run.order].tolist())
    ]
    below = f"Groups after batch {data.batches[-1]:,}: {'; '.join(now)}."
    return Card(title, figure, _room(tasks, cell) + 260, below=below)


def number_of_groups(runs: Sequence[Shown]) -> list[Card]:
    """A line for each selective run; no card if there is none."""
    selective = [run for run in runs if run.data.method == "selective"]
    if not selective:
        return []
    found = [group_counts(run.data, _POINTS) for run in selective]
    width = max(points.width for points in found)
    most = max(points.high.max() for points in found)
    figure = go.Figure(
        layout=_layout(
            300,
            margin={"l": 46, "r": 10, "t": 10, "b": 50},
            xaxis=_batch_axis(_means(width)),
            yaxis={"title": {"text": "groups"}, "rangemode": "tozero"},
        )
    )
    for run, points in zip(selective, found, strict=True):
        figure.add_traces(_line(points, run, "%{y:.3~g} groups"))
    if most < 10:
        figure.update_yaxes(dtick=1)
    if width == 1:
        figure.update_traces(line_shape="hv")
    return [Card("", figure, 300)]


def losses(runs: Sequence[Shown]) -> tuple[str, list[Card], bool]:
    """A figure for each task with a line for each run; of many tasks, a map for each run.

    Returns a text on what the figures show, the figures, and whether their lines are runs.
    """
    if len(_tasks(runs)) > _FEW:
        words = (
            "The loss of each task divided by its first loss, on a scale of powers of two. Green: "
            "the loss has fallen. Brown: it has risen."
        )
        return words, [_loss_map(run) for run in runs], False
    spread = [thin(run.data.batches, run.data.losses, points=_POINTS) for run in runs]
    means = _means(max(points.width for points in spread))
    words = "The loss of each task before the first step of a batch"
    words += f" ({means})." if means else "."
    return words, _lines(_tasks(runs), runs, spread), True


def _tasks(runs: Iterable[Shown]) -> list[str]:
    return list(dict.fromkeys(task for run in runs for task in run.data.tasks))


def evaluations(runs: Sequence[Shown]) -> list[Card]:
    """A figure for each of a few tasks that were evaluated during training."""
    spread = [thin(*run.data.evaluations, points=_POINTS) for run in runs]
    known = {
        task
        for run in runs
        for task, values in zip(run.data.tasks, run.data.evaluations.values.T, strict=True)
        if np.isfinite(values).any()
    }
    tasks = [task for task in _tasks(runs) if task in known]
    return _lines(tasks, runs, spread) if len(tasks) <= _FEW else []


def _lines(tasks: Sequence[str], runs: Sequence[Shown], spread: Sequence[Thinned]) -> list[Card]:
    """A figure for each task with a line for each run, of values ``[P, K]``."""
    cards = []
    for task in tasks:
        figure = go.Figure(layout=_layout(190, margin={"l": 46, "r": 8, "t": 6, "b": 28}))
        least = np.inf
        for run, points in zip(runs, spread, strict=True):
            if task in run.data.tasks and len(points.batches):
                of_task = points.of(run.data.tasks.index(task))
                figure.add_traces(_line(of_task, run, "%{y:.4~g}"))
                least = np.nanmin(of_task.low, initial=least)
        if least > 0:
            figure.update_yaxes(type="log", nticks=5, tickformat="~g", minor={"nticks": 2})
        cards.append(Card(task, figure, 250))
    return cards


def _loss_map(run: Shown) -> Card:
    """A row for each task: its loss over the batches, divided by its first one."""
    points = thin(run.data.batches, run.data.losses[:, run.order], points=_POINTS)
    mean = points.mean.T  # [K, P]
    first = np.isfinite(mean).argmax(1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(mean / np.take_along_axis(mean, first, 1))
    largest = float(np.nanmax(np.abs(np.where(np.isfinite(change), change, np.nan)), initial=0.1))
    step = max(1, round(largest / 4)) if largest >= 1 else 0.25
    powers = np.arange(-(largest // step), largest // step + 1) * step
    cell = _cell(len(run.tasks))
    figure = _heatmap(
        run.tasks,
        cell,
        {
            "x": points.batches,
            "z": change.astype(np.float32),
            "zmin": -largest,
            "zmax": largest,
            "colorscale": "BrBG_r",
            "customdata": mean.astype(np.float32),
            "hovertemplate": "%{y}, batch %{x:.0f}<br>loss %{customdata:.4~g}<extra></extra>",
            "colorbar": {
                **_COLORBAR,
                "tickvals": powers,
                "ticktext": [f"{2.0**power:.3g}" for power in powers],
            },
        },
        {"r": 60, "t": 30, "b": 50},
        xaxis=_batch_axis(
            f"means of up to {points.width} batches" if points.width > 1 else "", showgrid=False
        ),
    )
    return Card(run.name, figure, _room(run.tasks, cell) + 320)


def time_per_batch(bars: Sequence[Bar]) -> Card:
    """Bars of the time per batch, divided into sections."""
    bars = sorted(bars, key=lambda bar: bar.seconds, reverse=True)
    scale, unit = scale_of(bars[0].seconds)
    labels = [_wrapped(bar.label) for bar in bars]
    lines = max(label.count("<br>") + 1 for label in labels)
    room = 16 + round(_LETTER * _LABEL)
    places = list(range(len(bars)))
    figure = go.Figure(
        layout=_layout(
            100 + (18 + 16 * lines) * len(bars),
            barmode="stack",
            margin={"l": room, "r": 90, "t": 40, "b": 50},
            showlegend=True,
            legend={"orientation": "h", "y": 1, "yanchor": "bottom", "traceorder": "normal"},
            xaxis={"title": {"text": f"{unit} per batch"}, "rangemode": "tozero"},
            yaxis={"showgrid": False, "tickvals": places, "ticktext": labels},
        )
    )
    for section, colour in SECTIONS.items():
        if any(section in bar.sections for bar in bars):
            figure.add_bar(
                orientation="h",
                name=section,
                x=[scale * bar.sections.get(section, 0.0) for bar in bars],
                y=places,
                customdata=labels,
                marker={"color": colour},
                hovertemplate=f"{section}: %{{x:.3~g}} {unit}<extra>%{{customdata}}</extra>",
            )
    for place, bar in zip(places, bars, strict=True):
        ratio = "" if bar.ratio is None else f", {bar.ratio:.2f}x joint"
        figure.add_annotation(
            x=scale * bar.seconds,
            y=place,
            text=f"{scale * bar.seconds:.3g} {unit}{ratio}",
            showarrow=False,
            xanchor="left",
            xshift=4,
        )
    return Card("", figure, room + 320)


def _line(points: Thinned, run: Shown, value: str) -> list[go.Scatter]:
    """The mean, and a band from the minimum to the maximum."""
    colour = colour_of_run(run.number)
    name = _escaped(run.name)
    red, green, blue = colors.hex_to_rgb(colour)
    bounds = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "x": points.batches}
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.13)"}
    mean = go.Scatter(
        x=points.batches,
        y=points.mean,
        mode="lines" if len(points.batches) > 1 else "markers",
        line={"color": colour, "width": 1.6, "dash": "solid" if run.number < len(RUNS) else "dot"},
        connectgaps=True,
        name=name,
        hovertemplate=f"batch %{{x:.0f}}: {value}<extra>{name}</extra>",
    )
    if points.width == 1:
        return [mean]
    low, high = go.Scatter(y=points.low, **bounds), go.Scatter(y=points.high, **bounds, **fill)
    return [low, high, mean]


def _heatmap(
    tasks: list[str],
    cell: float,
    trace: dict[str, Any],
    margin: dict[str, float],
    frames: Sequence[go.Frame] = (),
    **more: Any,
) -> go.Figure:
    """Rows of tasks from top to bottom, each ``cell`` pixels high."""
    return go.Figure(
        {"type": "heatmap", "y": tasks, **trace},
        _layout(
            round(cell * len(tasks)) + margin["t"] + margin["b"],
            margin={"l": _room(tasks, cell), **margin},
            yaxis=_task_axis(tasks, cell, autorange="reversed"),
            **more,
        ),
        frames,
    )


def _layout(height: float, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "#eaeef2", "zeroline": False, "linecolor": _FAINT, "ticks": ""}
    layout = {
        "template": "none",
        "height": height,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "showlegend": False,
        "hoverlabel": {"font": {"size": 12}},
        "modebar": {"bgcolor": _CLEAR, "color": "#8c959f", "activecolor": INK},
        **more,
    }
    return {**layout, **{name: {**axis, **more.get(name, {})} for name in ("xaxis", "yaxis")}}


def _cell(n_tasks: int, most: float = 34) -> float:
    """Pixels of a row, which has room for a name with up to 150 tasks."""
    return max(min(most, 1100 / n_tasks), 11.0 if n_tasks <= 150 else 1600 / n_tasks)


def _letters(cell: float) -> float:
    return max(8.5, min(12.0, cell - 2))


def _room(names: Iterable[str], cell: float) -> int:
    """Pixels that the longest name takes."""
    longest = max(len(short(name)) for name in names)
    return round(16 + _LETTER * _letters(cell) / 12 * longest)


def _task_axis(names: Sequence[str], cell: float, **more: Any) -> dict[str, Any]:
    """An axis of tasks; names for which there is no room are left out."""
    named = range(0, len(names), -(-11 // max(1, round(cell))))
    return {
        "type": "category",
        "showgrid": False,
        "tickfont": {"size": _letters(cell)},
        "tickvals": list(named),
        "ticktext": [_escaped(names[k]) for k in named],
        **more,
    }


def _batch_axis(note: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": f"batch ({note})" if note else "batch"}, **more}


def _stepped(palette: Sequence[str]) -> list[tuple[float, str]]:
    n = len(palette)
    return [(edge / n, colour) for k, colour in enumerate(palette) for edge in (k, k + 1)]


def _end_of_warmup(run: RunData) -> list[dict[str, Any]]:
    if not 0 < run.warmup < run.batches[-1]:
        return []
    line = {"color": INK, "width": 1, "dash": "dot"}
    x = run.warmup + 0.5
    return [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}]


def _means(width: int) -> str:
    """What a point of a line is, if it stands for several batches."""
    return f"means of up to {width} batches; shaded: minimum to maximum" if width > 1 else ""


def _escaped(name: str) -> str:
    return html.escape(short(name), quote=False)


def _wrapped(label: str) -> str:
    return "<br>".join(
        html.escape(line, quote=False)
        for line in textwrap.wrap(label, _LABEL, break_on_hyphens=False)
    )
