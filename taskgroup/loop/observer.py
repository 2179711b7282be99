"""From the losses of the steps to the affinity and to the host, without stopping the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taskgroup.affinity.base import Affinity, Losses
from taskgroup.affinity.gradient import GradientAffinity
from taskgroup.affinity.proximal import ProximalAffinity
from taskgroup.loop.group import Group
from taskgroup.loop.host_copy import HostCopy
from taskgroup.loop.losses import LossReader, LossWatch, send_like
from taskgroup.loop.ranks import Ranks

__all__ = ["Observer"]


class _Step(NamedTuple):
    """A step taken on this batch, whose effect shows in the next losses."""

    mask: Tensor  # bool [K]
    losses: Tensor  # [K], before the step


class Observer:
    """Hands the losses of every step to the affinity, and looks at them on the host.

    On a GPU nothing waits for them: the affinity and all that is to be looked at are sent to the
    host behind the last forward pass of a batch, and read when they have arrived.

    Args:
        reader: of the losses.
        affinity: that learns from them.
        ranks: over which they are averaged.
    """

    def __init__(self, reader: LossReader, affinity: Affinity, ranks: Ranks) -> None:
        self.watch = LossWatch(reader.tasks)
        self._reader = reader
        self._affinity = affinity
        self._ranks = ranks
        self._before: _Step | None = None
        self._copy: HostCopy | None = None  # of the affinity as it is, and what was not read
        # On the GPU, and what is to look at them on the host.
        self._unread: list[tuple[Tensor, Callable[[list[float]], None]]] = []
        self._copied = 0  # of these, the first that are in the copy

    def __getstate__(self) -> dict[str, Any]:
        """A copy stands between two batches, and what was on its way to the host is not copied."""
        return {**self.__dict__, "_before": None, "_copy": None, "_unread": [], "_copied": 0}

    def forget_step(self) -> None:
        """The next losses show no step of this batch."""
        self._before = None

    def forget_all(self) -> None:
        """What is on its way belongs to another state."""
        self._before = self._copy = None
        self._unread.clear()
        self._copied = 0

    def look(self) -> None:
        """Look at what has arrived from the batches before."""
        if len(self._unread) > self._copied:  # of a batch that did not get to its last group
            self._send(self._unread[0][0].device)
        # Of several ranks each must find out at the same place that they differ.
        if self._copy is not None and (self._ranks.number > 1 or self._copy.ready()):
            self._read(self._copy)

    def matrix(self) -> Tensor:
        """The affinity ``[K, K]`` on the host, NaN where nothing is known; waits for it."""
        if self._copy is not None:
            return self._read(self._copy)
        return self._affinity.known().to("cpu")

    def measure(self, group: Group, measured: Tensor, batch: int) -> None:
        """Take in the losses from before a step: they show what the last step did.

        Args:
            group: that is stepped on.
            measured: the losses that it needs, in the order of the tasks.
            batch: its number, by which ranks compare their steps.
        """
        needed, absent = group._needed, group._batch.absent
        later = self._reader.later
        follows = group.observes and not group.first
        if later:
            self._unread.append(
                (measured, lambda seen: self.watch.look(seen, needed, absent, follows))
            )
        else:
            self.watch.look(measured.tolist(), needed, absent, follows)
        if group.observes or self._ranks.number > 1:  # over ranks, to know that all step alike
            losses = self._mean_over_ranks(group, measured, batch)
            if group.observes:
                self._observe(group, losses)
        if later and group.last:
            self._send(measured.device)

    def measure_gradients(self, group: Group, losses: Losses, measured: Tensor, batch: int) -> None:
        """Take in the gradients of single tasks, before the backward pass of the step."""
        assert isinstance(self._affinity, GradientAffinity)
        with_graph = dict(
            zip(
                group._measures,
                self._reader.with_graph(losses, group._measures, group._needed),
                strict=True,
            )
        )
        if (factors := group._batch.factors) is not None:
            with_graph = {k: loss * factors[k].item() for k, loss in with_graph.items()}
        values = self._mean_over_ranks(group, measured, batch)
        average = self._ranks.mean_gradients if self._ranks.number > 1 else None
        self._affinity.measure(with_graph, values, average, group.model)
        self._copy = None  # it is not of the affinity as it is any more

    def _observe(self, group: Group, losses: Tensor) -> None:
        """What the step before did, seen in the losses ``[K]`` before this one."""
        assert isinstance(self._affinity, ProximalAffinity)
        if self._before is not None:
            self._affinity.observe(self._before.losses, losses, self._before.mask)
            self._copy = None  # it is not of the affinity as it is any more
        self._before = _Step(group.mask, losses)

    def _mean_over_ranks(self, group: Group, measured: Tensor, batch: int) -> Tensor:
        """The losses ``[K]`` over all ranks; NaN for the tasks that the group does not need."""
        losses = self._reader.spread(measured, group._needed)
        if self._ranks.number == 1:
            return losses
        if group._batch.factors is not None:
            losses = losses * send_like(group._batch.factors, losses)
        losses, votes = self._ranks.mean(losses, group.mask, batch)
        tasks = group.tasks
        if self._reader.later:
            self._unread.append((votes, lambda seen: self._ranks.check_votes(seen, tasks)))
        else:
            self._ranks.check_votes(votes.tolist(), tasks)
        return losses

    def _send(self, device: torch.device) -> None:
        """Send the affinity and all that was not read on their way, without waiting for them."""
        self._affinity.to(device)  # where it is not before it has observed
        self._copy = HostCopy([self._affinity.known(), *(values for values, _ in self._unread)])
        self._copied = len(self._unread)

    def _read(self, copy: HostCopy) -> Tensor:
        """Wait for the copy and look at the numbers in it; the affinity matrix on the host."""
        matrix, *seen = copy.wait()
        looks = [look for _, look in self._unread[: self._copied]]
        del self._unread[: self._copied]
        self._copied = 0  # looked at once, however often the matrix is read
        for look, values in zip(looks, seen, strict=False):
            look(values.tolist())
        return matrix.float()
