"""The best partition into at most M groups, found by trying all of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from taskgroup._arguments import whole_number
from taskgroup.grouping.clustering import Clustering, Floats, Integers, Mask

__all__ = ["Exhaustive"]


class Exhaustive(Clustering):
    r"""Finds the best of all partitions into at most M groups, for up to 14 tasks.

    A task gains from its group the mean affinity of the other members onto it. The best partition
    has the largest sum of these gains over all tasks,

    .. math::
        \max_{\mathcal P,\ |\mathcal P| \le M} \; \sum_{S \in \mathcal P,\ |S| > 1} \;
        \sum_{k \in S} \frac{1}{|S| - 1} \sum_{i \in S,\ i \ne k} \frac{A_{ik}}{A_{kk}}

    as in TAG (Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning",
    NeurIPS 2021). A task in a group of its own gains 0. The search is exact: dynamic programming
    over the :math:`3^K / 2` pairs of a set of tasks and a group that holds its first task. Among
    equally good partitions it takes the one with the fewest groups, and then the one whose first
    group (then second, and so on) is the lowest as a binary number in which task k is bit k.

    Choose M as small as you can. The gains of a group of n tasks add up to n times its mean
    affinity, and so do, on average, those of its random splits: for four tasks or more, some split
    into pairs and triples is as good or better. If M exceeds the number of clusters, noise decides
    which clusters are split.

    Args:
        max_groups: M, the largest number of groups for the tasks that have a self-affinity. Other
            tasks get groups of their own in addition.

    Raises:
        ValueError: if ``max_groups`` is below 1, or there are more than 14 tasks.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Exhaustive(max_groups=3)(matrix)
        tensor([0, 0, 1])
    """

    _most_tasks = 14  # 2.4 million pairs

    def __init__(self, max_groups: int) -> None:
        self.max_groups = whole_number("max_groups of Exhaustive", max_groups, at_least=1)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Check that there are few enough tasks to try all partitions."""
        self._check(len(tasks))

    def _check(self, n_tasks: int) -> None:
        if n_tasks > self._most_tasks:
            raise ValueError(
                f"Exhaustive tries all partitions of up to {self._most_tasks} tasks, got "
                f"{n_tasks}; use AffinityPropagation() or another clustering instead."
            )

    def _cluster(self, similarity: Floats, known: Mask | None) -> npt.NDArray[Any]:
        n_tasks = len(similarity)
        self._check(n_tasks)
        subsets = _subsets(n_tasks)
        # The sum over a group is the same for the affinity and its symmetric part.
        effect = similarity - np.diag(similarity.diagonal())
        others = np.maximum(subsets.members.sum(1) - 1, 1)
        score = ((subsets.members @ effect) * subsets.members).sum(1) / others
        gain = score[subsets.group]
        best = [np.full(len(score), -np.inf)]  # best[m][tasks]: the score of at most m groups
        best[0][0] = 0.0
        while len(best) <= self.max_groups:
            following = np.zeros(len(score))
            np.maximum.reduceat(gain + best[-1][subsets.rest], subsets.start, out=following[1:])
            if np.array_equal(following, best[-1]):
                break
            best.append(following)
        # The fewest groups with the best score; sums in another order may differ by rounding.
        most = best[-1][-1] - 1e-12 * n_tasks * np.abs(effect).max()
        groups = next(m for m in range(1, len(best)) if best[m][-1] >= most)

        labels = np.zeros(n_tasks, dtype=np.int64)
        tasks = len(score) - 1
        for m in range(groups, 0, -1):
            if tasks == 0:
                break
            begin = subsets.start[tasks - 1]
            end = subsets.start[tasks] if tasks < len(subsets.start) else None
            chosen = (gain[begin:end] + best[m - 1][subsets.rest[begin:end]]).argmax()
            labels[subsets.members[subsets.group[begin + chosen]] > 0] = groups - m
            tasks = subsets.rest[begin + chosen]
        return labels

    def __repr__(self) -> str:
        return f"Exhaustive(max_groups={self.max_groups})"


class _Subsets(NamedTuple):
    """The sets of n tasks as binary numbers, and the groups that can be taken out of each."""

    members: Floats  # [2^n, n]: 1 if the set holds the task
    # [P]: for each set, in ascending order, the groups that hold the first task of the set.
    group: Integers
    rest: Integers  # [P]: the set without the group
    start: Integers  # [2^n - 1]: where the groups of each set begin; the empty set has none


@lru_cache(maxsize=2)
def _subsets(n_tasks: int) -> _Subsets:
    sets = np.arange(2**n_tasks)
    groups = [np.empty(0, dtype=np.intp)]
    for tasks in range(1, len(sets)):
        last = 1 << (tasks.bit_length() - 1)
        without = groups[tasks ^ last]
        joined = np.concatenate([without, without | last])
        groups.append(joined if len(joined) else np.array([last]))
    sizes = np.array([len(group) for group in groups])
    group = np.concatenate(groups)
    return _Subsets(
        members=(sets[:, None] >> np.arange(n_tasks) & 1).astype(np.float64),
        group=group,
        rest=np.repeat(sets, sizes) ^ group,
        start=np.cumsum(sizes)[:-1],
    )
