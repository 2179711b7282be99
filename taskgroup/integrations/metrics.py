"""The metrics of the tasks that a trainer hands to a recorder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from taskgroup._arguments import listed
from taskgroup.loop.schedule import TaskGroups
from taskgroup.recording.recorder import Recorder

__all__ = ["TaskMetrics", "check_parts", "record"]

# For each task the name of its metric, and which values are better.
TaskMetrics: TypeAlias = Mapping[str, tuple[str, Literal["lower", "higher"]]]


def check_parts(
    name: str, groups: object, recorder: object | None, metrics: TaskMetrics | None
) -> None:
    """Check what a trainer is given, for the class with this name.

    Raises:
        TypeError: if ``groups`` or ``recorder`` is something else.
        ValueError: if there are metrics and no recorder, or metrics of unknown tasks.
    """
    if not isinstance(groups, TaskGroups):
        raise TypeError(
            f"{name} takes tg.TaskGroups, got {type(groups).__name__}; pass "
            "tg.TaskGroups(tasks), those that the training uses."
        )
    if recorder is not None and not isinstance(recorder, Recorder):
        raise TypeError(
            f"recorder must be a tg.Recorder, got {type(recorder).__name__}; write "
            "tg.Recorder(groups, folder), and pass a tracker as its log=."
        )
    if metrics and recorder is None:
        raise ValueError("metrics are recorded: pass recorder=tg.Recorder(groups, folder) too.")
    if unknown := sorted(set(metrics or ()).difference(groups.tasks)):
        raise ValueError(
            f"metrics names the unknown tasks {listed(unknown)}; write {{task: (name, 'higher')}} "
            f"with the tasks {listed(groups.tasks)}."
        )


def record(recorder: Recorder, metrics: TaskMetrics, found: Mapping[str, float | Tensor]) -> None:
    """Record the metric of each task among all that the trainer has found.

    Raises:
        ValueError: if a metric is not among them.
    """
    if missing := [name for name, _ in metrics.values() if name not in found]:
        raise ValueError(
            f"The evaluation has no {listed(missing)}, which metrics= names; it has "
            f"{listed(found)}."
        )
    values = {task: float(found[name]) for task, (name, _) in metrics.items()}
    recorder.metrics(values, better={task: better for task, (_, better) in metrics.items()})
