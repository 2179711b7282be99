"""What a run has left so far, read for the figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskgroup.experiment.evaluation import load_summary, read_settings
from taskgroup.experiment.recipe import Recipe
from taskgroup.report.history import RunData

__all__ = ["load_run_data"]


def load_run_data(run: str | Path) -> RunData:
    """Read a run, finished or still training, for :func:`taskgroup.report.figures.figures`.

    Args:
        run: its folder.

    Raises:
        ValueError: if it is no run, or a line of its files cannot be read; but the last one may be
            cut short, and is left out then.
    """
    run = Path(run)
    recipe = read_settings(run)
    lines = _lines(run / "metrics.jsonl")
    first = next(lines, None)
    tasks = _task_order(run, first)
    batches, steps, groups = [], [], []
    partition, labels = None, np.empty(0, np.int16)
    for line in chain([] if first is None else [first], lines):
        batches.append(line["batch"])
        steps.append(len(line["groups"]))
        if line["partition"] != partition:
            partition = line["partition"]
            group_of = {task: n for n, group in enumerate(partition) for task in group}
            labels = np.array([group_of[task] for task in tasks], np.int16)
        groups.append(labels)
    recorded = list(_affinities(run, len(tasks)))
    return RunData(
        name=str(run),
        settings=dataclasses.asdict(recipe),
        tasks=tasks,
        warmup=_warmup(recipe, len(tasks), batches, steps),
        batches=np.array(batches, np.int64),
        groups=np.array(groups, np.int16).reshape(len(batches), len(tasks)),
        seconds=_seconds(run),
        affinity_batches=np.array([batch for batch, _ in recorded], np.int64),
        affinities=np.array([matrix for _, matrix in recorded], np.float32).reshape(
            len(recorded), len(tasks), len(tasks)
        ),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, but for one cut short at the end; none without the file."""
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
    recorded = next(_lines(run / "affinity.jsonl"), None)
    if recorded is not None:
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
    return max(recipe.warmup, batches[-1])


def _seconds(run: Path) -> dict[str, float] | None:
    """Seconds of a batch by section; None of a run that is not finished."""
    if not (run / "summary.json").is_file():
        return None
    summary = load_summary(run)
    sections = {name: s / summary["batches"] for name, s in summary.get("seconds", {}).items()}
    return sections | {"everything": summary["seconds_per_batch"]}


def _affinities(run: Path, n_tasks: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    if n_tasks:
        for line in _lines(run / "affinity.jsonl"):
            yield line["batch"], np.array(line["matrix"], np.float32)
