"""From an affinity matrix to a partition of the tasks.

A grouping is any callable that takes the affinity matrix, float32 ``[K, K]`` on the CPU, and
returns labels, int64 ``[K]`` (tasks of equal label share a group), or None for "keep the
partition". The classes here are such callables; :class:`Grouping` lists what else one may have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskgroup.ops import affinity_propagation

__all__ = [
    "AffinityPropagation",
    "Fixed",
    "Grouping",
    "Heterogeneous",
    "RandomGroups",
    "Singletons",
    "Together",
]


class Grouping:
    """What :class:`TaskGroups` asks of a grouping besides the call; all of it optional.

    Attributes:
        reads_affinity: False for a grouping that does not look at the matrix. Such a grouping
            holds from the first batch, without warm-up, and never adds a step to a batch.
    """

    reads_affinity: bool = True

    def start(self, tasks: tuple[str, ...]) -> None:
        """Learn the names of the tasks; raise where they do not fit."""

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Labels, int64 ``[K]``, for an affinity matrix ``[K, K]``; None keeps the partition."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(matrix).")

    def state_dict(self) -> dict[str, Any]:
        """What must be saved for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: if ``state`` was written by another grouping.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"{type(self).__name__} expects the state {sorted(self.state_dict())}, got "
                f"{sorted(state)}; load the checkpoint with the grouping that wrote it."
            )


class AffinityPropagation(Grouping):
    r"""Clusters the tasks by affinity propagation; the paper's choice and the default.

    Tasks whose self-affinity :math:`A_{kk}` is not positive keep a group of their own. For the
    others the affinity is made comparable over tasks and symmetric,
    :math:`X_{ik} = A_{ik} / A_{kk}`, :math:`X \leftarrow (X + X^\top) / 2`, and clustered (Frey &
    Dueck, Science 2007) with the median of :math:`X` as preference. Up to three tasks, where the
    median says nothing, the preference is 0: tasks join where their affinity is positive.

    Args:
        preference: self-similarity of every task; more gives more groups. None is the rule above.
        damping: in [0.5, 1), the weight of the old messages.
        max_iter: iterations after which the partition is kept as it was.
        convergence_iter: iterations without a change of exemplars that count as converged.

    Example:
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
        if not 0.5 <= damping < 1.0:
            raise ValueError(f"damping must be in [0.5, 1), got {damping!r}.")
        if max_iter < 1 or convergence_iter < 1:
            raise ValueError(
                "max_iter and convergence_iter must be at least 1, "
                f"got {max_iter!r} and {convergence_iter!r}."
            )
        self.preference = preference
        self.damping = damping
        self.max_iter = max_iter
        self.convergence_iter = convergence_iter

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Labels, int64 ``[K]``; None where affinity propagation does not converge."""
        affinity = matrix.detach().cpu().numpy().astype(np.float64)
        known = np.flatnonzero(affinity.diagonal() > 0)
        labels = np.arange(len(affinity))
        if len(known) > 1:
            if len(known) < len(affinity):
                affinity = affinity[np.ix_(known, known)]
            ratio = affinity / affinity.diagonal()
            preference = self.preference
            if preference is None and len(known) <= 3:
                # The least number above 0: an affinity of exactly 0, not measured yet, is no
                # reason to join.
                preference = np.finfo(np.float64).tiny
            found = affinity_propagation(
                (ratio + ratio.T) / 2,
                preference=preference,
                damping=self.damping,
                max_iter=self.max_iter,
                convergence_iter=self.convergence_iter,
            )
            if found is None:
                return None
            groups = self._arrange(found)
            if len(known) == len(labels):
                return groups
            labels[known] = len(labels) + groups.numpy()  # apart from the labels of the rest
        return torch.from_numpy(np.unique(labels, return_inverse=True)[1])

    def _arrange(self, clusters: Tensor) -> Tensor:
        """The groups to make of the clusters, labels ``[n]`` both."""
        return clusters

    def __repr__(self) -> str:
        return f"{type(self).__name__}(preference={self.preference}, damping={self.damping})"


class Heterogeneous(AffinityPropagation):
    """Groups of tasks that conflict; a control for :class:`AffinityPropagation`.

    Finds the same clusters, and deals the members of each out over the groups, so that tasks that
    serve each other are kept apart. There are as many groups as clusters: a batch costs the same.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Heterogeneous()(matrix)      # tasks 0 and 1 agree
        tensor([0, 1, 0])
    """

    def _arrange(self, clusters: Tensor) -> Tensor:
        groups = torch.empty_like(clusters)
        groups[clusters.argsort(stable=True)] = torch.arange(len(clusters)) % (clusters.max() + 1)
        return groups


class Singletons(Grouping):
    """Every task in a group of its own: K steps a batch."""

    reads_affinity = False

    def __call__(self, matrix: Tensor) -> Tensor:
        """Labels 0 to K-1."""
        return torch.arange(len(matrix))


class Together(Grouping):
    """All tasks in one group: plain joint training, one step a batch."""

    reads_affinity = False

    def __call__(self, matrix: Tensor) -> Tensor:
        """Labels all 0."""
        return torch.zeros(len(matrix), dtype=torch.int64)


class Fixed(Grouping):
    """The partition you give, for good.

    Args:
        partition: groups of task names; every task in exactly one group.

    Raises:
        ValueError: if a group is empty or a task stands twice; when the tasks are known
            (:class:`TaskGroups`), if one is unknown or missing.

    Example:
        >>> from taskgroup import TaskGroups
        >>> grouping = Fixed([("depth", "normal"), ("edges",)])
        >>> TaskGroups(["depth", "edges", "normal"], grouping=grouping).partition
        [('depth', 'normal'), ('edges',)]
    """

    reads_affinity = False

    def __init__(self, partition: Iterable[Iterable[str]]) -> None:
        self._partition: list[tuple[str, ...]] = []
        seen: set[str] = set()
        for members in partition:
            if isinstance(members, str):
                raise TypeError(
                    f"Fixed takes groups of task names, got the string {members!r} as a group; "
                    f"write [{members!r}]."
                )
            group = tuple(members)
            if not group:
                raise ValueError("Fixed got an empty group; leave it out.")
            for task in group:
                if task in seen:
                    raise ValueError(f"Fixed got task {task!r} twice; put it in one group.")
                seen.add(task)
            self._partition.append(group)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Check the partition against the tasks."""
        given = {task for group in self._partition for task in group}
        for task in tasks:
            if task not in given:
                raise ValueError(f"Fixed has no group for task {task!r}; put it in one.")
        if unknown := given - set(tasks):
            raise ValueError(
                f"Fixed has unknown tasks {sorted(unknown)}; the tasks are {list(tasks)}."
            )
        group_of = {task: label for label, group in enumerate(self._partition) for task in group}
        self._labels = torch.tensor([group_of[task] for task in tasks])

    def __call__(self, matrix: Tensor) -> Tensor:
        """The label of each task: the place of its group in the partition."""
        return self._labels


class RandomGroups(Grouping):
    """Random groups, drawn anew at every regrouping; a control for learned ones.

    Args:
        m: the number of groups, none of them empty; at most the number of tasks.
        seed: of the draws; their state is saved and resumed with the groups.

    Raises:
        ValueError: if ``m`` is below 1 or, once the tasks are known, above their number.
    """

    reads_affinity = False

    def __init__(self, m: int, seed: int = 0) -> None:
        if m < 1:
            raise ValueError(f"RandomGroups needs at least one group, got m={m!r}.")
        self.m = m
        self._generator = torch.Generator().manual_seed(seed)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Check that there are tasks enough for ``m`` groups."""
        if self.m > len(tasks):
            raise ValueError(
                f"RandomGroups(m={self.m}) cannot fill {self.m} groups with {len(tasks)} tasks; "
                f"take m up to {len(tasks)}."
            )

    def __call__(self, matrix: Tensor) -> Tensor:
        """Random labels 0 to m-1, each at least once."""
        tasks = len(matrix)
        labels = torch.empty(tasks, dtype=torch.int64)
        order = torch.randperm(tasks, generator=self._generator)
        labels[order[: self.m]] = torch.arange(self.m)
        labels[order[self.m :]] = torch.randint(
            self.m, (tasks - self.m,), generator=self._generator
        )
        return labels

    def state_dict(self) -> dict[str, Any]:
        """The state of the draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())
