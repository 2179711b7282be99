"""The affinity matrix as pixels, for trackers that show images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["heat_map"]

# Of the report: lowers the losses, nothing, raises them; not measured; frames.
_SERVES, _ZERO, _HARMS = (67, 147, 195), (236, 236, 236), (214, 96, 77)
_BLANK, _INK = (255, 255, 255), (36, 41, 47)
_SIDE = 600  # pixels, about: cells are a whole number of pixels, at least one


def heat_map(matrix: NDArray[Any], order: Sequence[int], sizes: Sequence[int]) -> NDArray[np.uint8]:
    """Draw the affinity as the report does, with the groups next to each other and framed.

    These are the values by which tasks are grouped: the mean of what the steps on two tasks do to
    each other's loss, each relative to the self-affinity of the task of its column. Blue lowers the
    losses, red raises them, grey is 0, and white is the diagonal and what was not measured. The
    deepest colour is the 98th percentile of the absolute values, so that a few extreme pairs do not
    make the others pale.

    Args:
        matrix: affinities ``[K, K]``, NaN where nothing was measured.
        order: the tasks to draw, group after group, as positions in the matrix.
        sizes: the number of tasks in each group; their sum is ``len(order)``.

    Returns:
        A square image ``[H, W, 3]`` in red, green and blue. Each pair is a square of the same
        number of pixels; 11 tasks give 605 pixels on a side, and 1000 tasks give 1000.

    Example:
        >>> affinity = np.array([[2.0, 1.0], [0.0, 2.0]])
        >>> pixels = heat_map(affinity, order=[0, 1], sizes=[1, 1])
        >>> pixels.shape, pixels[150, 450]  # the pair of both tasks
        ((600, 600, 3), array([ 67, 147, 195], dtype=uint8))
    """
    n_tasks = len(order)
    matrix = np.asarray(matrix, np.float64)[np.ix_(order, order)]
    own = matrix.diagonal()
    alive = np.isfinite(own) & (own > 0)
    known = np.isfinite(matrix) & alive & alive[:, None] & ~np.eye(n_tasks, dtype=bool)
    effects = np.divide(matrix, own, out=np.zeros_like(matrix), where=known)
    values = np.where(known | known.T, (effects + effects.T) / 2, np.nan)
    strength = np.abs(values)
    measured = strength[np.isfinite(strength)]
    scale = float(np.quantile(measured, 0.98, method="higher")) if len(measured) else 0.0

    share = np.clip(strength / (scale or 1.0), 0, 1)[..., None]
    ends = np.where(values[..., None] > 0, _SERVES, _HARMS)
    colours = np.where(np.isnan(share), _BLANK, _ZERO + share * np.subtract(ends, _ZERO))
    cell = max(1, round(_SIDE / max(1, n_tasks)))
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
