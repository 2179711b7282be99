"""Groupings that do not read the affinity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from taskgroup._arguments import listed, whole_number
from taskgroup._generator import HostGenerator
from taskgroup.grouping.base import Grouping

__all__ = ["Fixed", "RandomGroups", "Singletons", "Together"]


class Singletons(Grouping):
    """Puts every task in a group of its own: K steps per batch."""

    reads_affinity = False

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return labels 0 to K-1."""
        return torch.arange(len(matrix), dtype=torch.int64, device="cpu")


class Together(Grouping):
    """Puts all tasks in one group: joint training, one step per batch."""

    reads_affinity = False

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return labels that are all 0."""
        return torch.zeros(len(matrix), dtype=torch.int64, device="cpu")


class Fixed(Grouping):
    """Keeps the partition that you give.

    Args:
        partition: groups of task names; every task in exactly one group.

    Raises:
        ValueError: if a group is empty or a task is named twice; in :class:`TaskGroups`, if a task
            is unknown or missing.

    Example:
        >>> from taskgroup import TaskGroups
        >>> grouping = Fixed([("depth", "normal"), ("edges",)])
        >>> TaskGroups(["depth", "edges", "normal"], grouping=grouping).partition
        [('depth', 'normal'), ('edges',)]
    """

    reads_affinity = False

    def __init__(self, partition: Iterable[Iterable[str]]) -> None:
        self._group_of: dict[str, int] = {}
        wanted = "Fixed takes groups of task names, such as [['depth', 'normal'], ['edges']]"
        if not isinstance(partition, Iterable):
            raise TypeError(f"{wanted}, got {partition!r}.")
        for label, members in enumerate(partition):
            if not isinstance(members, Iterable):
                raise TypeError(f"{wanted}, got {members!r} as a group.")
            if isinstance(members, str):
                raise TypeError(
                    f"Fixed takes groups of task names, got the string {members!r} as a group; "
                    f"write [{members!r}]."
                )
            group = tuple(members)
            if not group:
                raise ValueError("Fixed got an empty group; leave it out.")
            for task in group:
                if task in self._group_of:
                    raise ValueError(f"Fixed got task {task!r} twice; put it in one group.")
                self._group_of[task] = label

    def start(self, tasks: tuple[str, ...]) -> None:
        """Check the partition against the tasks."""
        for task in tasks:
            if task not in self._group_of:
                raise ValueError(f"Fixed has no group for task {task!r}; put it in one.")
        if unknown := self._group_of.keys() - set(tasks):
            raise ValueError(
                f"Fixed has unknown tasks {sorted(unknown, key=repr)}; the tasks are "
                f"{listed(tasks)}."
            )
        self._labels = [self._group_of[task] for task in tasks]

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return the label of each task: the position of its group in the partition."""
        return torch.tensor(self._labels, dtype=torch.int64, device="cpu")


class RandomGroups(Grouping):
    """Draws random groups at every regrouping: a control for learned groups.

    Args:
        m: the number of groups, at most the number of tasks; no group is empty.
        seed: the seed of the draws. Their state is saved and resumed with the groups.

    Raises:
        ValueError: if ``m`` is below 1 or above the number of tasks.
    """

    reads_affinity = False

    def __init__(self, m: int, seed: int = 0) -> None:
        self.m = whole_number("m of RandomGroups", m, at_least=1)
        self._generator = HostGenerator(seed)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Check that there are enough tasks for ``m`` groups."""
        if self.m > len(tasks):
            raise ValueError(
                f"RandomGroups(m={self.m}) cannot fill {self.m} groups with {len(tasks)} tasks; "
                f"choose m up to {len(tasks)}."
            )

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return random labels 0 to m-1, each at least once."""
        tasks = len(matrix)
        order = self._generator.permutation(tasks)
        labels = torch.empty(tasks, dtype=torch.int64, device="cpu")
        labels[order[: self.m]] = torch.arange(self.m, dtype=torch.int64, device="cpu")
        labels[order[self.m :]] = torch.randint(
            self.m, (tasks - self.m,), generator=self._generator, device="cpu"
        )
        return labels

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draws from the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())
