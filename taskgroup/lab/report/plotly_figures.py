"""The figures of the HTML report, which plotly draws in the browser."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.report.affinities import largest, normalised, relative
from taskgroup.lab.report.colours import (
    ALONE,
    GROUPS,
    HARMS,
    INK,
    RUNS,
    SECTIONS,
    SERVES,
    ZERO,
    colour_of_run,
)
from taskgroup.lab.report.groups import blocks, group_colours, group_counts
from taskgroup.lab.report.labels import short
from taskgroup.lab.report.run_data import Recorded, RunData
from taskgroup.lab.report.thinning import Thinned, evenly, thin
from taskgroup.lab.report.timing import Bar, scale_of, three_digits

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
    "with_groups",
]

_FEW = 24  # tasks that have a figure each, names at their columns, and numbers in their matrices
_ENTRIES = 500_000  # of all matrices of a slider: 3 MB
_MATRICES = 200  # on a slider
_COLUMNS = 800  # of a partition
_POINTS = 200  # of a line
_LETTER = 6.7  # pixels, of a name
_LABEL = 26  # letters of a line of a bar's label
_NAME = 24  # letters of a task's name beside a row; the pointer shows all of it
_SCALE = [(0, HARMS), (0.5, ZERO), (1, SERVES)]
_FAINT = "rgba(128,128,128,0.22)"  # lines, on white and on black
_MUTED = "#6e7781"
_CLEAR = "rgba(0,0,0,0)"
_ARROWS = ("↑", "↓")  # after the name of a metric
_DASHES = ("solid", "dash", "dot")


class Shown(NamedTuple):
    """A run on the page, with its name there, in plain text, and its number, which is its colour.

    ``order`` holds the positions of its tasks in the order in which figures show them, and
    ``titles`` is ``{task: name as shown}``.
    """

    data: RunData
    name: str
    order: list[int]
    number: int
    titles: Mapping[str, str]

    @property
    def tasks(self) -> list[str]:
        """Its tasks in the order in which figures show them, as they are shown."""
        return [self.titles[self.data.tasks[k]] for k in self.order]


class Card(NamedTuple):
    """A figure on the page, drawn when it comes into view; the texts are plain.

    Cards stand side by side where each has ``width`` pixels; up to ``widest`` pixels they look
    well. In a card that is narrower than ``numbers`` pixels the numbers in the cells are hidden.
    The key below the figure has a colour and a text for each of its entries. The frames of the
    figure, if there are several, are moments, from which the reader chooses.
    """

    title: str
    figure: go.Figure
    width: int
    widest: int | None = None
    numbers: int = 0
    key: Sequence[tuple[str, str]] = ()

    def json(self) -> str:
        """The figure for a script of the page, in which a "<" must not end the element."""
        return str(to_json_plotly(self.figure)).replace("<", "\\u003c")


def affinity(run: Shown) -> Card:
    """The matrix that tasks are grouped by, over the batches."""
    recorded, title = _with_room(run.data.affinity, run.name)
    effects = relative(recorded.values)
    measured = ~np.isnan(recorded.values)
    measured |= measured.swapaxes(1, 2)
    unmeasured = np.where(measured, "no positive self-affinity yet", "never measured")
    matrices = recorded._replace(values=normalised(recorded.values))
    return _matrices(run, title, matrices, "normalised affinity", effects, unmeasured)


def conflicts(run: Shown) -> Card:
    """Cosines between gradients over the batches."""
    recorded, title = _with_room(run.data.conflicts, run.name)
    itself = np.eye(len(run.tasks), dtype=bool)
    values = np.where(itself, np.float32(np.nan), recorded.values)
    return _matrices(run, title, recorded._replace(values=values), "cosine")


def _with_room(recorded: Recorded, name: str) -> tuple[Recorded, str]:
    """As many matrices as a slider has room for, and the title of their figure."""
    batches, values = recorded
    most = min(_MATRICES, _ENTRIES // (2 * values[0].size))
    chosen = evenly(len(values), max(3, most))
    if len(batches) == 1:
        name = f"{name}, batch {batches[0]}"
    elif len(chosen) < len(batches):
        name = f"{name} ({len(chosen)} of {len(batches)} recorded matrices)"
    return Recorded(batches[chosen], values[chosen]), name


def _matrices(
    run: Shown,
    title: str,
    recorded: Recorded,
    meaning: str,
    effects: NDArray[np.float32] | None = None,
    unmeasured: NDArray[np.str_] | None = None,
) -> Card:
    """Symmetric matrices with the groups framed; the last one is shown first.

    The pointer shows a value and, if there are ``effects``, the effect of the row on the column;
    where the value is NaN, the text in ``unmeasured``.
    """
    tasks = run.tasks
    order = np.ix_(run.order, run.order)
    grouped = run.data.method == "selective" and len(tasks) > 1
    frames = []
    for n, batch in enumerate(recorded.batches):
        matrix = recorded.values[n][order] + np.float32(0)  # turns -0.0 into 0.0
        trace = {"z": matrix, "hovertemplate": f"%{{y}}, %{{x}}<br>{meaning}: %{{z:.3f}}"}
        if effects is not None and unmeasured is not None:
            trace |= _at_the_pointer(matrix, meaning, effects[n][order], unmeasured[n][order])
        trace["hovertemplate"] += "<extra></extra>"
        framed = _group_frames(run, int(batch)) if grouped else []
        frames.append(
            go.Frame(
                name=str(batch), data=[{"type": "heatmap", **trace}], layout={"shapes": framed}
            )
        )
    cell, few = _cell(len(tasks)), len(tasks) <= _FEW
    end = largest(recorded.values[-1])
    beyond = np.abs(recorded.values[np.isfinite(recorded.values)]).max(initial=0) > 1.005 * end
    least, most = ("≤ ", "≥ ") if beyond else ("", "")  # the colours end before the values do
    digits = 1 if end >= 0.5 else 2
    number = 17 + 6 * digits  # pixels, with a sign
    figure = _heatmap(
        tasks,
        cell,
        {
            "x": tasks,
            **trace,
            "zmin": -end,
            "zmax": end,
            "colorscale": _SCALE,
            "xgap": 1 if few else 0,
            "ygap": 1 if few else 0,
            "hoverongaps": unmeasured is not None,
            "texttemplate": f"%{{z:.{digits}f}}" if few else None,
            "textfont": {"size": 10, "color": INK},
            "colorbar": _colorbar(
                meaning,
                tickvals=[-end, 0, end],
                ticktext=[f"{least}−{end:.2g}", "0", f"{most}{end:.2g}"],
            ),
        },
        {"r": 10, "t": 60, "b": _room(tasks, cell) if few else 14},
        frames,
        xaxis=_task_axis(
            tasks,
            cell,
            tickangle=-90,
            tickfont={"size": min(_letters(cell), 250 / len(tasks))},
            showticklabels=few,
            showline=False,
        ),
        shapes=framed,
    )
    figure.update_yaxes(showline=False)
    sides = _room(tasks, cell) + 10
    return Card(
        title,
        figure,
        sides + max(260, round(min(cell, number) * len(tasks))),
        widest=sides + max(400, round(1.7 * cell * len(tasks))),
        numbers=sides + number * len(tasks),
    )


def _at_the_pointer(
    matrix: NDArray[np.float32],
    meaning: str,
    effects: NDArray[np.float32],
    unmeasured: NDArray[np.str_],
) -> dict[str, Any]:
    """The text at the pointer; words take more room than numbers."""
    pair = np.isnan(matrix) & ~np.eye(len(matrix), dtype=bool)
    effect = "<br>effect of %{y} on %{x}: "
    if not (pair | np.isnan(effects)).any():
        numbers = f"%{{y}}, %{{x}}<br>{meaning}: %{{z:.3f}}{effect}%{{customdata:.3f}}"
        return {"customdata": effects, "hovertemplate": numbers, "hoverongaps": False}
    value = np.where(np.isnan(matrix), unmeasured, np.char.mod("%.3f", matrix))
    value[np.diag_indices(len(matrix))] = "the task itself"
    there = np.where(np.isnan(effects), "not known", np.char.mod("%.3f", effects))
    words = f"%{{y}}, %{{x}}<br>{meaning}: %{{customdata[0]}}{effect}%{{customdata[1]}}"
    return {"customdata": np.stack([value, there], 2), "hovertemplate": words, "hoverongaps": True}


def _group_frames(run: Shown, batch: int) -> list[dict[str, Any]]:
    """A frame around the pairs of tasks that share a group after a batch, seen on any colour."""
    data = run.data
    n = min(int(np.searchsorted(data.batches, batch)), len(data.batches) - 1)
    path = "".join(
        f"M{left - 0.5},{top - 0.5}H{right - 0.5}V{bottom - 0.5}H{left - 0.5}Z"
        for top, bottom, left, right in blocks(data.groups[n][run.order])
    )
    lines = ({"color": "#ffffff", "width": 4}, {"color": INK, "width": 2})
    return [{"type": "path", "path": path, "line": line} for line in lines]


def partition(run: Shown) -> Card:
    """A row for each task over the batches, coloured by group."""
    data, tasks = run.data, run.tasks
    chosen = evenly(len(data.batches), _COLUMNS)
    every = len(chosen) == len(data.batches)
    groups = data.groups[chosen][:, run.order]
    colours = group_colours(groups)
    sizes = np.stack([np.bincount(row)[row] for row in groups])
    cell = _cell(len(tasks), most=24)
    values = np.where(colours < 0, 0, 1 + colours % len(GROUPS))
    palette = [ALONE, *GROUPS][: int(values.max()) + 1]
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
        {"r": 10, "t": 30, "b": 44},
        xaxis=_batch_axis(
            "" if every else f"{len(chosen)} of {len(data.batches):,} are shown", showgrid=False
        ),
        shapes=_end_of_warmup(data),
    )
    title = run.name
    if (n_colours := int(colours.max()) + 1) > len(GROUPS):
        title += f": {n_colours} groups share {len(GROUPS)} colours, so some look alike"
    now: dict[tuple[int, str], list[str]] = {}
    alone = [task for task, colour in zip(tasks, values[-1], strict=True) if not colour]
    for task, group, colour in zip(tasks, groups[-1], values[-1], strict=True):
        if colour:
            now.setdefault((int(group), GROUPS[colour - 1]), []).append(task)
    key = [(colour, ", ".join(names)) for (_, colour), names in now.items()]
    if alone:
        key.append((ALONE, f"alone: {', '.join(alone)}"))
    return Card(title, figure, _room(tasks, cell) + 260, key=key)


def with_groups(runs: Sequence[Shown]) -> list[Shown]:
    """The runs whose number of groups is drawn."""
    return [run for run in runs if run.data.method == "selective"]


def number_of_groups(runs: Sequence[Shown]) -> tuple[str, list[Card]]:
    """A line for each selective run: a text on what it shows, and the figure, if there is one."""
    words = "The number of groups after each batch of the selective runs"
    selective = with_groups(runs)
    if not selective:
        return "", []
    found = [group_counts(run.data, _POINTS) for run in selective]
    width = max(points.width for points in found)
    most = max(points.high.max() for points in found)
    figure = go.Figure(
        layout=_layout(
            260,
            margin={"l": 50, "r": 12, "t": 30, "b": 44},
            xaxis=_batch_axis(""),
            yaxis={"title": {"text": "groups", "standoff": 8}, "rangemode": "tozero"},
        )
    )
    for run, points in zip(selective, found, strict=True):
        figure.add_traces(_line(points, run, "%{y:.3~g} groups"))
    if most < 10:
        figure.update_yaxes(dtick=1)
    if width == 1:
        figure.update_traces(line_shape="hv")
    return _with_means(words, width), [Card("", figure, 300)]


def losses(runs: Sequence[Shown]) -> tuple[str, list[Card], bool]:
    """A figure for each task with a line for each run; of many tasks, a map for each run.

    Returns a text on what the figures show, the figures, and whether their lines are runs.
    """
    if len(_titles(runs)) > _FEW:
        words = (
            "The loss of each task divided by its first loss. Green: the loss has fallen. Brown: "
            "it has risen."
        )
        return words, [_loss_map(run) for run in runs], False
    spread = [thin(run.data.batches, run.data.losses, points=_POINTS) for run in runs]
    words = "The loss of each task before the first step of a batch"
    words = _with_means(words, max(points.width for points in spread))
    titles = _titles(runs)
    return words, _lines(titles, dict.fromkeys(titles, "loss"), runs, spread), True


def _titles(runs: Iterable[Shown]) -> dict[str, str]:
    """The tasks of all runs, and their names as shown."""
    found: dict[str, str] = {}
    for run in runs:
        for task in run.data.tasks:
            found.setdefault(task, run.titles[task])
    return found


def evaluations(runs: Sequence[Shown]) -> list[Card]:
    """A figure for each of a few tasks that were evaluated during training."""
    spread = [thin(*run.data.evaluations, points=_POINTS) for run in runs]
    known = {
        task
        for run in runs
        for task, values in zip(run.data.tasks, run.data.evaluations.values.T, strict=True)
        if np.isfinite(values).any()
    }
    titles = {task: title for task, title in _titles(runs).items() if task in known}
    labels = dict.fromkeys(titles, "metric")
    for run in runs:
        names = {} if run.data.finished is None else run.data.finished.metric_names
        for task, name in names.items():
            if task in titles and (words := name.split()):
                # The arrow stands in the heading: beside an axis it would be turned.
                metric = " ".join(word for word in words if word not in _ARROWS)
                labels[task] = metric or "metric"
                separator = ", " if metric else " "
                titles[task] = f"{_titles([run])[task]}{separator}{name.strip()}"
    if len(labels) > _FEW:
        return []
    return _lines(titles, labels, runs, spread, mode="lines+markers")


def _lines(
    titles: Mapping[str, str],
    labels: Mapping[str, str],
    runs: Sequence[Shown],
    spread: Sequence[Thinned],
    mode: str = "lines",
) -> list[Card]:
    """A figure for each task with a line for each run, of values ``[P, K]``.

    ``titles`` is ``{task: heading}``, and ``labels`` is ``{task: what is measured}``. Where the
    largest value is ten times the smallest or more, the axis is logarithmic, and says so.
    """
    cards = []
    for task, label in labels.items():
        figure = go.Figure(layout=_layout(200, margin={"l": 62, "r": 8, "t": 8, "b": 40}))
        seen = []
        for run, points in zip(runs, spread, strict=True):
            if task in run.data.tasks and len(points.batches):
                of_task = points.of(run.data.tasks.index(task))
                figure.add_traces(_line(of_task, run, "%{y:.4~g}", mode))
                seen += [of_task.low, of_task.high]
        values = np.concatenate(seen)
        values = values[np.isfinite(values)]
        # With three ticks in a decade or more, plotly writes 1, 2 and 5, or powers of ten.
        axis: dict[str, Any] = {"nticks": 5, "title": {"text": label, "standoff": 6}}
        if len(values) and 0 < 10 * values.min() <= values.max():
            axis |= {"type": "log", "nticks": 3, "tickformat": "~g"}
            axis["title"]["text"] = f"{label} (log scale)"
        figure.update_yaxes(axis)
        figure.update_xaxes(title={"text": "batch", "standoff": 4}, nticks=6)
        cards.append(Card(titles[task], figure, 250))
    return cards


def _loss_map(run: Shown) -> Card:
    """A row for each task: its loss over the batches, divided by its first one."""
    points = thin(run.data.batches, run.data.losses[:, run.order], points=_POINTS)
    mean = points.mean.T  # [K, P]
    first = np.isfinite(mean).argmax(1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(mean / np.take_along_axis(mean, first, 1))
    most = float(np.nanmax(np.abs(np.where(np.isfinite(change), change, np.nan)), initial=0.1))
    step = max(1, round(most / 2)) if most >= 1 else 0.5 * most
    powers = np.arange(-(most // step), most // step + 1) * step
    cell = _cell(len(run.tasks))
    figure = _heatmap(
        run.tasks,
        cell,
        {
            "x": points.batches,
            "z": change.astype(np.float32),
            "zmin": -most,
            "zmax": most,
            "colorscale": "BrBG_r",
            "customdata": mean.astype(np.float32),
            "hovertemplate": "%{y}, batch %{x:.0f}<br>loss %{customdata:.4~g}<extra></extra>",
            "colorbar": _colorbar(
                "loss / first loss (log scale)",
                tickvals=powers,
                ticktext=[f"{2.0**power:.3g}" for power in powers],
            ),
        },
        {"r": 10, "t": 60, "b": 44},
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
    room = 12 + round(_LETTER * max(len(line) for label in labels for line in label.split("<br>")))
    places = list(range(len(bars)))
    figure = go.Figure(
        layout=_layout(
            64 + (18 + 16 * lines) * len(bars),
            barmode="stack",
            margin={"l": room, "r": 20, "t": 10, "b": 54},
            xaxis={
                "title": {"text": f"{unit} per batch", "standoff": 8},
                "rangemode": "tozero",
                "nticks": 6,
            },
            yaxis={"showgrid": False, "tickvals": places, "ticktext": labels},
        )
    )
    sections = {
        section: colour
        for section, colour in SECTIONS.items()
        if any(section in bar.sections for bar in bars)
    }
    for section, colour in sections.items():
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
            text=f"{three_digits(scale * bar.seconds)} {unit}{ratio}",
            showarrow=False,
            xanchor="left",
            xshift=4,
        )
    key = [(colour, section) for section, colour in sections.items()]
    return Card("", figure, room + 320, key=key)


def _line(points: Thinned, run: Shown, value: str, mode: str = "lines") -> list[go.Scatter]:
    """The mean, and a band from the minimum to the maximum."""
    colour = colour_of_run(run.number)
    name = _escaped(run.name)
    red, green, blue = colors.hex_to_rgb(colour)
    bounds = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "x": points.batches}
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.13)"}
    mean = go.Scatter(
        x=points.batches,
        y=points.mean,
        mode=mode if len(points.batches) > 1 else "markers",
        marker={"size": 5},
        opacity=0.95,
        line={"color": colour, "width": 1.6, "dash": _DASHES[run.number // len(RUNS) % 3]},
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
    axis = {"gridcolor": _FAINT, "zeroline": False, "linecolor": _FAINT, "ticks": ""}
    layout = {
        "template": "none",
        "height": height,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "showlegend": False,
        "hoverlabel": {"font": {"size": 12, "color": "#ffffff"}, "bgcolor": INK},
        "modebar": {"bgcolor": _CLEAR, "color": "#8c959f", "activecolor": "#57606a"},
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
    longest = max(len(short(name, _NAME)) for name in names)
    return round(12 + _LETTER * _letters(cell) / 12 * longest)


def _task_axis(names: Sequence[str], cell: float, **more: Any) -> dict[str, Any]:
    """An axis of tasks; names for which there is no room are left out."""
    named = range(0, len(names), -(-11 // max(1, round(cell))))
    return {
        "type": "category",
        "showgrid": False,
        "tickfont": {"size": _letters(cell)},
        "tickvals": list(named),
        "ticktext": [_escaped(names[k], _NAME) for k in named],
        **more,
    }


def _colorbar(title: str, **more: Any) -> dict[str, Any]:
    """A short one above the figure, beside plotly's buttons, so that it takes no width."""
    return {
        "orientation": "h",
        "title": {"text": title, "side": "top", "font": {"size": 12}},
        "thickness": 9,
        "lenmode": "pixels",
        "len": 170,
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        "y": 1,
        "yanchor": "bottom",
        "ypad": 6,
        "outlinewidth": 0,
        "tickfont": {"size": 10.5},
        **more,
    }


def _batch_axis(note: str, **more: Any) -> dict[str, Any]:
    text = f"batch ({note})" if note else "batch"
    return {"title": {"text": text, "standoff": 6}, "nticks": 8, **more}


def _stepped(palette: Sequence[str]) -> list[tuple[float, str]]:
    n = len(palette)
    return [(edge / n, colour) for k, colour in enumerate(palette) for edge in (k, k + 1)]


def _end_of_warmup(run: RunData) -> list[dict[str, Any]]:
    if not 0 < run.warmup < run.batches[-1]:
        return []
    line = {"color": _MUTED, "width": 1, "dash": "dot"}
    x = run.warmup + 0.5
    return [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}]


def _with_means(words: str, width: int) -> str:
    """A sentence that says what a point of a line is, if it stands for several batches."""
    means = f" (means of up to {width} batches; shaded: minimum to maximum)" if width > 1 else ""
    return f"{words}{means}."


def _escaped(name: str, longest: int = 40) -> str:
    return html.escape(short(name, longest), quote=False)


def _wrapped(label: str) -> str:
    return "<br>".join(
        html.escape(line, quote=False)
        for line in textwrap.wrap(label, _LABEL, break_on_hyphens=False)
    )
