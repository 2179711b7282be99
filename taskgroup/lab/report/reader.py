"""What a run has left so far, read for figures and reports."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.train.evaluation import load_summary, read_settings
from taskgroup.lab.train.recipe import Recipe

__all__ = ["load_run_data", "load_runs", "read_lines"]


def load_run_data(run: str | Path) -> RunData:
    """Read a run, finished or still training.

    Args:
        run: its folder.

    Raises:
        ValueError: if it is no run, or a line of its files cannot be read; but the last one may be
            cut short, and is left out then.
    """
    try:
        return _load(Path(run))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run} cannot be read, it may be of another version of taskgroup ("
            f"{type(error).__name__}: {error}); leave it out."
        ) from error


def load_runs(runs: Iterable[str | Path]) -> tuple[list[RunData], list[str]]:
    """Read several runs; of those that cannot be read, say why.

    Returns:
        The runs, and a sentence on each that is left out.

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


def _load(run: Path) -> RunData:
    recipe = read_settings(run)
    lines = read_lines(run / "metrics.jsonl")
    first = next(lines, None)
    tasks = _task_order(run, first)
    batches, steps, groups, losses = [], [], [], []
    partition, labels = None, np.empty(0, np.int16)
    for line in chain([] if first is None else [first], lines):
        batches.append(line["batch"])
        steps.append(len(line["groups"]))
        if line["partition"] != partition:
            partition = line["partition"]
            group_of = {task: n for n, group in enumerate(partition) for task in group}
            labels = np.array([group_of[task] for task in tasks], np.int16)
        groups.append(labels)
        losses.append([line["losses"].get(task, np.nan) for task in tasks])
    summary = load_summary(run) if (run / "summary.json").is_file() else None
    affinity_batches, affinities = _matrices(run / "affinity.jsonl", len(tasks))
    conflict_batches, conflicts = _matrices(run / "conflicts.jsonl", len(tasks))
    evaluation_batches, evaluations = _evaluations(run / "evaluations.jsonl", tasks)
    return RunData(
        name=str(run),
        settings=recipe.model_dump(),
        tasks=tasks,
        warmup=_warmup(recipe, len(tasks), batches, steps),
        batches=np.array(batches, np.int64),
        groups=np.array(groups, np.int16).reshape(len(batches), len(tasks)),
        losses=_float32(losses).reshape(len(batches), len(tasks)),
        seconds=_seconds(run, summary),
        affinity_batches=affinity_batches,
        affinities=affinities,
        conflict_batches=conflict_batches,
        conflicts=conflicts,
        evaluation_batches=evaluation_batches,
        evaluations=evaluations,
        metrics=None if summary is None else summary["metrics"],
        metric_names=_metric_names(summary or {}),
        delta_m=None if summary is None else summary["delta_m"],
        peak_bytes=None if summary is None else summary.get("peak_bytes"),
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, but for one cut short at the end; none without the file.

    Raises:
        ValueError: if another line cannot be read.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{path} cannot be read at line {number}; leave the run out, or --resume it, "
                    "which drops the line."
                ) from None


def _task_order(run: Path, first: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The tasks in the order of the matrices; none before the first batch."""
    for name in ("affinity.jsonl", "conflicts.jsonl"):
        if (recorded := next(read_lines(run / name), None)) is not None:
            return tuple(recorded["tasks"])
    return tuple(task for group in first["partition"] for task in group) if first else ()


def _warmup(recipe: Recipe, n_tasks: int, batches: Sequence[int], steps: Sequence[int]) -> int:
    """The warm-up in batches: of its rounds, each of which deals every task out once."""
    learns = n_tasks > 1 and recipe.method == "selective"
    if not (learns and recipe.make_grouping().reads_affinity and recipe.warmup):
        return 0
    if recipe.groups_per_batch is None:
        return recipe.warmup
    rounds, undealt = 0, n_tasks
    for batch, dealt in zip(batches, steps, strict=True):
        undealt -= min(dealt, undealt)
        if not undealt:
            rounds, undealt = rounds + 1, n_tasks
        if rounds == recipe.warmup:
            return batch
    return max([recipe.warmup, *batches[-1:]])


def _seconds(run: Path, summary: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Seconds of a batch by section, of all batches so far; None before any are recorded."""
    if summary is not None:
        batches, seconds = summary["batches"], summary.get("seconds", {})
        everything = {"everything": summary["seconds_per_batch"]}
        return {name: s / batches for name, s in seconds.items()} | everything
    for last in deque(read_lines(run / "seconds.jsonl"), maxlen=1):
        return {name: s / last["batch"] for name, s in last["seconds"].items()}
    return None


def _matrices(path: Path, n_tasks: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The batches ``[N]`` and matrices ``[N, K, K]`` of a file, if there is one."""
    lines = list(read_lines(path)) if n_tasks else []
    batches = np.array([line["batch"] for line in lines], np.int64)
    matrices = _float32([line["matrix"] for line in lines])
    return batches, matrices.reshape(len(lines), n_tasks, n_tasks)


def _evaluations(path: Path, tasks: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The batches ``[E]`` and metrics ``[E, K]`` of a file, if there is one."""
    lines = list(read_lines(path))
    batches = np.array([line["batch"] for line in lines], np.int64)
    metrics = _float32([[line["metrics"].get(task, np.nan) for task in tasks] for line in lines])
    return batches, metrics.reshape(len(lines), len(tasks))


def _float32(values: Sequence[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too large is infinite
        return np.array(values, np.float32)


def _metric_names(summary: Mapping[str, Any]) -> dict[str, str]:
    lower = summary.get("lower_is_better", {})
    names = summary.get("metric", {})
    return {task: f"{name} {'↓' if lower[task] else '↑'}" for task, name in names.items()}
