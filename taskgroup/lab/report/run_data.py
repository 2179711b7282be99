"""How runs went, as numbers: what figures and reports show of any runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from taskgroup.lab.report.thinning import Thinned, thin
from taskgroup.lab.words import listed

__all__ = [
    "SECTIONS",
    "Bar",
    "Course",
    "Pair",
    "RunData",
    "affinity_courses",
    "average_share",
    "changed_most",
    "check_pair",
    "differences",
    "group_colours",
    "group_counts",
    "has_affinity",
    "order_by_share",
    "seconds_per_batch",
    "shared",
    "short",
    "short_names",
    "with_affinity",
    "with_groups",
]

Floats = NDArray[np.float64]
Pair = tuple[str, str]

#: The parts of a batch that are timed, what is left of it, and all of it where nothing is known;
#: and the colours that they have in pictures.
SECTIONS = {
    "forward": "#4393c3",
    "loss": "#92c5de",
    "backward": "#d6604d",
    "optimizer": "#f4a582",
    "other": "#bdbdbd",
    "not divided": "#878787",
}
_LONGEST = 40  # name that is written out
_JOINT = ("joint", "gd")  # the first that there is, ratios are to
# What takes time: of every method, and of selective updates alone.
_WORK = (
    *("data", "subset", "size", "batch_size", "backbone", "patch", "dim", "depth"),
    *("attention_heads", "decoder", "device", "precision"),
)
_WAYS = (
    *("grouping", "affinity", "credit", "outside"),
    *("groups_per_batch", "observe_every", "regroup_every"),
    *("warmup", "preference", "batches"),
)
# Runs that differ in these alone are averaged; the method and the tasks are looked at elsewhere.
_INCIDENTAL = {
    *("seed", "checkpoint_every", "evaluate_every", "conflicts_every", "baseline"),
    *("root", "bad", "workers", "method", "tasks"),
}
_SPEAKING = {"data", "grouping", "backbone", "device", "precision"}


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
    """What is shown of a run; :func:`taskgroup.lab.report.reader.load_run_data` reads it.

    Attributes:
        name: of the run, its folder.
        settings: of its recipe.
        tasks: the K tasks in the order of the matrices; none before the first batch.
        warmup: batches of warm-up; no fewer than there are while it goes on.
        batches: ``[B]``, the number of each batch.
        groups: ``[B, K]``, the group of each task after that batch, counted from 0.
        losses: ``[B, K]`` before that batch's first step; NaN of a task that was not looked at.
        seconds: of a batch, ``{section: seconds}`` with the whole as ``"everything"``; None of a
            run that has just begun.
        affinity_batches: ``[N]``, the batches after which the affinity was recorded.
        affinities: ``[N, K, K]``, row i the effect of stepping task i; NaN of an entry that was
            never observed until then, in runs that record it.
        conflict_batches: ``[C]``, the batches before which conflicts were measured.
        conflicts: ``[C, K, K]``, cosines of the tasks' gradients on the shared parameters.
        evaluation_batches: ``[E]``, the batches after which held-out data was evaluated on the way.
        evaluations: ``[E, K]``; NaN of a task whose metric takes too long for that.
        metrics: ``{task: value}`` on held-out data; None of a run that is not finished.
        metric_names: ``{task: name}`` of the same, with an arrow towards what is better.
        delta_m: in percent, against the baseline of the run; None without one.
        peak_bytes: of the GPU's memory that torch's allocator held at the peak; None on the CPU,
            and of a run that is not finished.
    """

    name: str
    settings: Mapping[str, Any]
    tasks: tuple[str, ...]
    warmup: int
    batches: NDArray[np.int64]
    groups: NDArray[np.int16]
    losses: NDArray[np.float32]
    seconds: Mapping[str, float] | None
    affinity_batches: NDArray[np.int64]
    affinities: NDArray[np.float32]
    conflict_batches: NDArray[np.int64]
    conflicts: NDArray[np.float32]
    evaluation_batches: NDArray[np.int64]
    evaluations: NDArray[np.float32]
    metrics: Mapping[str, float] | None
    metric_names: Mapping[str, str]
    delta_m: float | None
    peak_bytes: int | None = None

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
        return [], ["There is no time per batch to draw: no run has recorded it yet."]
    notes = _without("The time per batch", runs, timed, "not recorded yet")
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
    alone = [bar.label for bar in bars if bar.ratio is None]
    if alone and len(bars) > 1:
        notes.append(
            f"The time of {listed(alone)} is not relative to joint training: no joint run of the "
            "same tasks, network and batches is there."
        )
    return bars, notes


def with_groups(runs: Sequence[RunData]) -> tuple[list[RunData], list[str]]:
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


def average_share(runs: Sequence[RunData]) -> Floats:
    """The mean of :func:`shared` over runs on the same tasks, in the order of the first one's."""
    tasks = runs[0].tasks
    found = []
    for run in runs:
        order = [run.tasks.index(task) for task in tasks]
        found.append(shared(run)[np.ix_(order, order)])
    mean: Floats = np.mean(found, 0)
    return mean


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


def group_counts(run: RunData, points: int = 60) -> Thinned:
    """The number of groups over time, in about so many points of consecutive batches."""
    return thin(run.batches, run.groups.max(1) + 1, run.warmup, points)


def group_colours(groups: NDArray[np.int16]) -> NDArray[np.int16]:
    """A colour for every task at every time, so that a group keeps its colour while it changes.

    Of the groups of one time and the colours, those go together that share the most tasks, counted
    by the last colour that each task had (scipy's assignment); a group of new company takes the
    colour that has been out of use the longest.

    Args:
        groups: ``[N, K]``, the group of each task, counted from 0.

    Returns:
        ``[N, K]``, counted from 0; -1 of a task that is alone.

    Example:
        >>> group_colours(np.array([[0, 0, 1, 1, 2], [1, 1, 0, 0, 1], [0, 1, 0, 1, 1]]))
        array([[ 0,  0,  1,  1, -1],
               [ 0,  0,  1,  1,  0],
               [ 1,  0,  1,  0,  0]], dtype=int16)
    """
    colours = np.full(groups.shape, -1, np.int16)
    last = np.full(groups.shape[1], -1)
    used: list[int] = []  # the time when each colour was in use
    for n, labels in enumerate(groups):
        sizes = np.bincount(labels)
        common = np.zeros((len(sizes), 1 + len(used)), np.int64)
        np.add.at(common, (labels, 1 + last), 1)
        shared = np.flatnonzero(sizes > 1)
        rows, found = linear_sum_assignment(common[shared, 1:], maximize=True)
        colour_of = {
            int(group): int(colour)
            for group, colour in zip(shared[rows], found, strict=True)
            if common[group, 1 + colour]
        }
        for group in shared.tolist():
            if group not in colour_of:
                free = set(range(len(used))) - set(colour_of.values())
                oldest = min(free, key=used.__getitem__, default=len(used))
                if oldest == len(used) or used[oldest] >= n - 1:  # of the picture just before
                    oldest = len(used)
                    used.append(n)
                colour_of[group] = oldest
            used[colour_of[group]] = n
            colours[n, labels == group] = last[labels == group] = colour_of[group]
    return colours


def with_affinity(runs: Sequence[RunData], pair: Pair | None) -> tuple[list[RunData], list[str]]:
    """The runs whose affinity is drawn, and why the others are not."""
    recorded = [run for run in runs if has_affinity(run)]
    wanted = [run for run in recorded if pair is None or set(pair) <= set(run.tasks)]
    met = [run for run in wanted if pair is None or np.isfinite(_entries(run, pair)).any()]
    if not met:
        of = "" if pair is None else f" of {pair[0]} and {pair[1]}"
        why = "it was never measured" if wanted else "no run has recorded one"
        return [], [f"There is no affinity{of} to draw: {why}."]
    drawn = _of_common_tasks(met)
    return drawn, [
        *_without("The affinity", runs, recorded, "none recorded"),
        *_without("The affinity", recorded, wanted, "they do not train both tasks"),
        *_without("The affinity", wanted, met, "never measured between the two tasks"),
        *_without("The affinity", met, drawn, "other tasks than most runs"),
    ]


def has_affinity(run: RunData) -> bool:
    """Whether the run has recorded an affinity between tasks."""
    return len(run.tasks) > 1 and bool(np.nan_to_num(run.affinities).any())


def _entries(run: RunData, pair: Pair) -> Floats:
    """The affinity between two tasks, ``[N, 2]``: of the first on the second, and back."""
    i, k = (run.tasks.index(task) for task in pair)
    return run.affinities[:, [i, k], [k, i]].astype(np.float64)


def changed_most(runs: Iterable[RunData]) -> Pair:
    """The two tasks whose affinity changed the most, in task order.

    That is the largest difference between the highest and the lowest recorded entry of the matrix,
    off its diagonal, of any run and either direction; of equals the first.

    Args:
        runs: with affinities of the same two tasks or more.
    """
    most, pair = -1.0, ("", "")
    for run in runs:
        entries = np.nan_to_num(run.affinities, nan=np.nan)  # what is infinite is very large
        ranges = np.nan_to_num(np.fmax.reduce(entries) - np.fmin.reduce(entries))
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
        lines = [(run.affinity_batches, _entries(run, pair)) for run in group]
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


def differences(runs: Sequence[RunData]) -> list[str]:
    """The settings in which each of the runs may differ from the others, in words.

    Left out are the method, the seed, and what changes nothing of a training.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    shown_elsewhere = {*_INCIDENTAL, "batches"}
    differing = _differing(runs, [name for name in names if name not in shown_elsewhere])
    return [", ".join(_setting(name, run.settings.get(name)) for name in differing) for run in runs]


def short(name: str) -> str:
    """A name of forty letters at most, the middle of a longer one left out."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}…{name[-8:]}"


def short_names(runs: Sequence[RunData]) -> list[str]:
    """The names of the runs, short, without the folders that all are in."""
    parts = [Path(run.name).parts for run in runs]
    above = 0
    while all(len(part) > above + 1 and part[above] == parts[0][above] for part in parts):
        above += 1
    return [short("/".join(part[above:])) for part in parts]


def check_pair(runs: Iterable[RunData], pair: Pair) -> None:
    """Raise unless the runs have both tasks.

    Raises:
        ValueError: if they have not, or both are the same.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if unknown := [task for task in pair if task not in tasks]:
        raise ValueError(
            f"The runs have no task {', '.join(map(repr, unknown))}; their tasks are "
            f"{', '.join(tasks) or 'not known before the first batch'}."
        )
    if pair[0] == pair[1]:
        raise ValueError(f"The affinity is drawn between two tasks, got {pair[0]!r} twice.")


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
        if name in _SPEAKING:
            words.append(str(value))
        elif _values(run, [name]) != usual:
            words.append(_setting(name, value))
    return words


def _mean_sections(runs: Sequence[RunData]) -> dict[str, float]:
    """``{section: seconds}`` that add up to the mean time of a batch."""
    seconds = [run.seconds for run in runs if run.seconds]
    total = float(np.mean([s["everything"] for s in seconds]))
    if any(len(s) == 1 for s in seconds):
        return {"not divided": total}
    names = [name for name in SECTIONS if any(name in s for s in seconds)]
    means = {name: float(np.mean([s.get(name, 0.0) for s in seconds])) for name in names}
    return {**means, "other": max(0.0, total - sum(means.values()))}


def _setting(name: str, value: Any) -> str:
    if value is None:
        shown = "all" if name == "groups_per_batch" else "by default"
    elif isinstance(value, list | tuple):
        shown = "x".join(map(str, value))
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {shown}"
