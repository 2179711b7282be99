"""Limits of an axis that a few far values do not stretch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["limits"]

_FAR = 10  # median deviations or halves from the median, from which on a value may be far
_STRETCH = 5  # times as long as for the near values alone may an axis be


def limits(values: Sequence[float], halves: Sequence[float] = ()) -> tuple[float, float]:
    """The limits of an axis for values with intervals, ``value ± half``; NaN is left out.

    All values are inside unless a few are so far away that the others could not be told apart. An
    interval that is much longer than most does not stretch the axis either.

    Example:
        >>> limits([1.0, 2.0, 3.0])
        (0.875, 3.125)
        >>> limits([1.0, 2.0, 3.0, -800.0])  # not drawn at its place, so said in words
        (0.875, 3.125)
        >>> limits([1.0, 2.0, 3.0], [0.125, 0.125, 100.0])
        (0.75, 3.125)
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return -1.0, 1.0
    middle = statistics.median(finite)
    known = [half for half in halves if math.isfinite(half)]
    # Values may be closer to each other than their intervals are wide, or equal.
    spread = max(
        statistics.median(abs(value - middle) for value in finite),
        statistics.median(known) if known else 0.0,
        0.01 * abs(middle),
        1e-3,
    )
    near = [value for value in finite if abs(value - middle) <= _FAR * spread]
    low, high = min(near), max(near)
    longest = _STRETCH * max(high - low, spread)
    for value in sorted(finite, key=lambda value: abs(value - middle)):
        if max(high, value) - min(low, value) <= longest:
            low, high = min(low, value), max(high, value)
    length = max(high - low, 2 * spread)
    ends = [
        end
        for value, half in zip(values, halves, strict=False)
        if low <= value <= high and math.isfinite(half)
        for end in (value - half, value + half)
    ]
    low, high = (
        min([low, *(end for end in ends if end > low - length)]),
        max([high, *(end for end in ends if end < high + length)]),
    )
    margin = length / 16
    return low - margin, high + margin
