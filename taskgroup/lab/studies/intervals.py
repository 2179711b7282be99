"""Means and correlations with their 95% intervals, and the noise floor of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["Correlation", "Estimate", "Floats", "estimate", "noise_floor", "spearman"]

Floats = NDArray[np.float64]

_LEVEL = 0.95
_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A mean over n seeds, and half the width of its 95% interval; NaN where there are too few."""

    mean: float
    half: float
    n: int

    def shown(self) -> str:
        """The mean and its interval in words, such as ``"+1.9 ± 0.6"``, with spaces that hold.

        Example:
            >>> Estimate(1.94, 0.61, 5).shown().replace("\N{NO-BREAK SPACE}", " ")
            '+1.9 ± 0.6'
            >>> Estimate(-2.5e9, math.nan, 1).shown()
            '-2.5e+09'
        """
        if math.isnan(self.half):
            return _number(self.mean, "+")
        return f"{_number(self.mean, '+')} ± {_number(self.half)}".replace(
            " ", "\N{NO-BREAK SPACE}"
        )

    def verdict(self, floor: float) -> str:
        """Whether a difference is one: ``"better"``, ``"worse"`` or ``""``.

        It is if the interval excludes zero and the mean is larger than the noise floor.

        Example:
            >>> Estimate(1.9, 0.6, 5).verdict(floor=1.2), Estimate(1.9, 0.6, 5).verdict(floor=2.2)
            ('better', '')
        """
        if self.n < 2 or not (abs(self.mean) > self.half and abs(self.mean) > floor):
            return ""
        return "better" if self.mean > 0 else "worse"


def _number(value: float, sign: str = "") -> str:
    """With one decimal; a run that almost diverged has a number that needs an exponent."""
    return format(value, f"{sign}.1f" if abs(value) < 1e5 else f"{sign}.1e")


class Correlation(NamedTuple):
    """Spearman's rank correlation, and both ends of its 95% interval."""

    value: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    r"""Mean and 95% interval from Student's t: :math:`\bar x \pm t_{n-1} s / \sqrt n`.

    Example:
        >>> mean, half, n = estimate([1.0, 2.0, 3.0])
        >>> mean, round(half, 4), n
        (2.0, 2.4841, 3)
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    return Estimate(mean, _spread(values) / math.sqrt(max(1, n)), n)


def noise_floor(values: Sequence[float]) -> float:
    r"""How far apart the means of two sets of n runs of the same method are by chance.

    This is half the 95% interval of their difference, :math:`t_{n-1}\, s \sqrt{2/n}`, where s is
    the standard deviation over the seeds of one set. It is NaN for fewer than two values.

    Example:
        >>> round(noise_floor([1.0, 2.0, 3.0]), 4)
        3.5131
    """
    return _spread(values) * math.sqrt(2 / max(1, len(values)))


def _spread(values: Sequence[float]) -> float:
    """The standard deviation times the quantile of Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    quantile = stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1)
    return float(quantile * np.std(values, ddof=1))


def spearman(first: Floats, second: Floats) -> Correlation:
    """Rank correlation between the entries of two matrices [K, K] off their diagonals.

    Entries that are not finite are left out. The interval is a bootstrap over the tasks, because
    entries of one row or column are not independent. Every call gives the same interval.

    Example:
        >>> a = np.arange(16.0).reshape(4, 4)
        >>> spearman(a, 2 * a).value
        1.0
    """
    draws = np.random.default_rng(0)
    tasks = np.arange(len(first))
    resampled = [
        _rank_correlation(first, second, draws.integers(len(tasks), size=len(tasks)))
        for _ in range(_RESAMPLES)
    ]
    finite = [value for value in resampled if math.isfinite(value)]
    tails = [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]
    low, high = np.quantile(finite, tails) if finite else (math.nan, math.nan)
    return Correlation(_rank_correlation(first, second, tasks), float(low), float(high))


def _rank_correlation(first: Floats, second: Floats, tasks: NDArray[np.int64]) -> float:
    index = np.ix_(tasks, tasks)
    x, y = first[index], second[index]
    kept = (tasks[:, None] != tasks) & np.isfinite(x) & np.isfinite(y)
    x, y = stats.rankdata(x[kept]), stats.rankdata(y[kept])
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
