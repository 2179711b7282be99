"""From an affinity matrix to a partition of the tasks: what a grouping is, and controls.

A grouping is any callable that takes the affinity matrix, float32 ``[K, K]`` on the CPU, and
returns labels, int64 ``[K]`` (tasks of equal label share a group), or None for "keep the
partition". :class:`Grouping` lists what else one may have. Those here do not look at the matrix;
:mod:`taskgroup.clustering` has those that do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from taskgroup.arguments import whole_number
from taskgroup.generator import HostGenerator
from taskgroup.sentences import listed

__all__ = [
    "Fixed",
    "Grouping",
    "RandomGroups",
    "Singletons",
    "Together",
]


class Grouping:
    """What :class:`TaskGroups` asks of a grouping besides the call; all of it optional.

    Attributes:
        reads_affinity: False for a grouping that does not look at the matrix. Such a grouping
            holds from the first batch, without warm-up, and never adds a step to a batch.
        takes_nan: True for a grouping that wants NaN for entries that were never observed; others
            are given 0 there.
    """

    reads_affinity: bool = True
    takes_nan: bool = False

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


class Singletons(Grouping):
    """Every task in a group of its own: K steps a batch."""

    reads_affinity = False

    def __call__(self, matrix: Tensor) -> Tensor:
        """Labels 0 to K-1."""
        return torch.arange(len(matrix), dtype=torch.int64, device="cpu")


class Together(Grouping):
    """All tasks in one group: plain joint training, one step a batch."""

    reads_affinity = False

    def __call__(self, matrix: Tensor) -> Tensor:
        """Labels all 0."""
        return torch.zeros(len(matrix), dtype=torch.int64, device="cpu")


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
                f"Fixed has unknown tasks {sorted(unknown, key=repr)}; the tasks are "
                f"{listed(tasks)}."
            )
        group_of = {task: label for label, group in enumerate(self._partition) for task in group}
        self._labels = [group_of[task] for task in tasks]

    def __call__(self, matrix: Tensor) -> Tensor:
        """The label of each task: the place of its group in the partition."""
        return torch.tensor(self._labels, dtype=torch.int64, device="cpu")


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
        self.m = whole_number("m of RandomGroups", m, at_least=1)
        self._generator = HostGenerator(seed)

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
        order = self._generator.permutation(tasks)
        labels = torch.empty(tasks, dtype=torch.int64, device="cpu")
        labels[order[: self.m]] = torch.arange(self.m, dtype=torch.int64, device="cpu")
        labels[order[self.m :]] = torch.randint(
            self.m, (tasks - self.m,), generator=self._generator, device="cpu"
        )
        return labels

    def state_dict(self) -> dict[str, Any]:
        """The state of the draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())
