"""What a loop tells those who listen to it: its batches, its steps and their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["Listener", "Listeners"]


class Listener:
    """Hears what a loop does, in this order; every method does nothing by default.

    In a batch of :class:`taskgroup.TaskGroups` each step calls ``begin_step``, ``begin_loss``,
    ``losses`` and ``end_loss``; a step in several micro-batches repeats the last three, and calls
    ``losses`` once. A trainer that drops the iterator of the groups ends the batch before its step.
    A joint method calls ``begin_loss``, ``losses`` and ``end_loss`` alone.
    """

    def begin_batch(self) -> None:
        """A batch begins; its groups are not chosen yet."""

    def begin_step(self) -> None:
        """The forward pass of a step begins."""

    def begin_loss(self) -> None:
        """The forward pass is done: the losses are handed over."""

    def losses(self, members: Sequence[int], values: Tensor) -> None:
        """The losses ``[n]`` of a step, of the tasks at these positions; the mean over the ranks.

        They have no graph, are on the device of the loop, and are not written to afterwards. NaN
        stands for a task that the step does not need.
        """

    def end_loss(self) -> None:
        """The loss to step on is about to be returned."""

    def end_batch(self) -> None:
        """The loop over the groups has ended."""


class Listeners(list[Listener]):
    """The listeners of one loop. A copy of the loop has none, since they listen to the original."""

    def __reduce_ex__(self, protocol: Any) -> tuple[type[Listeners], tuple[()]]:
        return Listeners, ()
