"""Which groups are stepped on in which batch, and what each step needs: integers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = ["Members", "Plan", "Rounds", "union"]

Members = tuple[int, ...]  # positions of tasks, ascending


class Plan(NamedTuple):
    """The plan of one step of a batch.

    Attributes:
        members: the tasks to step on, those of the group that are labelled.
        group: the group of the partition.
        needed: the tasks whose losses it needs: its members and those it observes or measures.
        measures: the tasks whose gradients are measured before the step.
        observes: whether the batch observes what its steps do to the losses.
        place: the position of the step in the batch, from 0.
        last: whether it is the last step of the batch.
    """

    members: Members
    group: Members
    needed: Members
    measures: Members
    observes: bool
    place: int
    last: bool


class _Random(Protocol):
    """Where the order of the groups comes from."""

    def permutation(self, n: int) -> list[int]: ...  # of the numbers 0 to n-1
    def below(self, n: int) -> int: ...  # one of the numbers 0 to n-1


class _Observes(Protocol):
    """The part of an affinity that decides what a batch observes; see :class:`Affinity`."""

    reads_steps: bool
    every: int | None

    def draw(self, present: Sequence[int]) -> Members: ...


class Rounds:
    """Deals a partition out to the batches, round after round, and renews it.

    Args:
        n_tasks: K; the first partition has one group for each task.
        affinity: decides which batches observe, and which tasks are measured by their gradients.
        random: shuffles the groups.
        learns: whether the partition follows from the affinity. If not, there is no warm-up, and no
            batch gets a second step in order to observe.
        warmup: rounds before the first regrouping.
        regroup_every: rounds from one regrouping to the next.
        groups_per_batch: groups dealt to a batch; None is the whole partition.
        observe_every: batches from one that observes to the next.

    Attributes:
        partition: the groups; every task is in one of them.
        queue: the groups of this round that have not been dealt yet.
        begun: the number of rounds begun.

    Example:
        >>> class Numbers:  # an affinity and a random generator that do nothing surprising
        ...     reads_steps, every = False, None
        ...     def permutation(self, n):
        ...         return list(range(n))
        >>> settings = dict(learns=True, warmup=1, regroup_every=1, groups_per_batch=2)
        >>> rounds = Rounds(3, Numbers(), Numbers(), observe_every=1, **settings)
        >>> everyone = (0, 1, 2)
        >>> [plan.members for plan in rounds.plan(everyone, lambda: None)]
        [(0,), (1,)]
        >>> [plan.members for plan in rounds.plan(everyone, lambda: None)]
        [(2,)]
        >>> [plan.members for plan in rounds.plan(everyone, lambda: [(0, 2), (1,)])]
        [(0, 2), (1,)]
    """

    def __init__(
        self,
        n_tasks: int,
        affinity: _Observes,
        random: _Random,
        *,
        learns: bool,
        warmup: int,
        regroup_every: int,
        groups_per_batch: int | None,
        observe_every: int,
    ) -> None:
        self.partition: list[Members] = [(k,) for k in range(n_tasks)]
        self.queue: list[Members] = []
        self.begun = 0
        self._everyone: Members = tuple(range(n_tasks))
        self._affinity = affinity
        self._random = random
        self._learns = learns
        self._warmup = warmup if learns else regroup_every
        self._regroup_every = regroup_every
        self._groups_per_batch = groups_per_batch
        # Every task is due in every n-th of its own batches. Where data sets take turns, counting
        # all batches could always meet the same data set and never observe the others.
        self._observe_every = affinity.every or observe_every
        # For each task, its batches since it was observed last.
        self._waited = np.full(n_tasks, self._observe_every - 1, dtype=np.int64)

    def plan(self, present: Members, regroup: Callable[[], list[Members] | None]) -> list[Plan]:
        """The steps of one batch, at least one, cut down to the labelled tasks ``present``.

        ``regroup`` is called when the partition is to be renewed. It returns the new partition, or
        None to keep the old one.
        """
        affinity, begun = self._affinity, self.begun
        # A task that is present alone has nothing to be compared with.
        several = len(present) > 1
        due = several and affinity.reads_steps and self._due(present)
        dealt = self._deal(present, regroup, again=due and self._learns)
        observes = due and len(dealt) > 1
        measured: Members = ()
        if several and affinity.every is not None and self.begun > begun:
            measured = affinity.draw(present) if self._due(present) else ()
        if observes or measured:
            self._waited[self._at(present)] = 0
        plans = []
        for place, members in enumerate(dealt):
            measures = () if place else measured
            needed = present if observes else union(members, measures)
            last = place == len(dealt) - 1
            group = next(group for group in self.partition if members[0] in group)
            plans.append(Plan(members, group, needed, measures, observes, place, last))
        return plans

    def regroup(self, partition: list[Members] | None) -> None:
        """Take over a new partition; None keeps the old one."""
        self.partition = partition or self.partition

    @property
    def takes_one_step(self) -> bool:
        """Whether no batch ever takes a second step on other losses than its first."""
        several = len(self.partition) > 1 and self._groups_per_batch != 1
        return not self._learns and not several

    @property
    def warming_up(self) -> bool:
        """Whether the round at hand comes before the first regrouping."""
        return self._learns and self.begun <= self._warmup

    def state(self) -> dict[str, Any]:
        """Everything that an exact resume needs, made quickly since every batch asks for it."""
        return {
            "partition": list(self.partition),
            "queue": list(self.queue),
            "rounds": self.begun,
            "turns": self._waited.tolist(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state` returned; if it does not fit, raise before anything changes."""
        partition = [tuple(members) for members in state["partition"]]
        queue = [tuple(members) for members in state["queue"]]
        if tuple(sorted(sum(partition, ()))) != self._everyone or not all(partition):
            raise ValueError("The partition in the state does not hold every task once.")
        if not set(queue) <= set(partition):
            raise ValueError("The queue in the state holds groups that are not in its partition.")
        if len(state["turns"]) != len(self._everyone):
            raise ValueError("The turns in the state are not one number for every task.")
        self.partition, self.queue, self.begun = partition, queue, state["rounds"]
        self._waited[:] = state["turns"]

    def _due(self, present: Members) -> bool:
        """Count a batch, and tell whether one of its tasks is due."""
        if self._observe_every == 1:
            return True
        at = self._at(present)
        self._waited[at] += 1
        return bool(self._waited[at].max() >= self._observe_every)

    def _at(self, present: Members) -> slice | list[int]:
        return slice(None) if present == self._everyone else list(present)

    def _deal(
        self, present: Members, regroup: Callable[[], list[Members] | None], again: bool
    ) -> list[Members]:
        """The groups of one batch; with ``again`` at least two, the same one twice if need be."""
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
        """Begin a round: regroup if it is time, and shuffle the partition."""
        since = self.begun - self._warmup
        if since >= 0 and since % self._regroup_every == 0:
            self.regroup(regroup())
        self.begun += 1
        order = self._random.permutation(len(self.partition))
        self.queue = [self.partition[i] for i in order]


def _cut(members: Members, here: frozenset[int] | None) -> Members:
    """The members that are here; None stands for all tasks."""
    return members if here is None else tuple(k for k in members if k in here)


def union(members: Members, others: Members) -> Members:
    """The tasks of both, in task order."""
    return members if not others else tuple(sorted({*members, *others}))
