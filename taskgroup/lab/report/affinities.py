"""Recorded affinities: in units of the self-affinity, and between two tasks over time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.report.labels import (
    INCIDENTAL,
    differing,
    left_out,
    of_common_tasks,
    settings_in_words,
    titles,
    values,
)
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.report.thinning import Floats

__all__ = [
    "Course",
    "Pair",
    "affinity_courses",
    "changed_most",
    "check_pair",
    "has_affinity",
    "largest",
    "normalised",
    "relative",
    "with_affinity",
]

Pair = tuple[str, str]


class Course(NamedTuple):
    """The affinity between two tasks over time, for runs that differ only in the seed.

    The label says the decay, and the settings that distinguish it from other courses. Each run has
    batches [N] and entries of the matrix [N, 2]: the effect of the first task on the second, and of
    the second on the first. ``mean`` [P, 2] is over the runs, for ``batches`` [P], which end where
    the shortest run ends.
    """

    label: str
    runs: list[tuple[NDArray[np.int64], Floats]]
    batches: NDArray[np.int64]
    mean: Floats


def relative(matrices: NDArray[Any]) -> NDArray[Any]:
    """Affinities [..., K, K] divided by the self-affinity of the task of their column.

    NaN where nothing was measured, and in columns without a positive self-affinity.

    Example:
        >>> relative(np.array([[2.0, 1.0], [-1.0, 0.0]]))
        array([[ 1. ,  nan],
               [-0.5,  nan]])
    """
    own = matrices.diagonal(axis1=-2, axis2=-1)[..., None, :]
    found = np.full_like(matrices, np.nan)
    with np.errstate(invalid="ignore"):
        np.divide(matrices, own, out=found, where=own > 0)
    return found


def normalised(matrices: NDArray[Any]) -> NDArray[Any]:
    """The matrices that tasks are grouped by, of affinities [..., K, K].

    An entry is the mean of the two entries of a pair in :func:`relative`. A direction that was
    never measured counts as 0. NaN on the diagonal, for pairs that were measured in neither
    direction, and for tasks without a positive self-affinity.

    Example:
        >>> normalised(np.array([[2.0, 1.0], [-1.0, 4.0]]))
        array([[   nan, -0.125],
               [-0.125,    nan]])
    """
    effects = relative(matrices)
    own = matrices.diagonal(axis1=-2, axis2=-1)
    own = np.isfinite(own) & (own > 0)
    known = np.isfinite(matrices) & own[..., :, None] & own[..., None, :]
    known &= ~np.eye(matrices.shape[-1], dtype=bool)
    effects = np.where(known, effects, 0)
    found = (effects + effects.swapaxes(-1, -2)) / 2
    return np.where(known | known.swapaxes(-1, -2), found, np.nan)


def largest(matrix: NDArray[Any]) -> float:
    """The end of the colour scale of a matrix [K, K], whose other end is its negative.

    The largest absolute value off the diagonal, without the top 2 %, so that one outlier does not
    make all other values pale; 1 if there is none.
    """
    values = np.abs(matrix[~np.eye(len(matrix), dtype=bool)])
    values = values[np.isfinite(values)]
    found = float(np.quantile(values, 0.98, method="higher")) if len(values) else 0.0
    return found or 1.0


def with_affinity(runs: Sequence[RunData], pair: Pair | None) -> tuple[list[RunData], list[str]]:
    """The runs whose affinity is drawn, and why the others are not."""
    recorded = [run for run in runs if has_affinity(run)]
    wanted = [run for run in recorded if pair is None or set(pair) <= set(run.tasks)]
    met = [run for run in wanted if pair is None or np.isfinite(_entries(run, pair)).any()]
    if not met:
        shown = titles(wanted[0]) if wanted else {}
        of = "" if pair is None else " between {} and {}".format(*(shown.get(k, k) for k in pair))
        why = "it was never measured" if wanted else "no run has recorded it"
        return [], [f"The affinity{of} is not drawn: {why}."]
    drawn = of_common_tasks(met)
    return drawn, [
        *left_out("affinity", runs, recorded, "no affinity is recorded"),
        *left_out("affinity", recorded, wanted, "one of the two tasks is not trained"),
        *left_out("affinity", wanted, met, "it was never measured between the two tasks"),
        *left_out("affinity", met, drawn, "the tasks differ from those of most runs"),
    ]


def has_affinity(run: RunData) -> bool:
    """Whether the run has recorded an affinity between tasks."""
    return len(run.tasks) > 1 and bool(np.nan_to_num(run.affinity.values).any())


def _entries(run: RunData, pair: Pair) -> Floats:
    """The affinity between two tasks, ``[N, 2]``: first on second, second on first."""
    i, k = (run.tasks.index(task) for task in pair)
    return run.affinity.values[:, [i, k], [k, i]].astype(np.float64)


def changed_most(runs: Iterable[RunData]) -> Pair:
    """The two tasks whose affinity changed the most, in task order.

    The change is the difference between the highest and the lowest recorded entry off the diagonal,
    of any run and in either direction. Of equal changes the first is taken. All runs must have
    affinities between the same tasks, at least two.
    """
    most, pair = -1.0, ("", "")
    for run in runs:
        entries = np.nan_to_num(run.affinity.values, nan=np.nan)  # makes infinite entries finite
        ranges = np.nan_to_num(np.fmax.reduce(entries) - np.fmin.reduce(entries))
        ranges = np.triu(np.maximum(ranges, ranges.T), 1)
        ranges[np.tril_indices(len(run.tasks))] = -1
        i, k = np.unravel_index(int(ranges.argmax()), ranges.shape)
        if ranges[i, k] > most:
            most, pair = float(ranges[i, k]), (run.tasks[i], run.tasks[k])
    return pair


def affinity_courses(runs: Sequence[RunData], pair: Pair) -> list[Course]:
    """The affinity between two tasks over time, by decay, with the mean over the seeds.

    Between the batches at which a run recorded it, the mean interpolates linearly.
    """
    names = sorted({name for run in runs for name in run.settings} - INCIDENTAL - {"decay"})
    differ = differing(runs, names)
    alike: dict[Hashable, list[RunData]] = {}
    for run in sorted(runs, key=lambda run: float(run.settings.get("decay") or 0)):
        alike.setdefault(values(run, ["decay", *names]), []).append(run)
    courses = []
    for group in alike.values():
        lines = [(run.affinity.batches, _entries(run, pair)) for run in group]
        begin, end = max(b[0] for b, _ in lines), min(b[-1] for b, _ in lines)
        batches = np.unique(np.concatenate([b for b, _ in lines]))
        batches = batches[(batches >= begin) & (batches <= end)]
        through = [
            np.stack([np.interp(batches, b, found[:, d]) for d in range(2)], 1)
            for b, found in lines
        ]
        words = settings_in_words(group[0], differ, runs)
        if (decay := group[0].settings.get("decay")) is not None:
            words.insert(0, f"decay {float(decay):g}")
        label = ", ".join(words) or "affinity"
        courses.append(Course(label, lines, batches, np.mean(through, 0)))
    return courses


def check_pair(runs: Iterable[RunData], pair: Pair) -> None:
    """Raise a ValueError if the runs lack one of two tasks, or both are the same."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if unknown := [task for task in pair if task not in tasks]:
        raise ValueError(
            f"The runs have no task {', '.join(map(repr, unknown))}; their tasks are "
            f"{', '.join(tasks) or 'not known before the first batch'}."
        )
    if pair[0] == pair[1]:
        raise ValueError(f"The affinity is drawn between two tasks, got {pair[0]!r} twice.")
