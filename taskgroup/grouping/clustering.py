"""What all groupings that cluster the affinity share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taskgroup.grouping.base import Grouping
from taskgroup.ops.normalised_affinity import normalised_affinity

_Floats = npt.NDArray[np.float64]


_Integers = npt.NDArray[np.intp]


_Mask = npt.NDArray[np.bool_]


class _Clustering(Grouping):
    """Sets the tasks apart of which nothing is known, and clusters the others."""

    takes_nan = True

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Labels 0 to M-1, int64 ``[K]``, for an affinity ``[K, K]``; None keeps the partition."""
        affinity = matrix.detach().cpu().contiguous()
        if affinity.dtype not in (torch.float32, torch.float64):
            affinity = affinity.double()  # of bfloat16, say, which NumPy does not have
        tasks, similarity = normalised_affinity(affinity.numpy())
        finite, known = np.isfinite(affinity.numpy()), None
        if not finite.all():
            finite = finite[np.ix_(tasks, tasks)]
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
        labels[tasks] = len(labels) + clusters  # apart from the labels of the rest
        return torch.from_numpy(np.unique(labels, return_inverse=True)[1])

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any] | None:
        """Labels 0 to M-1, int64 ``[n]``, of n > 1 tasks; None keeps the partition.

        Args:
            similarity: ``[n, n]``, the normalised affinity.
            known: ``[n, n]``, symmetric: the pairs that were observed, and the diagonal; None where
                all were.
        """
        raise NotImplementedError
