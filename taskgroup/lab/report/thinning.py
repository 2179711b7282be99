"""Many batches in as many points as a figure can show."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Thinned", "evenly", "thin"]

Floats = NDArray[np.float64]


class Thinned(NamedTuple):
    """Values over time, one point for several consecutive batches, at most ``width`` of them.

    ``batches`` [P] is the mean of the batch numbers of each point. ``mean``, ``low`` (the minimum)
    and ``high`` (the maximum) [P, ...] are over the values that are not NaN; NaN if all are.
    """

    batches: Floats
    mean: Floats
    low: Floats
    high: Floats
    width: int

    def of(self, k: int) -> Thinned:
        """The values in column k."""
        mean, low, high = (values[:, k] for values in (self.mean, self.low, self.high))
        return Thinned(self.batches, mean, low, high, self.width)


def thin(
    batches: NDArray[np.int64], values: NDArray[Any], border: int = 0, points: int = 60
) -> Thinned:
    """Values [B, ...] over time in at most ``points + 1`` points, none of which spans the border.

    The batches [B] increase. The border is a batch, such as the last one of the warm-up. Missing
    values are NaN.

    Example:
        >>> thin(np.arange(1, 5), np.array([3.0, 1.0, 5.0, np.nan]), points=2).mean
        array([2., 5.])
    """
    width = max(1, -(-len(batches) // points))
    if not len(batches):
        none = np.empty(values.shape)
        return Thinned(np.empty(0), none, none, none, width)
    learned = int(np.searchsorted(batches, border, "right"))
    starts = np.r_[np.arange(0, learned, width), np.arange(learned, len(batches), width)]
    sizes = np.diff(np.r_[starts, len(batches)])
    values = np.asarray(values, np.float64)
    known = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        return Thinned(
            batches=np.add.reduceat(batches.astype(np.float64), starts) / sizes,
            mean=np.add.reduceat(np.nan_to_num(values), starts) / known,
            low=np.fmin.reduceat(values, starts),
            high=np.fmax.reduceat(values, starts),
            width=width,
        )


def evenly(length: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` evenly spaced positions in a sequence, the first and the last included.

    Example:
        >>> evenly(9, 5)
        array([0, 2, 4, 6, 8])
    """
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(np.int64))
