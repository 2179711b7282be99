"""What a run has recorded so far: read from its folder, shown by figures and reports."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import taskgroup as tg
from taskgroup.lab.train.evaluation import Summary, load_summary

__all__ = ["Finished", "Recorded", "RunData", "load_run_data", "load_runs"]


class Recorded(NamedTuple):
    """Values that a run records on some of its batches.

    Attributes:
        batches: ``[N]``, the number of each of these batches.
        values: ``[N, ...]``.
    """

    batches: NDArray[np.int64]
    values: NDArray[np.float32]


class Finished(NamedTuple):
    """What only a finished run has.

    Attributes:
        metrics: ``{task: value}`` on held-out data.
        metric_names: ``{task: name}`` of these, with an arrow to the better direction.
        delta_m: in percent, against the baseline of the run; None without a baseline.
        peak_bytes: the most GPU memory that torch's allocator held; None on the CPU.
    """

    metrics: Mapping[str, float]
    metric_names: Mapping[str, str]
    delta_m: float | None
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
    """What a run has recorded so far; :func:`load_run_data` reads it.

    Attributes:
        name: the folder of the run.
        settings: of its recipe, or of its :class:`taskgroup.Recorder`.
        tasks: the K tasks in the order of the matrices.
        titles: ``{task: name as shown}``; a task without one is shown by its name.
        warmup: batches of warm-up; during the warm-up at least as many as there are so far.
        batches: ``[B]``, the number of each batch.
        groups: ``[B, K]``, the group of each task after the batch, counted from 0.
        losses: ``[B, K]`` before the first step of the batch; NaN for a task without a loss.
        seconds: per batch, ``{section: seconds}`` with the whole batch as ``"everything"``; None
            until it is recorded.
        affinity: ``[N, K, K]`` after the batch, row i the effect of stepping task i; NaN for an
            entry that was never observed until then.
        conflicts: ``[N, K, K]`` before the batch, cosines of the tasks' gradients on the shared
            parameters.
        evaluations: ``[N, K]`` after the batch, metrics on held-out data, with those at the end if
            there were some before; NaN for a task whose metric takes too long to be evaluated
            during training.
        finished: None for a run that is still training.
    """

    name: str
    settings: Mapping[str, Any]
    tasks: tuple[str, ...]
    titles: Mapping[str, str]
    warmup: int
    batches: NDArray[np.int64]
    groups: NDArray[np.int16]
    losses: NDArray[np.float32]
    seconds: Mapping[str, float] | None
    affinity: Recorded
    conflicts: Recorded
    evaluations: Recorded
    finished: Finished | None

    @property
    def method(self) -> str:
        """``"selective"``, ``"joint"``, or the name of another method."""
        return str(self.settings["method"])


def load_runs(runs: Iterable[str | Path]) -> tuple[list[RunData], list[str]]:
    """Read several runs; also returns a sentence on each that cannot be read and is left out.

    Raises:
        ValueError: if none can be read.
    """
    found, reasons = [], []
    for run in runs:
        try:
            found.append(load_run_data(run))
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise ValueError(" ".join(reasons) or "There are no runs; name the folder of one at least.")
    return found, [f"Left out: {reason}" for reason in reasons]


def load_run_data(run: str | Path) -> RunData:
    """Read a run, finished or still training.

    An incomplete last line of a file is ignored.

    Args:
        run: its folder.

    Raises:
        ValueError: if the folder is not a run, or another line of its files cannot be read.
    """
    try:
        return _load(Path(run))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run} cannot be read ({type(error).__name__}: {error}); another version of taskgroup "
            "may have written it. Leave it out."
        ) from error


def _load(run: Path) -> RunData:
    header = tg.recording.read_header(run)
    tasks = tuple(header["tasks"])
    batches, groups, losses, warmup = [], [], [], 0
    labels = np.empty(0, np.int16)
    for line in tg.recording.read_lines(run / "metrics.jsonl"):
        batches.append(line["batch"])
        if "partition" in line:  # it has changed
            group_of = {task: n for n, group in enumerate(line["partition"]) for task in group}
            labels = np.array([group_of[task] for task in tasks], np.int16)
        groups.append(labels)
        losses.append(_in_order(line["losses"], tasks))
        warmup = line["batch"] if line.get("warmup") else warmup
    if batches and warmup == batches[-1]:  # it may last longer
        warmup = max(warmup, header["settings"].get("warmup") or 0)
    summary = load_summary(run) if (run / "summary.json").is_file() else None
    square = (len(tasks), len(tasks))
    return RunData(
        name=str(run),
        settings=_as_on_the_command_line(header["settings"]),
        tasks=tasks,
        titles=header.get("titles", {}),
        warmup=warmup,
        batches=np.array(batches, np.int64),
        groups=np.array(groups, np.int16).reshape(len(batches), len(tasks)),
        losses=_float32(losses, (len(tasks),)),
        seconds=_seconds(run, summary),
        affinity=_recorded(run / "affinity.jsonl", square, lambda line: line["matrix"]),
        conflicts=_recorded(run / "conflicts.jsonl", square, lambda line: line["matrix"]),
        evaluations=_evaluations(run, tasks, summary),
        finished=_ended(run, header, summary),
    )


def _as_on_the_command_line(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the names that ``taskgroup train`` gives to methods and groupings.

    A recorder writes the names of their classes.
    """
    found = dict(settings)
    names = {method.__name__: name for name, method in tg.methods.METHODS.items()}
    found["method"] = names.get(found["method"], found["method"])
    if found.get("group_weights") is not None:
        found["group_weights"] = names.get(found["group_weights"], found["group_weights"])
    if isinstance(found.get("grouping"), str):
        found["grouping"] = re.sub("(?<=[a-z])(?=[A-Z])", "-", found["grouping"]).lower()
    return found


def _seconds(run: Path, summary: Summary | None) -> dict[str, float] | None:
    """Mean seconds per batch by section, over all batches so far; None before any are recorded."""
    if summary is not None:
        batches, seconds = summary["batches"], summary.get("seconds", {})
        everything = {"everything": summary["seconds_per_batch"]}
        return {name: s / batches for name, s in seconds.items()} | everything
    for last in deque(tg.recording.read_lines(run / "seconds.jsonl"), maxlen=1):
        return {name: s / last["batch"] for name, s in last["seconds"].items()}
    return None


def _recorded(
    path: Path, shape: tuple[int, ...], value: Callable[[tg.recording.Line], Sequence[Any]]
) -> Recorded:
    """What a file holds, if there is one and the tasks are known.

    Lines on the same batch are one: an evaluation may be recorded a few tasks at a time.
    """
    lines: dict[int, tg.recording.Line] = {}
    for line in tg.recording.read_lines(path) if shape[0] else ():
        same = lines.get(line["batch"], {})
        metrics = {"metrics": same["metrics"] | line["metrics"]} if "metrics" in same else {}
        lines[line["batch"]] = line | metrics
    batches = np.array(list(lines), np.int64)
    return Recorded(batches, _float32([value(line) for line in lines.values()], shape))


def _evaluations(run: Path, tasks: Sequence[str], summary: Summary | None) -> Recorded:
    """The evaluations during training, and the one at the end if there were some before."""
    found = _recorded(
        run / "evaluations.jsonl", (len(tasks),), lambda line: _in_order(line["metrics"], tasks)
    )
    if summary is None or not len(found.batches) or summary["batches"] <= found.batches[-1]:
        return found
    last = _float32([_in_order(summary["metrics"], tasks)], (len(tasks),))
    batches = np.append(found.batches, summary["batches"])
    return Recorded(batches, np.concatenate([found.values, last]))


def _in_order(values: Mapping[str, float], tasks: Iterable[str]) -> list[float]:
    return [values.get(task, np.nan) for task in tasks]


def _float32(values: Sequence[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # numbers that are too large become infinite
        return np.array(values, np.float32).reshape(len(values), *shape)


def _ended(run: Path, header: tg.recording.Header, summary: Summary | None) -> Finished | None:
    """What is known at the end of a run: its summary, or its last evaluation."""
    if summary is not None:
        lower, names = summary.get("lower_is_better", {}), summary.get("metric", {})
        return Finished(
            metrics=summary["metrics"],
            metric_names={
                task: f"{name} {'↓' if lower[task] else '↑'}" for task, name in names.items()
            },
            delta_m=summary["delta_m"],
            peak_bytes=summary.get("peak_bytes"),
        )
    # A run of a recipe ends with its summary.
    if not header["ended"] or (run / "config.yaml").is_file():
        return None
    metrics: dict[str, float] = {}
    better: dict[str, str] = {}
    for line in tg.recording.read_lines(run / "evaluations.jsonl"):
        metrics |= {task: v for task, v in line["metrics"].items() if v is not None}
        better |= line.get("better", {})
    arrows = {"lower": "↓", "higher": "↑"}
    names = {task: arrows.get(better.get(task, ""), "") for task in metrics}
    return Finished(metrics, names, delta_m=None, peak_bytes=None)
