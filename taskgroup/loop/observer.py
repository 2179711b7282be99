"""Passes the losses of the steps to whoever learns from them, without stopping the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from taskgroup._listeners import Listener, Listeners
from taskgroup._random_state import RandomState
from taskgroup.affinity.base import Affinity, Losses
from taskgroup.loop.batch import Batch
from taskgroup.loop.host_copy import HostCopy
from taskgroup.loop.loss_reader import LossReader, send_like
from taskgroup.loop.misuse import LossWatch
from taskgroup.loop.ranks import Ranks
from taskgroup.loop.rounds import Members, Plan
from taskgroup.nn.model import MultiTaskModel
from taskgroup.nn.outside import NextStep

if TYPE_CHECKING:  # it imports all methods
    from taskgroup.loop.weighting import Weighting

__all__ = ["Observer"]


_COPIED = ("watch", "listeners", "_reader", "_affinity", "_weighting", "_ranks", "_asked")


class _Step(NamedTuple):
    """A step taken in this batch, whose effect shows in the next losses."""

    members: Members
    mask: Tensor  # bool [K]
    losses: Tensor  # [K], before the step


class Observer:
    """Follows the steps of the loop: hands their losses on, and looks at them.

    The affinity learns from the losses, and so may the method that weighs them.
    On a GPU it does not wait for them: the affinity and the numbers to look at are sent to the host
    after the last forward pass of a batch, and read once they have arrived.

    A copy of this object is between two batches, with no numbers on their way to the host.

    Attributes:
        batch: the open batch; None between two batches.
        listeners: hear of the batches, on the first rank alone.
    """

    def __init__(
        self,
        reader: LossReader,
        affinity: Affinity,
        weighting: Weighting | None,
        ranks: Ranks,
    ) -> None:
        self.watch = LossWatch(reader.tasks)
        self.listeners = Listeners()
        self._reader = reader
        self._affinity = affinity
        self._weighting = weighting
        self._ranks = ranks
        self._asked = 0  # how many losses were asked for
        self.forget_all()

    def forget_all(self) -> None:
        """Forget all steps, and all numbers on their way to the host."""
        self.batch: Batch | None = None
        self._random_state: RandomState | None = None  # from which every step of it starts
        self._current: Plan | None = None  # the step at hand; it outlives its batch
        self._stepping: tuple[Plan, MultiTaskModel | None] | None = None  # whose loss came last
        self._before: _Step | None = None
        self._copy: HostCopy | None = None  # of the current affinity and of unread numbers
        # Numbers on the GPU, each with the function that will look at them on the host.
        self._unread: list[tuple[Tensor, Callable[[list[float]], None]]] = []
        self._copied = 0  # the number of these that are in the copy, from the first on

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget_all()

    def open(self, batch: Batch) -> None:
        """Begin a batch."""
        self._current = self._before = self._random_state = None
        self.batch = batch
        for listener in self._told():
            listener.begin_batch()

    def keep_random_state(self) -> None:
        """Let every step of the batch start from the current random state."""
        self._random_state = RandomState(self._reader.device)

    def move_to(self, plan: Plan) -> None:
        """Make this the step at hand, and prepare its forward pass."""
        self._current = plan
        if self._random_state is not None and plan.place > 0:
            self._random_state.replay()
        # Within one autocast block, the copies of the weights would be those from before the steps.
        torch.clear_autocast_cache()
        for listener in self._told():
            listener.begin_step()

    def close(self) -> None:
        """End the batch."""
        self.batch = self._before = self._random_state = None
        for listener in self._told():
            listener.end_batch()

    def begin_loss(self) -> None:
        """The losses of a step are handed over: its forward pass is done."""
        for listener in self._told():
            listener.begin_loss()

    def end_loss(self) -> None:
        """The loss to step on is about to be returned."""
        for listener in self._told():
            listener.end_loss()

    def ask(self, plan: Plan, model: MultiTaskModel | None) -> None:
        """Note that the loss of this step was asked for, and the model it comes from."""
        self._stepping = plan, model
        self._asked += 1

    def about_to_step(self, prepared: int) -> tuple[NextStep | None, int]:
        """What an :class:`Attachment` asks before each step of an optimizer.

        The answer is the step of a group that is about to be taken, None for a step of other losses
        after the loop; and a number, which is ``prepared`` in the next call.
        """
        if self._stepping is None:
            return None, prepared
        plan, model = self._stepping
        if self._asked == prepared and not (self.batch is not None and plan is self._current):
            return None, prepared
        heads = None if model is None else model.heads
        return NextStep(frozenset(plan.members), plan.group, heads), self._asked

    def forget_step(self) -> None:
        """Forget the last step: the next losses do not show what it did."""
        self._before = None

    def look(self) -> None:
        """Look at what has arrived from the batches before."""
        if len(self._unread) > self._copied:  # from a batch that did not reach its last group
            self._send(self._unread[0][0].device)
        # Several ranks must all find out at the same place that they differ.
        if self._copy is not None and (self._ranks.number > 1 or self._copy.ready()):
            self._read(self._copy)

    def matrix(self) -> Tensor:
        """The affinity ``[K, K]`` on the host, NaN where nothing is known; waits for it."""
        if self._copy is not None:
            return self._read(self._copy)
        return self._affinity.known().to("cpu")

    def check_weighed(self, losses: Tensor, members: Members) -> None:
        """Raise if the losses ``[n]`` of a group cannot be weighed, unless that must wait.

        On a GPU, and with several ranks, which check their means, :meth:`measure` does it.
        """
        waits = self._reader.later or self._ranks.number > 1
        if self._weighting is not None and self._weighting.checks_losses and not waits:
            self._weighting.check(losses.reshape(-1).tolist(), members)

    def measure(self, plan: Plan, batch: Batch, measured: Tensor) -> Tensor | None:
        """Take in the losses that a step needs, in task order; they show what the last step did.

        Returns:
            With several ranks the means over them, ``[K]``, NaN for tasks that the step does not
            need. None for a single rank.
        """
        if plan is not self._current:  # the batch was left, and another one has begun
            return None
        watch = partial(
            self.watch.look,
            members=plan.needed,
            own=plan.members,
            absent=batch.absent,
            follows=plan.observes and plan.place > 0,
        )
        self._look_soon(measured, watch)
        told = measured
        # Several ranks exchange the losses of every step, to notice steps on different groups.
        if plan.observes or self._ranks.number > 1:
            losses = self._mean_over_ranks(plan, batch, measured)
            if plan.observes:
                self._observe(plan, losses)
            if self._ranks.number > 1:
                told = losses  # the means, and NaN for the tasks that the step does not need
        given = plan.needed if told is measured else self._reader.everyone
        if self._weighting is not None:
            own = self._reader.select(told, given, plan.members)
            self._weighting.count(own, plan.members)
            if self._weighting.method.checks_losses and (
                self._reader.later or told is not measured
            ):
                self._look_soon(own, partial(self._weighting.check, members=plan.members))
        for listener in self._told():
            listener.losses(given, told)
        if plan.last and self._reader.later:
            self._send(measured.device)
        return None if told is measured else told

    def measure_gradients(
        self,
        plan: Plan,
        batch: Batch,
        losses: Losses,
        measured: Tensor,
        model: MultiTaskModel | None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take in the gradients of single tasks, before the backward pass of a step.

        ``measured`` are the losses that the step needs, in task order and without a graph; ``rows``
        the losses of the rows and their tasks, if they are known.
        """
        if plan is not self._current:
            return
        found = self._reader.with_graph(losses, plan.measures, plan.needed)
        with_graph = dict(zip(plan.measures, found, strict=True))
        if batch.factors is not None:
            with_graph = {k: loss * batch.factors[k].item() for k, loss in with_graph.items()}
        values = self._mean_over_ranks(plan, batch, measured)
        average = self._ranks.mean_gradients if self._ranks.number > 1 else None
        if rows is None:
            self._affinity.measure(with_graph, values, average, model)
        else:
            own, tasks = rows
            if batch.factors is not None:
                own = own * send_like(batch.factors, own)[tasks]
            self._affinity.measure(with_graph, values, average, model, (own, tasks))
        self._copy = None  # the affinity has changed since

    def means(self, plan: Plan, batch: Batch, needed: Members, measured: Tensor) -> Tensor | None:
        """The losses ``[K]`` over all ranks, bitwise the same on each; None for a single rank."""
        if self._ranks.number == 1:
            return None
        return self._mean_over_ranks(plan._replace(needed=needed), batch, measured)

    def _told(self) -> Sequence[Listener]:
        return self.listeners if self._ranks.first else ()

    def _observe(self, plan: Plan, losses: Tensor) -> None:
        """Show the affinity what the step before did, in the losses ``[K]`` before this one."""
        mask = self._reader.group(plan.members).mask
        if self._before is not None:
            members, before_mask, before = self._before
            self._affinity.observe(before, losses, before_mask, mask)
            if self._weighting is not None:
                self._weighting.observe_step(before, losses, members)
            self._copy = None  # the affinity has changed since
        self._before = _Step(plan.members, mask, losses)

    def _mean_over_ranks(self, plan: Plan, batch: Batch, measured: Tensor) -> Tensor:
        """The losses ``[K]`` over all ranks; NaN for the tasks that the step does not need."""
        losses = self._reader.spread(measured, plan.needed)
        if self._ranks.number == 1:
            return losses
        if batch.factors is not None:
            losses = losses * send_like(batch.factors, losses)
        mask = self._reader.group(plan.members).mask
        losses, votes = self._ranks.mean(losses, mask, batch.number)
        tasks = self._reader.names(plan.members)
        self._look_soon(votes, partial(self._ranks.check_votes, tasks=tasks))
        return losses

    def _look_soon(self, values: Tensor, look: Callable[[list[float]], None]) -> None:
        """Look at the values on the host: at once, or later if that would have to wait for them."""
        if self._reader.later:
            self._unread.append((values, look))
        else:
            look(values.tolist())

    def _send(self, device: torch.device) -> None:
        """Send the affinity and all unread numbers to the host, without waiting for them."""
        self._affinity.to(device)  # it is still on the host if it has never observed
        self._copy = HostCopy([self._affinity.known(), *(values for values, _ in self._unread)])
        self._copied = len(self._unread)

    def _read(self, copy: HostCopy) -> Tensor:
        """Wait for the copy and look at the numbers in it; the affinity matrix on the host."""
        matrix, *seen = copy.wait()
        self._affinity.note_known(matrix)
        looks = [look for _, look in self._unread[: self._copied]]
        del self._unread[: self._copied]
        self._copied = 0  # looked at once, however often the matrix is read
        for look, values in zip(looks, seen, strict=False):
            look(values.tolist())
        return matrix.float()
