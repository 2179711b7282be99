"""Match predicted boundary pixels one to one with labelled ones nearby."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

import taskgroup as tg
from taskgroup.lab.vision.thinning import thin

__all__ = ["count_boundaries", "match"]

Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]


def match(predicted: Bools, label: Bools, distance: float) -> int:
    """Count the predicted pixels that can be matched one to one to label pixels nearby.

    This is the size of a maximum matching between pixels of two maps [H, W], at a Euclidean
    distance of at most ``distance`` pixels. The benchmark uses the assignment of least cost, in
    which an unmatched pixel costs 100 ``distance``. Its count is the same, unless one more match
    would lengthen the other matches by more than 100 ``distance`` in total.

    Raises:
        ValueError: The maps are not of one shape [H, W], or the distance is negative.

    Example:
        >>> label = np.array([[1, 0, 0, 1, 0, 0, 0]], dtype=bool)
        >>> match(np.array([[0, 1, 0, 0, 0, 0, 1]], dtype=bool), label, 2)
        1
    """
    if predicted.ndim != 2 or predicted.shape != label.shape:
        raise ValueError(
            f"predicted and label: one shape [H, W] is needed, got {predicted.shape} and "
            f"{label.shape}"
        )
    if not distance >= 0:
        raise ValueError(f"distance: must be at least 0 pixels, got {distance}")
    return tg.ops.choose("cpu", cpp=_match_natively, reference=_match)(predicted, label, distance)


def count_boundaries(
    reached: NDArray[np.uint8], label: Bools, known: Bools, distance: float, n: int
) -> Counts:
    """Count the matched, predicted and labelled pixels of an image at each of n thresholds.

    At threshold k the pixels that reach more than k thresholds are thinned, the unknown ones among
    them are dropped, and the rest is matched with the label.

    Args:
        reached: [H, W]: the number of thresholds that a pixel reaches, 0 to n.
        label: [H, W].
        known: [H, W]; other pixels count as neither predicted nor labelled.
        distance: The largest distance of a match, in pixels, at least 0.
        n: The number of thresholds, 1 to 255.

    Returns:
        [3, n]: pixels matched, predicted and labelled.
    """
    count = tg.ops.choose("cpu", cpp=_count_natively, reference=_count)
    return count(reached, label & known, known, distance, n)


def _match_natively(predicted: Bools, label: Bools, distance: float) -> int:
    maps = map(np.ascontiguousarray, (predicted, label))
    return int(tg.ops.native.host.match_boundaries(*maps, distance))


def _count_natively(
    reached: NDArray[np.uint8], label: Bools, known: Bools, distance: float, n: int
) -> Counts:
    maps = map(np.ascontiguousarray, (reached, label, known))
    counts: Counts = tg.ops.native.host.count_boundaries(*maps, distance, n)
    return counts


def _match(predicted: Bools, label: Bools, distance: float) -> int:
    few, many = sorted((predicted, label), key=np.count_nonzero)
    n, m = np.count_nonzero(few), np.count_nonzero(many)
    if n == 0:
        return 0

    # In each row of the disc around a pixel, the pixels of the other map have consecutive numbers.
    radius = int(min(distance, max(label.shape)))
    rows = np.arange(-radius, radius + 1)
    half = (rows[:, None] ** 2 + np.arange(1, radius + 1) ** 2 <= distance * distance).sum(1)
    padded = np.pad(many, radius)
    before = np.cumsum(np.append(False, padded), dtype=np.int32)  # number of pixels before each one
    centres = np.flatnonzero(np.pad(few, radius))[:, None] + rows * padded.shape[1]
    first = before.take(centres - half)
    runs = before.take(centres + half + 1) - first
    lengths = runs.ravel()
    ends = lengths.cumsum(dtype=np.int32)
    pairs = int(ends[-1])
    near = np.repeat(first.ravel() - (ends - lengths), lengths) + np.arange(pairs, dtype=np.int32)

    # A flow with unit capacities from the source through the n and the m pixels to the sink.
    # Dinic's algorithm takes hundredths of a second, or several times as long with the larger map
    # at the source; maximum_bipartite_matching takes minutes on some maps.
    source, sink = n + m, n + m + 1
    heads = np.concatenate([n + near, np.full(m, sink), np.arange(n)]).astype(np.int32)
    degrees = np.concatenate([[0], runs.sum(1), np.ones(m, int), [n, 0]])
    tails = degrees.cumsum().astype(np.int32)
    graph = csr_matrix((np.ones(len(heads), np.int32), heads, tails), shape=(n + m + 2,) * 2)
    return int(maximum_flow(graph, source, sink).flow_value)


def _count(
    reached: NDArray[np.uint8], label: Bools, known: Bools, distance: float, n: int
) -> Counts:
    lost = np.bincount(reached.ravel(), minlength=n)  # pixels that reach k thresholds and no more
    counts = np.empty((3, n), np.int64)
    for k in range(n):
        if k and not lost[k]:
            counts[:, k] = counts[:, k - 1]  # the map is the same
            continue
        predicted = thin(reached > k) & known
        counts[:, k] = (
            match(predicted, label, distance),
            np.count_nonzero(predicted),
            np.count_nonzero(label),
        )
    return counts
