"""Which tasks shared a group, how many groups there were, and the colours of groups over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from taskgroup.lab.report.labels import left_out, of_common_tasks
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.report.thinning import Floats, Thinned, thin
from taskgroup.lab.words import listed

__all__ = [
    "average_share",
    "blocks",
    "group_colours",
    "group_counts",
    "learned",
    "order_by_share",
    "share",
    "task_order",
    "with_groups",
]

Groups = NDArray[np.int16]


def with_groups(runs: Sequence[RunData]) -> tuple[list[RunData], list[str]]:
    """The runs whose grouping is drawn, and why the others are not."""
    selective = [run for run in runs if run.method == "selective"]
    if not selective:
        return [], ["The grouping is not drawn: no run is selective."]
    grouped = [run for run in selective if len(learned(run))]
    if not grouped:
        return [], ["The grouping is not drawn: no run has finished its warm-up yet."]
    drawn = of_common_tasks(grouped)
    notes = [
        *left_out("grouping", runs, selective, "only selective runs have a grouping"),
        *left_out("grouping", selective, grouped, "no batch has followed the warm-up yet"),
        *left_out("grouping", grouped, drawn, "the tasks differ from those of most runs"),
    ]
    ways = {str(run.settings.get("grouping")): None for run in drawn}
    if len(ways) > 1:
        notes.append(f"The grouping figure averages over different groupings: {listed(ways)}.")
    return drawn, notes


def learned(run: RunData) -> Groups:
    """The groups after each batch that followed the warm-up, ``[N, K]``."""
    return run.groups[run.batches > run.warmup]


def share(groups: Groups) -> Floats:
    """The share of the batches in which two tasks were in the same group: [N, K] to [K, K].

    Example:
        >>> share(np.array([[0, 0, 1], [0, 1, 1]], np.int16))
        array([[1. , 0.5, 0. ],
               [0.5, 1. , 0.5],
               [0. , 0.5, 1. ]])
    """
    total = np.zeros((groups.shape[1], groups.shape[1]))
    for start in range(0, len(groups), 1000):  # 100 tasks: 10 MB at a time
        part = groups[start : start + 1000]
        for label in range(int(part.max()) + 1):
            members = (part == label).astype(np.float32)
            total += members.T @ members
    return total / len(groups)


def average_share(runs: Sequence[RunData]) -> Floats:
    """The mean of :func:`share` after the warm-up, in the task order of the first run."""
    tasks = runs[0].tasks
    orders = [[run.tasks.index(task) for task in tasks] for run in runs]
    shares = [share(learned(run)[:, order]) for run, order in zip(runs, orders, strict=True)]
    mean: Floats = np.mean(shares, 0)
    return mean


def order_by_share(share: Floats) -> list[int]:
    """Positions of the tasks such that tasks that often share a group are neighbours.

    These are the leaves of average linkage on ``1 - share`` in their optimal order.

    Example:
        >>> order_by_share(np.array([[1, 0, 0.9], [0, 1, 0.1], [0.9, 0.1, 1]]))
        [0, 2, 1]
    """
    if len(share) < 3:
        return list(range(len(share)))
    distance = squareform(1 - share, checks=False)
    order = [int(k) for k in leaves_list(linkage(distance, "average", optimal_ordering=True))]
    return order if order[0] < order[-1] else order[::-1]


def task_order(run: RunData, runs: Sequence[RunData]) -> list[int]:
    """Positions of a run's tasks as figures show them.

    The tasks of a group of the last batch are neighbours. Otherwise the order is that of
    :func:`order_by_share` over all runs on the same tasks, whatever order these have them in.
    """
    peers = [
        other
        for other in runs
        if other.method == "selective"
        and set(other.tasks) == set(run.tasks)
        and len(learned(other))
    ]
    order = list(range(len(run.tasks)))
    if peers:
        found = order_by_share(average_share(peers))
        order = [run.tasks.index(peers[0].tasks[k]) for k in found]
    labels = run.groups[-1]
    rank = {label: n for n, label in enumerate(dict.fromkeys(labels[order].tolist()))}
    return sorted(order, key=lambda k: rank[int(labels[k])])


def blocks(labels: Groups) -> list[tuple[int, int, int, int]]:
    """The blocks of a matrix in which the tasks of the row and of the column share a group.

    Rows from the first number up to the second, columns from the third up to the fourth. Groups
    whose tasks are no neighbours have several blocks.

    Example:
        >>> blocks(np.array([0, 0, 1]))
        [(0, 2, 0, 2), (2, 3, 2, 3)]
        >>> blocks(np.array([0, 1, 0]))
        [(0, 1, 0, 1), (0, 1, 2, 3), (1, 2, 1, 2), (2, 3, 0, 1), (2, 3, 2, 3)]
    """
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    parts = [(begin, end, int(labels[begin])) for begin, end in pairwise(edges)]
    return [(*a[:2], *b[:2]) for a in parts for b in parts if a[2] == b[2]]


def group_counts(run: RunData, points: int = 60) -> Thinned:
    """The number of groups over time, in about ``points`` points."""
    return thin(run.batches, run.groups.max(1) + 1, run.warmup, points)


def group_colours(groups: Groups) -> Groups:
    """A colour for every task at every time, such that a group keeps its colour while it changes.

    Groups are matched with colours so that as many tasks as possible keep their last colour
    (scipy's assignment). A group that matches no colour takes the one unused for the longest time.
    Groups and colours are [N, K], counted from 0; a task that is alone in its group gets -1.

    Example:
        >>> group_colours(np.array([[0, 0, 1, 1, 2], [1, 1, 0, 0, 1], [0, 1, 0, 1, 1]]))
        array([[ 0,  0,  1,  1, -1],
               [ 0,  0,  1,  1,  0],
               [ 1,  0,  1,  0,  0]], dtype=int16)
    """
    colours = np.full(groups.shape, -1, np.int16)
    last = np.full(groups.shape[1], -1)
    used: list[int] = []  # the last time when each colour was in use
    for n, labels in enumerate(groups):
        sizes = np.bincount(labels)
        common = np.zeros((len(sizes), 1 + len(used)), np.int64)
        np.add.at(common, (labels, 1 + last), 1)
        several = np.flatnonzero(sizes > 1)
        rows, found = linear_sum_assignment(common[several, 1:], maximize=True)
        colour_of = {
            int(group): int(colour)
            for group, colour in zip(several[rows], found, strict=True)
            if common[group, 1 + colour]
        }
        for group in several.tolist():
            if group not in colour_of:
                free = set(range(len(used))) - set(colour_of.values())
                oldest = min(free, key=used.__getitem__, default=len(used))
                if oldest == len(used) or used[oldest] >= n - 1:  # in use at the time just before
                    oldest = len(used)
                    used.append(n)
                colour_of[group] = oldest
            used[colour_of[group]] = n
            colours[n, labels == group] = last[labels == group] = colour_of[group]
    return colours
