"""The base class of groupings that cluster the affinity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskgroup._arguments import described
from taskgroup.grouping.base import Grouping
from taskgroup.ops.normalised_affinity import normalised_affinity

__all__ = ["Clustering", "Floats", "Integers", "Mask"]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.intp]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Clustering(Grouping):
    """Gives tasks with unknown effects a group of their own, and clusters the others."""

    takes_nan = True

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Return labels 0 to M-1, int64 ``[K]``, for an affinity ``[K, K]``, or None.

        None keeps the partition.
        """
        if (
            not isinstance(matrix, Tensor)
            or matrix.dim() != 2
            or matrix.shape[0] != matrix.shape[1]
        ):
            raise ValueError(
                f"{type(self).__name__} takes an affinity, a tensor [K, K], got "
                f"{described(matrix)}."
            )
        if matrix.dtype not in (torch.float32, torch.float64):
            matrix = matrix.double()  # NumPy has no bfloat16
        affinity = matrix.numpy(force=True)
        tasks, similarity, complete = normalised_affinity(affinity)
        known = None
        if not complete:
            finite = np.isfinite(affinity)[np.ix_(tasks, tasks)]
            known = finite | finite.T
            connected = known.sum(1) > 1  # with another task than itself
            tasks, known = tasks[connected], known[np.ix_(connected, connected)]
            similarity = similarity[np.ix_(connected, connected)]
            if known.all():
                known = None
            else:
                similarity = np.where(known, similarity, min(-1.0, similarity[known].min()))
        if len(tasks) < 2:
            return torch.arange(len(affinity), dtype=torch.int64, device="cpu")
        clusters = self._cluster(similarity, known)
        if clusters is None or len(tasks) == len(affinity):
            return None if clusters is None else torch.from_numpy(clusters)
        labels = np.arange(len(affinity))
        labels[tasks] = len(labels) + clusters  # different from the labels of the other tasks
        return torch.from_numpy(np.unique(labels, return_inverse=True)[1])

    def _cluster(self, similarity: Floats, known: Mask | None) -> np.ndarray[Any, Any] | None:
        """Return labels 0 to M-1, int64 ``[n]``, of n > 1 tasks; None keeps the partition.

        Args:
            similarity: the normalised affinity, ``[n, n]``.
            known: ``[n, n]``, symmetric, True on the diagonal and for the pairs that were observed;
                None if all pairs were.
        """
        raise NotImplementedError
