"""Which groups are stepped on in which batch: integers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Members", "Rounds", "union"]

Members = tuple[int, ...]  # positions of tasks, ascending


class Random(Protocol):
    """Where the order of the groups comes from."""

    def permutation(self, n: int) -> list[int]:
        """The numbers 0 to n-1 in random order."""

    def below(self, n: int) -> int:
        """A random number from 0 to n-1."""


class Rounds:
    """Deals a partition out to the batches, round after round, and renews it.

    Args:
        n_tasks: K; the first partition has a group for each.
        warmup: rounds before the first regrouping.
        regroup_every: rounds from one regrouping to the next.
        groups_per_batch: groups that are dealt to a batch; None is the whole partition.
        random: shuffles the groups.

    Attributes:
        partition: the groups, each task in one.
        queue: the groups of this round that are not dealt yet.
        begun: the number of rounds begun.

    Example:
        >>> class InOrder:
        ...     def permutation(self, n):
        ...         return list(range(n))
        ...     def below(self, n):
        ...         return 0
        >>> rounds = Rounds(3, warmup=1, regroup_every=1, groups_per_batch=2, random=InOrder())
        >>> everyone = (0, 1, 2)
        >>> rounds.deal(everyone, lambda: None)
        [(0,), (1,)]
        >>> rounds.deal(everyone, lambda: None)
        [(2,)]
        >>> rounds.deal(everyone, lambda: [(0, 2), (1,)])
        [(0, 2), (1,)]
    """

    def __init__(
        self,
        n_tasks: int,
        *,
        warmup: int,
        regroup_every: int,
        groups_per_batch: int | None,
        random: Random,
    ) -> None:
        self.partition: list[Members] = [(k,) for k in range(n_tasks)]
        self.queue: list[Members] = []
        self.begun = 0
        self._everyone: Members = tuple(range(n_tasks))
        self._warmup = warmup
        self._regroup_every = regroup_every
        self._groups_per_batch = groups_per_batch
        self._random = random

    def deal(
        self, present: Members, regroup: Callable[[], list[Members] | None], again: bool = False
    ) -> list[Members]:
        """The groups of one batch, cut down to the tasks that are present; at least one.

        Args:
            present: the labelled tasks, at least one.
            regroup: called where it is time; the new partition, or None to keep the old one.
            again: deal at least two groups: one more of the round, or the same again.
        """
        here = None if present == self._everyone else frozenset(present)
        dealt: list[Members] = []
        while not dealt:  # twice at most: a whole round holds every present task
            if not self.queue:
                self._begin(regroup)
            while self.queue and len(dealt) != self._groups_per_batch:
                if members := _cut(self.queue.pop(0), here):
                    dealt.append(members)
        if again and len(dealt) == 1:
            dealt.append(self._another(dealt[0], here))
        return dealt

    def _another(self, dealt: Members, here: frozenset[int] | None) -> Members:
        while self.queue:
            if members := _cut(self.queue.pop(0), here):
                return members
        others = [_cut(members, here) for members in self.partition]
        others = [members for members in others if members and members != dealt]
        if not others:
            return dealt
        return others[self._random.below(len(others))]

    def _begin(self, regroup: Callable[[], list[Members] | None]) -> None:
        """Regroup where it is time, and shuffle the partition."""
        since = self.begun - self._warmup
        if since >= 0 and since % self._regroup_every == 0:
            self.partition = regroup() or self.partition
        self.begun += 1
        order = self._random.permutation(len(self.partition))
        self.queue = [self.partition[i] for i in order]


def _cut(members: Members, here: frozenset[int] | None) -> Members:
    """The members that are here; None is everyone."""
    return members if here is None else tuple(k for k in members if k in here)


def union(members: Members, others: Members) -> Members:
    """The tasks of both, in task order."""
    return members if not others else tuple(sorted({*members, *others}))
