"""How much a multi-task model gains over a baseline, in one number."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["delta_m"]


def delta_m(
    results: Mapping[str, float],
    baseline: Mapping[str, float],
    lower_is_better: Collection[str] | Mapping[str, bool],
) -> float:
    r"""The average relative gain over the tasks, in percent; positive is better.

    .. math::
        \Delta_m = \frac{100}{K} \sum_k (-1)^{l_k} \frac{M_k - M_{b,k}}{M_{b,k}}

    with :math:`l_k = 1` where a lower value is better (Maninis et al., CVPR 2019).

    Args:
        results: the metric :math:`M_k` of each task.
        baseline: the metric :math:`M_{b,k}` of each task, usually of single-task models.
        lower_is_better: the tasks whose metric is an error, or ``{task: bool}`` for all of them.

    Returns:
        Percent, averaged over the tasks; NaN where a metric is NaN.

    Raises:
        ValueError: if the tasks differ, if there are none, or if a baseline is zero.

    Example:
        >>> round(delta_m({"depth": 0.9, "segment": 55.0}, {"depth": 1.0, "segment": 50.0},
        ...               lower_is_better={"depth"}), 6)
        10.0
    """
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
    else:
        lower = set(lower_is_better)
        differing += sorted(lower - set(results))
    if differing:
        raise ValueError(
            "results, baseline and lower_is_better must speak of the same tasks; "
            f"these are not in all of them: {', '.join(map(repr, differing))}."
        )
    total = 0.0
    for task, value in results.items():
        if baseline[task] == 0:
            raise ValueError(
                f"The baseline of task {task!r} is zero, so a relative gain is undefined; "
                "leave the task out or use another metric."
            )
        gain = (value - baseline[task]) / baseline[task]
        total += -gain if task in lower else gain
    return 100.0 * total / len(results)
