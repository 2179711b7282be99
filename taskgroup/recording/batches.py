"""Collects what a loop tells about its batches, without making the loop wait."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from taskgroup._listeners import Listener
from taskgroup.recording.clock import HostTensors, StepClock

__all__ = ["BatchRecord", "Batches"]


class BatchRecord(NamedTuple):
    """One batch, all of it on the host.

    Attributes:
        batch: its number, from 1.
        losses: by the position of the task, when the batch first needed them.
        steps: the number of its steps.
        lr: the learning rates of the optimizers that stepped, group by group, at the last step.
        extra: what was noted of it when it ended.
        matrix: the affinity ``[K, K]`` after it, NaN where it was never observed; None if it was
            not asked for.
    """

    batch: int
    losses: dict[int, float]
    steps: int
    lr: list[float]
    extra: dict[str, Any]
    matrix: Tensor | None


class _Open:
    """The batch at hand."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.losses: list[tuple[Sequence[int], Tensor]] = []
        self.lr: dict[int, list[float]] = {}  # by the id of the optimizer
        self.ended = False


class Batches(Listener):
    """Listens to a loop, and hands on every batch once it has ended and is on the host.

    A batch ends when the next one begins, since a trainer may drop the iterator before the step.
    From a GPU the losses and the affinity are copied in one transfer, which is read when the next
    batch ends, or later if it has not arrived.

    Args:
        note: called when a batch ends, with its number; returns what to note of it, and the
            affinity ``[K, K]`` if it is due.
        take: called with every batch, in order.
        joint: whether a batch is one step whose beginning nobody tells.

    Attributes:
        batch: the number of batches begun.
        clock: times the sections of the batches.
    """

    def __init__(
        self,
        note: Callable[[int], tuple[dict[str, Any], Tensor | None]],
        take: Callable[[BatchRecord], None],
        joint: bool,
    ) -> None:
        self.batch = 0
        self.clock = StepClock()
        self._note = note
        self._take = take
        self._joint = joint
        self._open: _Open | None = None
        self._over = False
        # Ended batches with what was noted of them, and their losses and affinity.
        self._arriving: deque[tuple[_Open, dict[str, Any], HostTensors, HostTensors]] = deque()
        self._hooks = _hooks(weakref.ref(self))

    @property
    def whole(self) -> int:
        """The number of batches that have ended: all but the one at hand."""
        return self.batch - (self._open is not None and not self._open.ended)

    # What the loop tells.

    def begin_batch(self) -> None:  # noqa: D102 (inherited)
        self._begin_batch("between batches")

    def begin_step(self) -> None:  # noqa: D102 (inherited)
        self.clock.begin_step()

    def begin_loss(self) -> None:  # noqa: D102 (inherited)
        if self._joint and (self._open is None or self._open.losses):
            self._begin_batch("other")  # its forward pass as well
        self.clock.begin_loss()

    def losses(self, members: Sequence[int], values: Tensor) -> None:  # noqa: D102 (inherited)
        self.clock.on(values.device)
        if self._open is not None:
            self._open.losses.append((members, values))

    def end_loss(self) -> None:  # noqa: D102 (inherited)
        self.clock.end_loss()
        if self._joint and self._open is not None:
            self._open.ended = True

    def end_batch(self) -> None:  # noqa: D102 (inherited)
        self.clock.end_batch()
        if self._open is not None:
            self._open.ended = True

    def begin_optimizer(self, optimizer: Optimizer) -> None:
        """An optimizer, of this loop or another, begins a step."""
        if self.clock.begin_optimizer() and self._open is not None:
            self._open.lr[id(optimizer)] = [_number(g["lr"]) for g in optimizer.param_groups]

    def end_optimizer(self) -> None:
        """An optimizer has stepped."""
        self.clock.end_optimizer()

    # What is handed on.

    def flush(self) -> None:
        """Hand on all batches that have ended; waits for those on their way from a GPU."""
        if self._open is not None and self._open.ended:
            self._end()
        self._hand_on(wait=True)

    def close(self) -> None:
        """Hand on all batches, and listen to optimizers no more."""
        self._over = True
        self._end()
        self._hand_on(wait=True)
        self._hooks()

    def _begin_batch(self, until_now: str) -> None:
        if self._over:
            return
        self._end()
        self.clock.begin_batch(until_now)
        self.batch += 1
        self._open = _Open(self.batch)

    def _end(self) -> None:
        """End the batch at hand, and send it to the host."""
        ended, self._open = self._open, None
        if ended is not None:
            extra, matrix = self._note(ended.batch)
            losses = HostTensors([values for _, values in ended.losses])
            affinity = HostTensors([] if matrix is None else [matrix])
            self._arriving.append((ended, extra, losses, affinity))
        self._hand_on(wait=False)

    def _hand_on(self, wait: bool) -> None:
        while self._arriving and (wait or all(sent.ready() for sent in self._arriving[0][2:])):
            ended, extra, sent, affinity = self._arriving.popleft()
            losses: dict[int, float] = {}
            for (members, _), values in zip(ended.losses, sent.wait(), strict=True):
                for k, value in zip(members, values.tolist(), strict=True):
                    if k not in losses or math.isnan(losses[k]):
                        losses[k] = value
            lr = [rate for rates in ended.lr.values() for rate in rates]
            matrix = next(iter(affinity.wait()), None)
            steps = len(ended.losses)
            self._take(BatchRecord(ended.batch, losses, steps, lr, extra, matrix))


def _number(lr: float | Tensor) -> float:
    """A learning rate; NaN if the host would have to wait for it."""
    if isinstance(lr, Tensor):
        return float(lr) if lr.device.type == "cpu" else math.nan
    return float(lr)


def _hooks(batches: weakref.ref[Batches]) -> Callable[[], None]:
    """Let the batches hear of the steps of all optimizers; returns what ends it.

    The hooks do not keep the batches alive.
    """

    def before(optimizer: Optimizer, *_: Any) -> None:
        heard = batches()
        if heard is not None and not torch.compiler.is_compiling():
            heard.begin_optimizer(optimizer)

    def after(*_: Any) -> None:
        heard = batches()
        if heard is not None and not torch.compiler.is_compiling():
            heard.end_optimizer()

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    owner = batches()
    assert owner is not None

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return weakref.finalize(owner, remove)
