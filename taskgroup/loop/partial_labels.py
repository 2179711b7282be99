"""Batches that have labels of some tasks: who is due to be observed, and who has never met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taskgroup._arguments import listed

__all__ = ["Meetings", "Turns"]

_MANY = 20  # batches with a task, from which on it counts as trained


class Turns:
    """Gives every task its turn in every n-th of its own batches.

    Where data sets take turns, counting all batches could always meet the same one: the tasks of
    the others would never be observed.

    Args:
        n_tasks: K.
        every: n.

    Example:
        >>> turns = Turns(n_tasks=2, every=2)
        >>> due = []
        >>> for present in [(0,), (1,), (0,), (1,), (0,)]:
        ...     due.append(turns.due(present))
        ...     if due[-1]:
        ...         turns.taken(present)
        >>> due
        [True, True, False, False, True]
    """

    def __init__(self, n_tasks: int, every: int) -> None:
        self._every = every
        # Batches with the task since it had its turn.
        self._waited = np.full(n_tasks, every - 1, dtype=np.int64)

    def due(self, present: Sequence[int]) -> bool:
        """Count a batch; whether one of the tasks in it is due."""
        if self._every == 1:
            return True
        at = self._at(present)
        self._waited[at] += 1
        return bool(self._waited[at].max() >= self._every)

    def taken(self, present: Sequence[int]) -> None:
        """The tasks have had their turn."""
        if self._every > 1:
            self._waited[self._at(present)] = 0

    def state(self) -> list[int]:
        """What :meth:`load` takes: for every task the batches since its turn."""
        waited: list[int] = self._waited.tolist()
        return waited

    def load(self, state: Sequence[int]) -> None:
        """Go on from a state."""
        self._waited[:] = state

    def _at(self, present: Sequence[int]) -> slice | list[int]:
        return slice(None) if len(present) == len(self._waited) else list(present)


class Meetings:
    """Which tasks have been labelled in one batch, to tell of those that never are.

    Args:
        tasks: the K task names.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._met: npt.NDArray[np.bool_] = np.eye(len(tasks), dtype=bool)
        self._batches = np.zeros(len(tasks), dtype=np.int64)
        self._count = 0

    def note(self, present: Sequence[int]) -> str | None:
        """Count a batch; a sentence where tasks have long been trained and never met."""
        at = list(present)
        self._batches[at] += 1
        self._met[np.ix_(at, at)] = True
        self._count += 1
        if self._count % _MANY:
            return None
        trained = self._batches >= _MANY
        strangers = np.argwhere(np.triu(~self._met & trained & trained[:, None]))
        if not len(strangers):
            return None
        pairs = [f"{self._tasks[i]} and {self._tasks[k]}" for i, k in strangers.tolist()]
        return (
            f"These pairs of tasks have been trained in {_MANY} batches or more each, and never in "
            f"the same one: {listed(pairs)}. Nothing is known of what they do to each other, so "
            "they never share a group. To learn it, draw a mini-batch of every data set in each "
            "step and hand all losses to group.loss() together; or choose the groups yourself, "
            "with grouping=tg.Fixed([...]). The page 'Several data sets' of the documentation has "
            "programs for both. This is said once."
        )

    def all_met(self) -> bool:
        """Whether every pair has been labelled in one batch."""
        return bool(self._met.all())
