"""Hands the metrics of a trainer's evaluation to a recorder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from taskgroup._arguments import listed

__all__ = ["TaskMetrics", "record"]

# For each task the name of its metric, and which values are better.
TaskMetrics: TypeAlias = Mapping[str, tuple[str, Literal["lower", "higher"]]]


def record(recorder: Any, metrics: TaskMetrics, found: Mapping[str, float | Tensor]) -> None:
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
