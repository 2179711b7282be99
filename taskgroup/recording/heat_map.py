"""The affinity matrix as pixels, for trackers that show images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["heat_map"]

_SERVES, _HARMS = (67, 147, 195), (214, 96, 77)  # lowers the loss, raises it; white is 0
_BLANK, _INK = (228, 228, 228), (36, 41, 47)
_SIDE = 600  # pixels, about: cells are a whole number of pixels, at least one


def heat_map(matrix: NDArray[Any], order: Sequence[int], sizes: Sequence[int]) -> NDArray[np.uint8]:
    """Draw an affinity matrix with the tasks of a group next to each other and the groups framed.

    Each column is divided by the self-affinity of its task, so that the diagonal is 1. Row i,
    column k shows what a step on task i does to task k: blue lowers its loss, red raises it, and
    grey was not measured. The deepest colour is the 98th percentile of the absolute values off the
    diagonal, so that a few extreme pairs do not fade the others.

    Args:
        matrix: affinities ``[K, K]``, NaN where nothing was measured.
        order: the tasks to draw, group after group, as positions in the matrix.
        sizes: the number of tasks in each group; their sum is ``len(order)``.

    Returns:
        A square image ``[H, W, 3]`` in red, green and blue. Each pair is a square of the same
        number of pixels; 11 tasks give 605 pixels on a side, and 1000 tasks give 1000.

    Example:
        >>> affinity = np.array([[2.0, 1.0], [-1.0, 2.0]])
        >>> pixels = heat_map(affinity, order=[0, 1], sizes=[1, 1])
        >>> pixels.shape
        (600, 600, 3)
        >>> pixels[150, 450], pixels[450, 150]  # the effect of task 0 on task 1, and of 1 on 0
        (array([ 67, 147, 195], dtype=uint8), array([214,  96,  77], dtype=uint8))
    """
    own = matrix.diagonal().astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        values = matrix / np.where(own > 0, own, np.nan)
    values = values[np.ix_(order, order)]
    off_diagonal = np.abs(values[np.isfinite(values) & ~np.eye(len(values), dtype=bool)])
    scale = float(np.quantile(off_diagonal, 0.98)) if off_diagonal.any() else 1.0
    scale = scale or float(off_diagonal.max())  # nearly all pairs are 0

    strength = np.clip(np.abs(values) / scale, 0, 1)[..., None]
    ends = np.where(values[..., None] > 0, _SERVES, _HARMS)
    colours = np.where(np.isnan(strength), _BLANK, 255 + strength * (ends - 255.0))
    cell = max(1, round(_SIDE / max(1, len(values))))
    pixels = np.rint(colours).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)

    width = max(1, cell // 20)
    begin = 0
    for size in sizes:
        end = begin + size * cell
        if end - begin >= 4 * width:  # a smaller frame would hide all that is in it
            block = pixels[begin:end, begin:end]
            inside = block[width:-width, width:-width].copy()
            block[:] = _INK
            block[width:-width, width:-width] = inside
        begin = end
    return pixels
