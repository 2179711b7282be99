"""Makes the affinity comparable between tasks, and symmetric, for clustering; on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from taskgroup.ops import _backend

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


def normalised_affinity(affinity: np.ndarray[Any, Any]) -> tuple[Integers, Floats, bool]:
    r"""Computes the similarity of tasks from their affinity.

    .. math::
        X_{ik} = \frac{1}{2} \left( \frac{A_{ik}}{A_{kk}} + \frac{A_{ki}}{A_{ii}} \right)

    for the n tasks with :math:`A_{kk} > 0`, whose effect on themselves is known.

    Args:
        affinity: :math:`A`, ``[K, K]``, any floating dtype. Entries that are not finite count as 0.

    Returns:
        The positions of these tasks, int64 [n], ascending; :math:`X`, float64 [n, n]; and whether
        all entries of :math:`A` are finite.

    Example:
        >>> normalised_affinity(np.array([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
        (array([0, 1]), array([[1.   , 0.375],
               [0.375, 1.   ]]), True)
    """
    return _backend.choose("cpu", cpp=_native, reference=_reference)(affinity)


def _native(affinity: np.ndarray[Any, Any]) -> tuple[Integers, Floats, bool]:
    found: tuple[Integers, Floats, bool] = _backend.native.host.normalised_affinity(affinity)
    return found


def _reference(affinity: np.ndarray[Any, Any]) -> tuple[Integers, Floats, bool]:
    finite = np.isfinite(affinity)
    entries = np.where(finite, affinity, 0.0).astype(np.float64)
    known = np.flatnonzero(entries.diagonal() > 0)
    own = entries[np.ix_(known, known)]
    ratio = own / own.diagonal()
    return known, (ratio + ratio.T) / 2, bool(finite.all())
