"""How long a batch takes, by method."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from taskgroup.lab.report.colours import SECTIONS
from taskgroup.lab.report.labels import (
    differing,
    left_out,
    settings_in_words,
    tasks_of,
    titles,
    values,
)
from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.words import listed

__all__ = ["Bar", "scale_of", "seconds_per_batch", "three_digits"]

_JOINT = ("joint", "gd")  # ratios refer to the first of these that was run
# Settings that change how long a batch takes: for every method, and for selective updates alone.
_WORK = (
    *("data", "subset", "size", "batch_size", "backbone", "patch", "dim", "depth"),
    *("attention_heads", "decoder", "device", "precision"),
)
_WAYS = (
    *("grouping", "affinity", "credit", "outside", "shared_state"),
    *("groups_per_batch", "observe_every", "regroup_every"),
    *("warmup", "preference", "batches"),
)


class Bar(NamedTuple):
    """The time per batch, averaged over runs that differ only in the seed.

    Attributes:
        label: the method, and the settings that distinguish it from other bars.
        sections: ``{section: seconds}``, the mean over the runs.
        totals: seconds of each run; their mean is the sum of the sections.
        ratio: to joint training with the same work; None if there is no such run.
    """

    label: str
    sections: dict[str, float]
    totals: list[float]
    ratio: float | None

    @property
    def seconds(self) -> float:
        """The mean over the runs."""
        return sum(self.sections.values())


def scale_of(seconds: float) -> tuple[float, str]:
    """The factor and the unit in which times up to ``seconds`` are shown."""
    return (1e3, "ms") if seconds < 0.5 else (1.0, "s")


def three_digits(value: float) -> str:
    """A positive value with three digits, zeros included.

    Example:
        >>> three_digits(3.0), three_digits(120.4)
        ('3.00', '120')
    """
    return f"{value:#.3g}".rstrip(".")


def seconds_per_batch(runs: Sequence[RunData]) -> tuple[list[Bar], list[str]]:
    """The time per batch of each method, in the order of the runs, and what was left out and why.

    Runs share a bar if they have the same method, tasks, network, batches and machine settings and,
    for selective updates, the same way of grouping. Time that belongs to no section is ``"other"``;
    the whole time of runs without sections is ``"not divided"``.
    """
    timed = [run for run in runs if run.seconds]
    if not timed:
        return [], ["The time per batch is not drawn: no run has recorded it yet."]
    notes = left_out("time per batch", runs, timed, "no time is recorded yet")
    selective = [run for run in timed if run.method == "selective"]
    work, ways = differing(timed, _WORK), differing(selective, _WAYS)
    tasks_differ = len(set(map(tasks_of, timed))) > 1
    alike: dict[tuple[Hashable, str, Hashable], list[RunData]] = {}
    for run in timed:
        ways_of_run = values(run, _WAYS) if run.method == "selective" else ()
        key = ((tasks_of(run), values(run, _WORK)), run.method, ways_of_run)
        alike.setdefault(key, []).append(run)
    sections = {key: _mean_sections(group) for key, group in alike.items()}
    bars = []
    for (done, method, how), group in alike.items():
        run = group[0]
        label = [method, *settings_in_words(run, work, timed)]
        if method == "selective":
            label += settings_in_words(run, ways, selective)
        if tasks_differ:
            few = len(run.tasks) <= 3
            label.append(" + ".join(titles(run).values()) if few else f"{len(run.tasks)} tasks")
        mean = sections[done, method, how]
        joint = [sections[done, name, ()] for name in _JOINT if (done, name, ()) in sections]
        ratio = sum(mean.values()) / sum(joint[0].values()) if joint else None
        totals = [run.seconds["everything"] for run in group if run.seconds]
        bars.append(Bar(", ".join(label), mean, totals, ratio))
    alone = [bar.label for bar in bars if bar.ratio is None]
    if alone and len(bars) > 1:
        notes.append(
            f"The time of {listed(alone)} is not compared with joint training: there is no joint "
            "run of the same tasks, network and batches."
        )
    return bars, notes


def _mean_sections(runs: Sequence[RunData]) -> dict[str, float]:
    """``{section: seconds}``, which add up to the mean time per batch."""
    seconds = [run.seconds for run in runs if run.seconds]
    total = float(np.mean([s["everything"] for s in seconds]))
    if any(len(s) == 1 for s in seconds):
        return {"not divided": total}
    named = [name for name in SECTIONS if name != "other" and any(name in s for s in seconds)]
    means = {name: float(np.mean([s.get(name, 0.0) for s in seconds])) for name in named}
    return {**means, "other": max(0.0, total - sum(means.values()))}
