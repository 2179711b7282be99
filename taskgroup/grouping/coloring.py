"""Graph coloring, the grouping of SON-GOKU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgroup.grouping.clustering import _Clustering, _Floats, _Mask

__all__ = ["GraphColoring"]


class GraphColoring(_Clustering):
    r"""Keeps apart the pairs that conflict, and no others: colours the graph of the conflicts.

    Tasks i and k conflict where their normalised affinity :math:`X_{ik}` is below ``threshold``.
    The colouring is greedy (Welsh & Powell, The Computer Journal 10, 1967): tasks in the order of
    their number of conflicts, most first, ties by position, each in the first group that holds
    none of its conflicts. A pair that was never observed conflicts, so that it is kept apart.

    SON-GOKU steps on such a colouring of averaged gradients, one colour a batch. That schedule is
    a :class:`GradientAffinity`, whose affinity has the signs of the cosines between gradients, and
    ``groups_per_batch=1`` (with a :class:`ProximalAffinity` the batches that observe take two).

    Args:
        threshold: the normalised affinity below which a pair conflicts; 1 is a task's effect on
            itself. Less gives fewer groups.

    Raises:
        ValueError: if ``threshold`` is not a finite number.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> GraphColoring()(matrix)
        tensor([1, 1, 0])

        One colour a batch:

        >>> import taskgroup as tg
        >>> x = torch.zeros(1, requires_grad=True)
        >>> groups = tg.TaskGroups(
        ...     ["left", "right"], warmup=1, groups_per_batch=1, grouping=GraphColoring(),
        ...     affinity=tg.GradientAffinity([x], decay=0.1),
        ... )
        >>> for batch in range(6):
        ...     for group in groups:
        ...         loss = group.loss(torch.stack([(x + 2).square().sum(), (x - 1).square().sum()]))
        ...         loss.backward()
        ...     assert group.first and group.last
        >>> groups.partition        # they pull apart
        [('left',), ('right',)]
    """

    def __init__(self, threshold: float = 0.0) -> None:
        if not np.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold!r}.")
        self.threshold = threshold

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any]:
        conflict = similarity < self.threshold
        if known is not None:
            conflict |= ~known
        colours = np.full(len(conflict), -1)
        for task in np.argsort(-conflict.sum(1), kind="stable"):
            taken = set(colours[conflict[task]].tolist())
            colours[task] = next(colour for colour in itertools.count() if colour not in taken)
        return colours

    def __repr__(self) -> str:
        return f"GraphColoring(threshold={self.threshold})"
