"""Means, intervals, and how large a difference must be to be one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Estimate", "estimate", "noise_floor"]

_LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: the mean; NaN of no values.
        half: half the width of its 95% interval; NaN of fewer than two values.
        n: number of values.
    """

    mean: float
    half: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    r"""Mean and 95% interval, from Student's t: :math:`\bar x \pm t_{n-1} s / \sqrt n`.

    Example:
        >>> mean, half, n = estimate([1.0, 2.0, 3.0])
        >>> mean, round(half, 4), n
        (2.0, 2.4841, 3)
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, math.nan, 1)
    spread = float(np.std(values, ddof=1))
    return Estimate(mean, _quantile(n - 1) * spread / math.sqrt(n), n)


def noise_floor(values: Sequence[float]) -> float:
    r"""How far the means of two sets of n runs of one method lie apart by chance.

    Half the 95% interval of their difference, :math:`t_{n-1}\, s \sqrt{2/n}`, with the standard
    deviation s over the seeds of one set. NaN of fewer than two values.

    Example:
        >>> round(noise_floor([1.0, 2.0, 3.0]), 4)
        3.5131
    """
    n = len(values)
    if n < 2:
        return math.nan
    return _quantile(n - 1) * float(np.std(values, ddof=1)) * math.sqrt(2 / n)


def _quantile(freedom: int) -> float:
    return float(stats.t.ppf((1 + _LEVEL) / 2, freedom))
