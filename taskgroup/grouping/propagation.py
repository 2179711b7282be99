"""Affinity propagation, the grouping of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np

from taskgroup._arguments import number, whole_number
from taskgroup.grouping.clustering import Clustering, Floats, Integers, Mask
from taskgroup.ops.affinity_propagation import propagate

__all__ = ["AffinityPropagation", "Heterogeneous"]


class AffinityPropagation(Clustering):
    r"""Clusters the tasks by affinity propagation; the paper's choice and the default.

    Tasks whose self-affinity :math:`A_{kk}` is not positive keep a group of their own. For the
    other tasks, the affinity is normalised and made symmetric,
    :math:`X_{ik} = A_{ik} / A_{kk}`, :math:`X \leftarrow (X + X^\top) / 2`, and clustered (Frey &
    Dueck, Science 2007) with the median of :math:`X` as preference. With three tasks or fewer the
    median tells nothing, and the preference is 0: tasks with a positive affinity join. If the
    algorithm does not converge, the partition stays as it is.

    Tasks that were never observed together, such as those of data sets without a common task, are
    clustered separately: the known pairs connect tasks into parts, and each part is clustered on
    its own.

    Args:
        preference: the self-similarity of every task. A larger one gives more groups. None uses the
            rule above.
        damping: the weight of the old messages, in [0.5, 1).
        max_iter: the largest number of iterations. Without convergence by then, the partition
            stays as it is.
        convergence_iter: the number of iterations without a change of exemplars that counts as
            convergence.

    Raises:
        ValueError: if ``damping``, ``max_iter`` or ``convergence_iter`` is out of its range.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> AffinityPropagation()(matrix)
        tensor([0, 0, 1])
    """

    def __init__(
        self,
        preference: float | None = None,
        damping: float = 0.5,
        max_iter: int = 200,
        convergence_iter: int = 50,
    ) -> None:
        self.preference: float | None = None
        if preference is not None:
            self.preference = number("preference", preference, "finite, or None")
        self.damping = number("damping", damping, "in [0.5, 1)")
        if not 0.5 <= self.damping < 1.0:
            raise ValueError(f"damping must be in [0.5, 1), got {damping!r}.")
        self.max_iter = whole_number("max_iter", max_iter, at_least=1)
        self.convergence_iter = whole_number("convergence_iter", convergence_iter, at_least=1)

    def _cluster(self, similarity: Floats, known: Mask | None) -> np.ndarray[Any, Any] | None:
        if known is None:
            return self._propagate(similarity, known)
        labels = np.zeros(len(similarity), dtype=np.int64)
        for part in _parts(known):
            found = self._propagate(similarity[np.ix_(part, part)], known[np.ix_(part, part)])
            if found is None:
                return None
            labels[part] = found + (labels.max() + 1)
        return np.unique(labels, return_inverse=True)[1]

    def _propagate(self, similarity: Floats, known: Mask | None) -> np.ndarray[Any, Any] | None:
        """Return labels 0 to M-1 for tasks that known pairs connect."""
        n, preference = len(similarity), self.preference
        if preference is None and n <= 3:
            # The smallest number above 0: tasks with an affinity of exactly 0 do not join.
            preference = np.finfo(np.float64).tiny
        elif preference is None and known is not None:
            preference = float(np.median(similarity[known]))
        preferences = None if preference is None else np.full(n, preference)
        return propagate(
            similarity, preferences, self.damping, self.max_iter, self.convergence_iter
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(preference={self.preference}, damping={self.damping})"


def _parts(known: Mask) -> list[Integers]:
    """The connected parts of the graph whose edges are the known pairs: positions of tasks."""
    part = np.arange(len(known))
    for _ in range(len(known)):  # every task takes the lowest number among its neighbours
        lowest = np.where(known, part, len(known)).min(1)
        if np.array_equal(lowest, part):
            break
        part = lowest
    return [np.flatnonzero(part == number) for number in np.unique(part)]


class Heterogeneous(AffinityPropagation):
    """Groups tasks that conflict: a control for :class:`AffinityPropagation`.

    It finds the same clusters, and distributes the members of each cluster over the groups, so that
    tasks that help each other are in different groups. There are as many groups as clusters, so a
    batch costs the same.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Heterogeneous()(matrix)      # tasks 0 and 1 agree
        tensor([0, 1, 0])
    """

    def _propagate(self, similarity: Floats, known: Mask | None) -> np.ndarray[Any, Any] | None:
        clusters = super()._propagate(similarity, known)
        if clusters is None:
            return None
        groups = np.empty_like(clusters)
        groups[clusters.argsort(kind="stable")] = np.arange(len(clusters)) % (clusters.max() + 1)
        return groups
