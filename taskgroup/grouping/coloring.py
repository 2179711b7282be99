"""Graph coloring, the grouping of SON-GOKU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from taskgroup._arguments import number
from taskgroup.grouping.clustering import Clustering, Floats, Mask

__all__ = ["GraphColoring"]


class GraphColoring(Clustering):
    r"""Separates tasks that conflict, by colouring the graph of conflicts.

    Tasks i and k conflict if their normalised affinity :math:`X_{ik}` is below ``threshold``. The
    colouring is greedy (Welsh & Powell, The Computer Journal 10, 1967): it takes the tasks with the
    most conflicts first, ties in task order, and puts each into the first group without a task that
    it conflicts with. Pairs that were never observed count as conflicts.

    SON-GOKU steps on such a colouring of averaged gradients, one colour per batch. To get that
    schedule, use a :class:`GradientAffinity`, whose affinity has the signs of the cosines between
    gradients, and ``groups_per_batch=1``. (With a :class:`ProximalAffinity`, the batches that
    observe take two groups.)

    Args:
        threshold: the normalised affinity below which two tasks conflict; the effect of a task on
            itself is 1. A lower threshold gives fewer groups.

    Raises:
        ValueError: if ``threshold`` is not a finite number.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> GraphColoring()(matrix)
        tensor([1, 1, 0])

        One colour per batch:

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
        >>> groups.partition        # the tasks conflict
        [('left',), ('right',)]
    """

    def __init__(self, threshold: float = 0.0) -> None:
        self.threshold = number("threshold", threshold)

    def _cluster(self, similarity: Floats, known: Mask | None) -> np.ndarray[Any, Any]:
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
