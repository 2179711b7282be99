"""The average relative gain of a multi-task model over a baseline."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = ["delta_m"]


def delta_m(
    results: Mapping[str, float],
    baseline: Mapping[str, float],
    lower_is_better: Collection[str] | Mapping[str, bool],
) -> float:
    r"""Compute the average relative gain over the tasks, in percent; positive is better.

    .. math::
        \Delta_m = \frac{100}{K} \sum_k (-1)^{l_k} \frac{M_k - M_{b,k}}{M_{b,k}}

    with :math:`l_k = 1` if a lower value is better and 0 otherwise (Maninis et al., CVPR 2019).

    The gain is relative to the baseline, so it needs metrics that are positive and have a
    meaningful zero, such as an error, an accuracy or a mIoU. If the metric can be negative, as a
    log-likelihood, :math:`R^2` or a correlation, the formula would reverse the sign of the gain,
    and adding a constant to the metric would change its size.

    Args:
        results: the metric :math:`M_k` of each task, a number or a tensor that holds one number.
        baseline: the metric :math:`M_{b,k}` of each task, positive; usually of single-task models.
        lower_is_better: the tasks whose metric is an error, or ``{task: bool}`` for all tasks.

    Returns:
        The gain in percent, averaged over the tasks; NaN if a metric is NaN.

    Raises:
        ValueError: if the tasks differ, if there are none, or if a baseline is zero, negative or
            infinite; the message names the task.
        TypeError: if a metric is not a number, or an argument is not of a type given above.

    Example:
        >>> round(delta_m({"depth": 0.9, "segment": 55.0}, {"depth": 1.0, "segment": 50.0},
        ...               lower_is_better={"depth"}), 6)
        10.0
    """
    for name, metrics in (("results", results), ("baseline", baseline)):
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"{name} must be {{task: metric}}, got {type(metrics).__name__}; name the task of "
                "each metric."
            )
    if not results:
        raise ValueError("delta_m needs at least one task; results is empty.")
    differing = sorted(set(results) ^ set(baseline))
    if isinstance(lower_is_better, Mapping):
        differing += sorted(set(results) ^ set(lower_is_better))
        lower = {task for task, is_lower in lower_is_better.items() if is_lower}
    elif isinstance(lower_is_better, str):
        raise TypeError(
            f"lower_is_better takes a collection of tasks, got the string {lower_is_better!r}; "
            f"write {{{lower_is_better!r}}}."
        )
    elif not isinstance(lower_is_better, Iterable):
        raise TypeError(
            "lower_is_better takes the tasks whose metric is better if lower, such as {'depth'}, "
            f"got {lower_is_better!r}."
        )
    else:
        lower = set(lower_is_better)
        differing += sorted(lower - set(results))
    if differing:
        raise ValueError(
            "results, baseline and lower_is_better must name the same tasks; these are not in all "
            f"of them: {', '.join(map(repr, differing))}."
        )
    total = 0.0
    for task in results:
        value = _number(results[task], f"The metric of task {task!r}")
        against = _number(baseline[task], f"The baseline of task {task!r}")
        if against == 0:
            raise ValueError(
                f"The baseline of task {task!r} is zero, so a relative gain is undefined; "
                "leave the task out or use another metric."
            )
        if against < 0 or math.isinf(against):
            raise ValueError(
                f"The baseline of task {task!r} is {against:g}, so a relative gain has no meaning; "
                "leave the task out or use a metric that is finite and above zero, such as an "
                "error."
            )
        gain = (value - against) / against
        total += -gain if task in lower else gain
    return 100.0 * total / len(results)


def _number(value: Any, what: str) -> float:
    """Convert a number of Python, NumPy or torch to a float."""
    got = type(value).__name__
    try:
        if callable(item := getattr(value, "item", None)):
            value = item()
        if not isinstance(value, str | bytes | bytearray):  # float() would parse them
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # it holds several numbers, for example
        pass
    raise TypeError(f"{what} must be one number, got {value!r} of type {got}.")
