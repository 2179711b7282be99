"""The paper's figures of any runs: time per batch, grouping, affinity over time.

Each picture has a function that computes what it shows, so that numbers can be had without it.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from taskgroup.sentences import listed

__all__ = [
    "Bar",
    "Counts",
    "Course",
    "RunData",
    "affinity_courses",
    "affinity_over_time",
    "changed_most",
    "figures",
    "group_counts",
    "grouping",
    "order_by_share",
    "seconds_per_batch",
    "shared",
    "time_per_batch",
]

Floats = NDArray[np.float64]
Pair = tuple[str, str]

_DPI = 150
_JOINT = ("joint", "gd")  # the first that there is, ratios are to
_POINTS = 60  # of a line of many batches
_LONGEST = 40  # name that is written out
_OTHER, _WHOLE = "other", "not divided"
_SECTIONS = {
    "forward": "#4393c3",
    "loss": "#92c5de",
    "backward": "#d6604d",
    "optimizer": "#f4a582",
    _OTHER: "#bdbdbd",
    _WHOLE: "#878787",
}
# What takes time: of every method, and of selective updates alone.
_WORK = (
    *("data", "subset", "size", "batch_size", "backbone", "patch", "dim", "depth"),
    *("attention_heads", "decoder", "device", "precision"),
)
_WAYS = (
    *("grouping", "affinity", "credit", "outside"),
    *("groups_per_batch", "observe_every", "regroup_every"),
)
# Runs that differ in these alone are averaged; the method and the tasks are looked at elsewhere.
_INCIDENTAL = {
    *("seed", "checkpoint_every", "evaluate_every", "baseline", "root", "bad", "workers"),
    *("method", "tasks"),
}
_SPEAKING = {"data", "grouping", "backbone", "device", "precision"}


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
    """What the figures need of a run; :func:`taskgroup.experiment.history.load_run_data` reads it.

    Attributes:
        name: of the run, its folder.
        settings: of its recipe.
        tasks: the K tasks in the order of the matrices; none before the first batch.
        warmup: batches of warm-up; no fewer than there are while it goes on.
        batches: ``[B]``, the number of each batch.
        groups: ``[B, K]``, the group of each task after that batch, counted from 0.
        seconds: of a batch, ``{section: seconds}`` with the whole as ``"everything"``; None of a
            run that is not finished.
        affinity_batches: ``[N]``, the batches after which the affinity was recorded.
        affinities: ``[N, K, K]``, row i the effect of stepping task i.
    """

    name: str
    settings: Mapping[str, Any]
    tasks: tuple[str, ...]
    warmup: int
    batches: NDArray[np.int64]
    groups: NDArray[np.int16]
    seconds: Mapping[str, float] | None
    affinity_batches: NDArray[np.int64]
    affinities: NDArray[np.float32]

    @property
    def method(self) -> str:
        """``"selective"``, ``"joint"``, or another."""
        return str(self.settings["method"])


class Bar(NamedTuple):
    """The time of a batch, of runs that differ in the seed.

    Attributes:
        label: the method, and the settings that tell it from other bars.
        sections: ``{section: seconds}``, the mean over the runs.
        totals: seconds of each run; their mean is the sum of the sections.
        ratio: to joint training at the same work; None without it.
    """

    label: str
    sections: dict[str, float]
    totals: list[float]
    ratio: float | None


class Counts(NamedTuple):
    """The number of groups over time, a point for several consecutive batches.

    Attributes:
        batches: the middle of each point's batches.
        mean: of the number of groups.
        low: the least.
        high: the most.
    """

    batches: Floats
    mean: Floats
    low: Floats
    high: Floats


class Course(NamedTuple):
    """How the affinity between two tasks went, of runs that differ in the seed.

    Attributes:
        label: the decay, and the settings that tell it from other courses.
        decay: of the affinity.
        runs: of each run, batches ``[N]`` and entries of the matrix ``[N, 2]``: the effect of the
            first task on the second, and of the second on the first.
        batches: of the mean, as far as all runs go.
        mean: over the runs, ``[len(batches), 2]``.
    """

    label: str
    decay: float
    runs: list[tuple[NDArray[np.int64], Floats]]
    batches: NDArray[np.int64]
    mean: Floats


def figures(
    runs: Sequence[RunData], out: str | os.PathLike[str], pair: Pair | None = None
) -> tuple[list[Path], list[str]]:
    """Draw ``time_per_batch.png``, ``grouping.png`` and ``affinity_over_time.png``.

    The paper's Figures 2, 3 and 4, of finished runs and of runs that are still training. A picture
    that no run has the data for is not drawn.

    Args:
        runs: those to draw.
        out: the folder, made where it is missing.
        pair: two tasks whose affinity to draw; None is the pair of :func:`changed_most`.

    Returns:
        The pictures that were drawn, and sentences on what was left out and why.

    Raises:
        ValueError: if there is no run, or no such pair of tasks. Nothing is drawn then.
    """
    if not runs:
        raise ValueError("There are no runs to draw; name the folder of one at least.")
    if pair is not None:
        _check_pair(runs, pair)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = ("time_per_batch.png", "grouping.png", "affinity_over_time.png")
    times, groups, affinities = paths = [out / name for name in names]
    found = [
        time_per_batch(runs, times),
        grouping(runs, groups),
        affinity_over_time(runs, affinities, pair),
    ]
    written = [path for path, (done, _) in zip(paths, found, strict=True) if done]
    return written, [note for _, notes in found for note in notes]


def time_per_batch(runs: Sequence[RunData], path: str | os.PathLike[str]) -> tuple[bool, list[str]]:
    """Bars of the time of a batch, divided into sections; the paper's Figure 2.

    Args:
        runs: those to draw.
        path: of the PNG.

    Returns:
        Whether there was anything to draw, and what was left out.
    """
    bars, notes = seconds_per_batch(runs)
    if not bars:
        return False, notes
    bars.sort(key=lambda bar: sum(bar.sections.values()))
    totals = [sum(bar.sections.values()) for bar in bars]
    most = max(max(bar.totals) for bar in bars)
    scale, unit, units = (1e3, "ms", "milliseconds") if most < 0.5 else (1.0, "s", "seconds")
    labels = [textwrap.fill(bar.label, 34, break_on_hyphens=False) for bar in bars]
    lines = 1 + max(label.count("\n") for label in labels)
    pitch = 0.2 + 0.16 * lines
    figure = Figure(figsize=(9, 1.3 + pitch * len(bars)), layout="constrained")
    axes = figure.subplots()
    ends = np.zeros(len(bars))
    for section in _in_order({section for bar in bars for section in bar.sections}):
        widths = np.array([scale * bar.sections.get(section, 0.0) for bar in bars])
        colour = _SECTIONS.get(section, "#5aae61")
        axes.barh(range(len(bars)), widths, 0.62, ends, color=colour, label=section)
        ends += widths
    for y, (bar, total) in enumerate(zip(bars, totals, strict=True)):
        ratio = "" if bar.ratio is None else f"   {bar.ratio:.2f}x"
        axes.annotate(
            f"{scale * total:.3g} {unit}{ratio}",
            (scale * max(bar.totals), y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    several = [(y, bar.totals) for y, bar in enumerate(bars) if len(bar.totals) > 1]
    for n, (y, found) in enumerate(several):
        axes.plot(
            [scale * total for total in found],
            [y] * len(found),
            "ok",
            markerfacecolor="white",
            markersize=4,
            label=None if n else "one run",
        )
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set(xlim=(0, 1.2 * scale * most), ylim=(len(bars) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    relative = any(bar.ratio is not None for bar in bars)
    axes.set_xlabel(f"{units} per batch" + (", and times joint training" if relative else ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Time per batch", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=_DPI)
    return True, notes


def seconds_per_batch(runs: Sequence[RunData]) -> tuple[list[Bar], list[str]]:
    """The time of a batch by method, runs that differ in the seed averaged.

    Runs are one bar if the method, the tasks, the network, the batches and the machine's settings
    are the same, and for selective updates how they group. What no section accounts for is
    ``"other"``; of runs without sections all is ``"not divided"``.

    Returns:
        The bars in the order of the runs, and sentences on what was left out and why.
    """
    timed = [run for run in runs if run.seconds]
    if not timed:
        return [], ["There is no time per batch to draw: no run is finished."]
    notes = _without("The time per batch", runs, timed, "not finished, no summary.json")
    selective = [run for run in timed if run.method == "selective"]
    work, ways = _differing(timed, _WORK), _differing(selective, _WAYS)
    tasks_differ = len(set(map(_tasks, timed))) > 1
    alike: dict[tuple[Any, ...], list[RunData]] = {}
    for run in timed:
        key = (_work(run), run.method, _values(run, _WAYS if run in selective else ()))
        alike.setdefault(key, []).append(run)
    sections = {key: _mean_sections(group) for key, group in alike.items()}
    bars = []
    for key, group in alike.items():
        done, method, _ = key
        run = group[0]
        label = [method, *_words(run, work, timed)]
        label += _words(run, ways, selective) if run in selective else []
        if tasks_differ:
            few = len(run.tasks) <= 3
            label.append(" + ".join(run.tasks) if few else f"{len(run.tasks)} tasks")
        mean = sections[key]
        joint = [sections[done, name, ()] for name in _JOINT if (done, name, ()) in sections]
        ratio = sum(mean.values()) / sum(joint[0].values()) if joint else None
        totals = [run.seconds["everything"] for run in group if run.seconds]
        bars.append(Bar(", ".join(label), mean, totals, ratio))
    if alone := [bar.label for bar in bars if bar.ratio is None]:
        notes.append(
            f"The time of {listed(alone)} is not relative to joint training: no joint run of the "
            "same tasks, network and batches is finished."
        )
    return bars, notes


def grouping(runs: Sequence[RunData], path: str | os.PathLike[str]) -> tuple[bool, list[str]]:
    """Who shared a group, and the number of groups over time; the paper's Figure 3.

    Left the mean of :func:`shared` over the selective runs, each weighing the same, tasks that go
    together side by side; right :func:`group_counts` of each. Of runs on different tasks those of
    the most common ones are drawn.

    Args:
        runs: those to draw.
        path: of the PNG.

    Returns:
        Whether there was anything to draw, and what was left out.
    """
    drawn, notes = _grouped(runs)
    if not drawn:
        return False, notes
    tasks = drawn[0].tasks
    share = np.mean([_in_task_order(shared(run), run, tasks) for run in drawn], 0)
    order = order_by_share(share)

    cell = max(3.0, min(12.0, 0.36 * len(tasks))) / len(tasks)  # inches
    names = [_short(tasks[k]) for k in order]
    size = max(2.0, min(9.0, 0.75 * 72 * cell))  # points
    room = max(map(len, names)) * 0.62 * size / 72  # inches of the longest name
    of_runs = _short_names(drawn)
    columns = 2 if max(map(len, of_runs)) <= 30 else 1
    below = 4.7 + 0.18 * (len(of_runs) + 1) / columns  # the picture on the right and its legend
    side = cell * len(tasks) + room
    figure = Figure(figsize=(side + 8.0, max(side + 0.6, below)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side + 1, 7))
    left.set_anchor("N")
    image = left.imshow(share[np.ix_(order, order)], cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, cax=left.inset_axes((1.02, 0, 0.03, 1)))
    bar.set_label("share of the batches in one group")
    _name_tasks(left, names, size)
    if len(tasks) <= 20:
        _write_values(left, share[np.ix_(order, order)])
    left.set_title("Who shared a group" + _mean_of(len(drawn)), loc="left")
    _draw_counts(right, drawn, of_runs)
    right.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns
    )
    figure.savefig(path, dpi=_DPI)
    return True, notes


def shared(run: RunData) -> Floats:
    """The share of the batches after the warm-up in which two tasks shared a group, ``[K, K]``.

    Raises:
        ValueError: if no such batch has been trained on.
    """
    groups = run.groups[run.batches > run.warmup]
    if not len(groups):
        raise ValueError(f"{run.name} has no batch after its warm-up of {run.warmup}.")
    total = np.zeros((len(run.tasks), len(run.tasks)))
    for start in range(0, len(groups), 1000):  # 100 tasks: 10 MB at a time
        part = groups[start : start + 1000]
        for label in range(int(part.max()) + 1):
            members = (part == label).astype(np.float32)
            total += members.T @ members
    return total / len(groups)


def order_by_share(share: Floats) -> list[int]:
    """Positions of the tasks, those that often share a group side by side.

    The leaves of average linkage on ``1 - share``, turned so that neighbours are as near as can be.

    Example:
        >>> order_by_share(np.array([[1, 0, 0.9], [0, 1, 0.1], [0.9, 0.1, 1]]))
        [0, 2, 1]
    """
    if len(share) < 3:
        return list(range(len(share)))
    distance = squareform(1 - share, checks=False)
    order = [int(k) for k in leaves_list(linkage(distance, "average", optimal_ordering=True))]
    return order if order[0] < order[-1] else order[::-1]


def group_counts(run: RunData) -> Counts:
    """The number of groups over time, about sixty points of consecutive batches.

    No point has batches of the warm-up and later ones.
    """
    counts = run.groups.max(1).astype(np.float64) + 1
    width = -(-len(counts) // _POINTS)
    learned = int(np.searchsorted(run.batches, run.warmup, "right"))
    starts = np.r_[np.arange(0, learned, width), np.arange(learned, len(counts), width)]
    sizes = np.diff(np.r_[starts, len(counts)])
    return Counts(
        batches=np.add.reduceat(run.batches.astype(np.float64), starts) / sizes,
        mean=np.add.reduceat(counts, starts) / sizes,
        low=np.minimum.reduceat(counts, starts),
        high=np.maximum.reduceat(counts, starts),
    )


def affinity_over_time(
    runs: Sequence[RunData], path: str | os.PathLike[str], pair: Pair | None = None
) -> tuple[bool, list[str]]:
    """The affinity between two tasks over the batches, a line for each decay; Figure 4.

    Entries of the matrix as they were recorded, not divided by a self-affinity. Of several seeds
    the mean is drawn, and the runs thin. Of runs on different tasks those of the most common ones
    are drawn.

    Args:
        runs: those to draw.
        path: of the PNG.
        pair: two tasks; None is the pair of :func:`changed_most`.

    Returns:
        Whether there was anything to draw, and what was left out.

    Raises:
        ValueError: if there is no such pair of tasks.
    """
    if pair is not None:
        _check_pair(runs, pair)
    drawn, notes = _with_affinity(runs, pair)
    if not drawn:
        return False, notes
    first, second = changed_most(drawn) if pair is None else pair
    courses = affinity_courses(drawn, (first, second))
    for course in courses:
        if short := [b[-1] for b, _ in course.runs if b[-1] < max(c[-1] for c, _ in course.runs)]:
            notes.append(
                f"The mean of {course.label} ends at batch {min(short)}, as far as all its runs go."
            )

    titles = [course.label + _mean_of(len(course.runs)) for course in courses]
    columns = max(1, min(len(titles), 130 // (8 + max(map(len, titles)))))
    height = 4.0 + 0.18 * -(-len(titles) // columns)
    figure = Figure(figsize=(10.5, height), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(courses)))
    for direction, axes in enumerate(panels):
        step, effect = [(first, second), (second, first)][direction]
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        for course, title, colour in zip(courses, titles, shades, strict=True):
            if len(course.runs) > 1:
                for batches, values in course.runs:
                    axes.plot(batches, values[:, direction], color=colour, lw=0.6, alpha=0.45)
            mark = "." if len(course.batches) < 3 else ""  # a line of one point is none
            axes.plot(
                course.batches,
                course.mean[:, direction],
                color=colour,
                marker=mark,
                linewidth=1.6,
                label=title,
            )
        axes.set_xlabel("batch")
        axes.set_title(f"step on {_short(step)}, effect on {_short(effect)}", loc="left", size=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("affinity, entry of the matrix as recorded")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize=8, loc="outside lower left", ncols=columns)
    figure.savefig(path, dpi=_DPI)
    return True, notes


def changed_most(runs: Iterable[RunData]) -> Pair:
    """The two tasks whose affinity changed the most, in task order.

    That is the largest difference between the highest and the lowest recorded entry of the matrix,
    off its diagonal, of any run and either direction; of equals the first.

    Args:
        runs: with affinities of the same two tasks or more.
    """
    most, pair = -1.0, ("", "")
    for run in runs:
        entries = np.nan_to_num(run.affinities)
        ranges = entries.max(0) - entries.min(0)
        ranges = np.triu(np.maximum(ranges, ranges.T), 1)
        ranges[np.tril_indices(len(run.tasks))] = -1
        i, k = np.unravel_index(int(ranges.argmax()), ranges.shape)
        if ranges[i, k] > most:
            most, pair = float(ranges[i, k]), (run.tasks[i], run.tasks[k])
    return pair


def affinity_courses(runs: Sequence[RunData], pair: Pair) -> list[Course]:
    """The affinity between two tasks over time, by decay, runs that differ in the seed averaged.

    Where runs recorded it at different batches, the mean goes through straight lines between them.

    Args:
        runs: with affinities of the pair.
        pair: two tasks.
    """
    names = sorted({name for run in runs for name in run.settings} - _INCIDENTAL - {"decay"})
    differing = _differing(runs, names)
    found: dict[tuple[Any, ...], list[RunData]] = {}
    for run in sorted(runs, key=lambda run: float(run.settings["decay"])):
        found.setdefault(_values(run, ["decay", *names]), []).append(run)
    courses = []
    for group in found.values():
        decay = float(group[0].settings["decay"])
        lines = []
        for run in group:
            i, k = (run.tasks.index(task) for task in pair)
            entries = run.affinities[:, [i, k], [k, i]].astype(np.float64)
            lines.append((run.affinity_batches, entries))
        begin, end = max(b[0] for b, _ in lines), min(b[-1] for b, _ in lines)
        batches = np.unique(np.concatenate([b for b, _ in lines]))
        batches = batches[(batches >= begin) & (batches <= end)]
        through = [
            np.stack([np.interp(batches, b, values[:, d]) for d in range(2)], 1)
            for b, values in lines
        ]
        label = ", ".join([f"decay {decay:g}", *_words(group[0], differing, runs)])
        courses.append(Course(label, decay, lines, batches, np.mean(through, 0)))
    return courses


def _draw_counts(axes: Axes, runs: Sequence[RunData], names: Sequence[str]) -> None:
    width = 1
    for n, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = colormaps["tab10"](n % 10)
        points = group_counts(run)
        width = max(width, -(-len(run.batches) // _POINTS))
        faint = min(0.15, 0.4 / len(runs))  # or the bands of many hide the lines
        axes.fill_between(
            points.batches, points.low, points.high, color=colour, alpha=faint, linewidth=0
        )
        style = "-" if n < 10 else "--"
        axes.plot(points.batches, points.mean, style, color=colour, linewidth=1.4, label=name)
    warmup = max(run.warmup for run in runs)
    last = max(int(run.batches[-1]) for run in runs)
    if warmup:
        axes.axvspan(0, warmup, color="#e8e8e8", zorder=0, linewidth=0, label="warm-up")
    most = max(int(run.groups.max()) for run in runs) + 1
    axes.set(xlabel="batch", ylabel="groups", xlim=(0, last), ylim=(0, 1.05 * most + 0.2))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(0.55)
    axes.set_anchor("N")
    of = f", mean of {width} batches; shaded: least and most" if width > 1 else ""
    axes.set_title(f"Number of groups{of}", loc="left")


def _mean_of(runs: int) -> str:
    return f", mean of {runs} runs" if runs > 1 else ""


def _name_tasks(axes: Axes, names: Sequence[str], size: float) -> None:
    turned, align = (45, "right") if size == 9 else (90, "center")
    axes.set_xticks(range(len(names)), names, rotation=turned, ha=align, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write_values(axes: Axes, values: Floats) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _grouped(runs: Sequence[RunData]) -> tuple[list[RunData], list[str]]:
    """The runs whose grouping is drawn, and why the others are not."""
    selective = [run for run in runs if run.method == "selective"]
    if not selective:
        return [], ["There is no grouping to draw: none of the runs is selective."]
    learned = [run for run in selective if len(run.batches) and run.batches[-1] > run.warmup]
    if not learned:
        return [], ["There is no grouping to draw: no run has a batch after its warm-up yet."]
    drawn = _of_common_tasks(learned)
    notes = [
        *_without("The grouping", runs, selective, "they do not group"),
        *_without("The grouping", selective, learned, "no batch after the warm-up yet"),
        *_without("The grouping", learned, drawn, "other tasks than most runs"),
    ]
    ways = {str(run.settings.get("grouping")): None for run in drawn}
    if len(ways) > 1:
        notes.append(f"Who shared a group is a mean over different groupings: {listed(ways)}.")
    return drawn, notes


def _with_affinity(runs: Sequence[RunData], pair: Pair | None) -> tuple[list[RunData], list[str]]:
    """The runs whose affinity is drawn, and why the others are not."""
    recorded = [run for run in runs if len(run.tasks) > 1 and np.any(run.affinities)]
    wanted = [run for run in recorded if pair is None or set(pair) <= set(run.tasks)]
    if not wanted:
        of = "" if pair is None else f" of {pair[0]} and {pair[1]}"
        return [], [f"There is no affinity{of} to draw: no run has recorded one."]
    drawn = _of_common_tasks(wanted)
    return drawn, [
        *_without("The affinity", runs, recorded, "none recorded"),
        *_without("The affinity", recorded, wanted, "they do not train both tasks"),
        *_without("The affinity", wanted, drawn, "other tasks than most runs"),
    ]


def _without(what: str, runs: Iterable[RunData], kept: Collection[RunData], why: str) -> list[str]:
    """A sentence on the runs that are not kept, if there are any."""
    left = [run.name for run in runs if run not in kept]
    return [f"{what} is without {listed(left)}: {why}."] if left else []


def _of_common_tasks(runs: Sequence[RunData]) -> list[RunData]:
    """The runs on the most common tasks of one data set; of equals the first."""
    common = Counter(map(_tasks, runs)).most_common(1)[0][0]
    return [run for run in runs if _tasks(run) == common]


def _tasks(run: RunData) -> tuple[str, frozenset[str]]:
    return str(run.settings.get("data")), frozenset(run.tasks)


def _work(run: RunData) -> tuple[Any, ...]:
    return _tasks(run), _values(run, _WORK)


def _check_pair(runs: Iterable[RunData], pair: Pair) -> None:
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if unknown := [task for task in pair if task not in tasks]:
        raise ValueError(
            f"The runs have no task {', '.join(map(repr, unknown))}; their tasks are "
            f"{', '.join(tasks) or 'not known before the first batch'}."
        )
    if pair[0] == pair[1]:
        raise ValueError(f"The affinity is drawn between two tasks, got {pair[0]!r} twice.")


def _values(run: RunData, names: Iterable[str]) -> tuple[Any, ...]:
    values = (run.settings.get(name) for name in names)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _differing(runs: Iterable[RunData], names: Iterable[str]) -> list[str]:
    """The settings that are not the same for all runs."""
    runs = list(runs)
    return [name for name in names if len({_values(run, [name]) for run in runs}) > 1]


def _words(run: RunData, names: Iterable[str], runs: Iterable[RunData]) -> list[str]:
    """Settings as a label has them; of those that take their name, not what most runs have."""
    words = []
    for name in names:
        usual = Counter(_values(other, [name]) for other in runs).most_common(1)[0][0]
        value = run.settings.get(name)
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        if isinstance(value, list | tuple):
            shown = "x".join(map(str, value))
        if name in _SPEAKING:
            words.append(shown)
        elif _values(run, [name]) != usual:
            words.append(f"{name.replace('_', ' ')} {'all' if value is None else shown}")
    return words


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}…{name[-8:]}"


def _short_names(runs: Sequence[RunData]) -> list[str]:
    """The names of the runs without the folders that all are in."""
    parts = [Path(run.name).parts for run in runs]
    above = 0
    while all(len(part) > above + 1 and part[above] == parts[0][above] for part in parts):
        above += 1
    return [_short("/".join(part[above:])) for part in parts]


def _mean_sections(runs: Sequence[RunData]) -> dict[str, float]:
    """``{section: seconds}`` that add up to the mean time of a batch."""
    seconds = [run.seconds for run in runs if run.seconds]
    total = float(np.mean([s["everything"] for s in seconds]))
    if any(len(s) == 1 for s in seconds):
        return {_WHOLE: total}
    names = _in_order({name for s in seconds for name in s} - {"everything"})
    means = {name: float(np.mean([s.get(name, 0.0) for s in seconds])) for name in names}
    return {**means, _OTHER: max(0.0, total - sum(means.values()))}


def _in_order(sections: Collection[str]) -> list[str]:
    """The sections as a batch has them, unknown ones before what is left."""
    known = [*_SECTIONS]
    unknown = sorted(set(sections) - set(known))
    return [name for name in [*known[:-2], *unknown, *known[-2:]] if name in sections]


def _in_task_order(matrix: Floats, run: RunData, tasks: Sequence[str]) -> Floats:
    order = [run.tasks.index(task) for task in tasks]
    return matrix[np.ix_(order, order)]
