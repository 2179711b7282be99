"""The figures of the HTML report, except for its matrices; plotly draws them in the browser."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from taskgroup.lab.report.colours import ALONE, GROUPS, RUNS, SECTIONS, colour_of_run
from taskgroup.lab.report.groups import group_colours, group_counts
from taskgroup.lab.report.plotly_parts import (
    FEW,
    LETTER,
    Card,
    Shown,
    batch_axis,
    colorbar,
    colors,
    escaped,
    go,
    heatmap,
    layout,
    room_for,
    row_height,
)
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.report.thinning import Thinned, evenly, thin
from taskgroup.lab.report.timing import Bar, scale_of, three_digits

__all__ = [
    "evaluations",
    "losses",
    "number_of_groups",
    "partition",
    "time_per_batch",
    "with_groups",
]

_COLUMNS = 800  # of a partition
_POINTS = 200  # of a line
_LABEL = 26  # letters of a line of a bar's label
_MUTED = "#6e7781"
_ARROWS = ("↑", "↓")  # after the name of a metric
_DASHES = ("solid", "dash", "dot")


def partition(run: Shown) -> Card:
    """A row for each task over the batches, coloured by group."""
    data, tasks = run.data, run.tasks
    chosen = evenly(len(data.batches), _COLUMNS)
    every = len(chosen) == len(data.batches)
    groups = data.groups[chosen][:, run.order]
    colours = group_colours(groups)
    sizes = np.stack([np.bincount(row)[row] for row in groups])
    cell = row_height(len(tasks), most=24)
    values = np.where(colours < 0, 0, 1 + colours % len(GROUPS))
    palette = [ALONE, *GROUPS][: int(values.max()) + 1]
    counts = np.broadcast_to(groups.max(1) + 1, sizes.T.shape)
    figure = heatmap(
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
        xaxis=batch_axis(
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
    return Card(title, figure, room_for(tasks, cell) + 260, key=key)


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
        layout=layout(
            260,
            margin={"l": 50, "r": 12, "t": 30, "b": 44},
            xaxis=batch_axis(""),
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
    if len(_titles(runs)) > FEW:
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
    if len(labels) > FEW:
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
        figure = go.Figure(layout=layout(200, margin={"l": 62, "r": 8, "t": 8, "b": 40}))
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
    cell = row_height(len(run.tasks))
    figure = heatmap(
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
            "colorbar": colorbar(
                "loss / first loss (log scale)",
                tickvals=powers,
                ticktext=[f"{2.0**power:.3g}" for power in powers],
            ),
        },
        {"r": 10, "t": 60, "b": 44},
        xaxis=batch_axis(
            f"means of up to {points.width} batches" if points.width > 1 else "", showgrid=False
        ),
    )
    return Card(run.name, figure, room_for(run.tasks, cell) + 320)


def time_per_batch(bars: Sequence[Bar]) -> Card:
    """Bars of the time per batch, divided into sections."""
    bars = sorted(bars, key=lambda bar: bar.seconds, reverse=True)
    scale, unit = scale_of(bars[0].seconds)
    labels = [_wrapped(bar.label) for bar in bars]
    lines = max(label.count("<br>") + 1 for label in labels)
    room = 12 + round(LETTER * max(len(line) for label in labels for line in label.split("<br>")))
    places = list(range(len(bars)))
    figure = go.Figure(
        layout=layout(
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
    name = escaped(run.name)
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


def _wrapped(label: str) -> str:
    return "<br>".join(
        html.escape(line, quote=False)
        for line in textwrap.wrap(label, _LABEL, break_on_hyphens=False)
    )
