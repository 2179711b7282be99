"""Loops from which no affinity can be learned: warnings, and one error."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from typing import Any

import numpy as np
from torch import Tensor

from taskgroup._arguments import listed
from taskgroup.affinity.base import Losses
from taskgroup.loop.batch import ZERO_LOSS
from taskgroup.loop.rounds import Members, Plan

__all__ = ["LossWatch", "Misuse", "refuse_accumulation"]

_LEFT_EARLY = 20  # consecutive batches, after which it is no accident
_STILL, _STILL_BATCHES = 20, 3  # steps in a row that change no loss, and batches, for a warning
_TRAINED = 20  # batches with a task, after which it counts as trained


class Misuse:
    """Warns of batches left early, of one forward for all groups, and of tasks that never meet.

    Args:
        tasks: the K task names.
        learns: whether the partition follows from the affinity; otherwise tasks need not meet.
    """

    def __init__(self, tasks: tuple[str, ...], learns: bool) -> None:
        self._tasks = tasks
        self._meets = learns  # whether to look for tasks that never meet; until all have met
        self._met = np.eye(len(tasks), dtype=bool)  # pairs that were labelled in the same batch
        self._labelled = np.zeros(len(tasks), dtype=np.int64)  # batches
        self._batches = 0
        self._left_early = 0  # consecutive batches that were left before their last group
        self._given: weakref.ref[Tensor] | None = None  # the first loss given to the last group
        self._told_of_one_forward = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None}  # a weak reference cannot be copied

    def check_batch(self, present: Members) -> None:
        """Look at the batches so far, and at the labelled tasks of the next one."""
        self._given = None
        if self._left_early == _LEFT_EARLY:
            self._left_early += 1  # said once in a row
            warnings.warn(
                f"The last {_LEFT_EARLY} batches of several steps were left before their last "
                "group, so some groups were never stepped on and little was observed. If your "
                "trainer takes one step per batch, take the steps yourself (in Lightning: "
                "self.automatic_optimization = False), or choose groups_per_batch=1 with "
                "GradientAffinity.",
                stacklevel=3,  # the line of the loop
            )
        if self._meets and (pairs := self._strangers(present)):
            self._meets = False
            warnings.warn(
                f"These pairs of tasks have been trained in {_TRAINED} batches or more each, and "
                f"never in the same one: {listed(pairs)}. Nothing is known of what they do to each "
                "other, so they never share a group. To learn it, draw a mini-batch of every data "
                "set in each step and pass all losses to group.loss() together; or choose the "
                "groups yourself, with grouping=tg.Fixed([...]). The page 'Several data sets' of "
                "the documentation has programs for both. This is said once.",
                stacklevel=3,
            )

    def check_step(self, plan: Plan) -> None:
        """Count a batch of several steps as left early until its last step begins."""
        if plan.place == 0:
            self._left_early += not plan.last
        elif plan.last:
            self._left_early = 0

    def check_losses(self, losses: Losses) -> None:
        """Look at the first losses that are given to a group."""
        if self._told_of_one_forward:
            return
        first = losses if isinstance(losses, Tensor) else next(iter(losses.values()))
        if not isinstance(first, Tensor):
            return  # the loss of a task that this step does not need may be anything
        if self._given is not None and self._given() is first and first.grad_fn is not None:
            self._told_of_one_forward = True
            warnings.warn(
                "group.loss() was given the same losses as for the group before, so no forward "
                "pass was run in between: move the forward pass into the loop over the groups. "
                "Otherwise every step after the first follows gradients from before it, and no "
                "affinity can be observed. This is said once.",
                stacklevel=3,  # the call of group.loss
            )
        self._given = weakref.ref(first)

    def _strangers(self, present: Members) -> list[str]:
        """Count a batch; now and then, the pairs of trained tasks that have never met."""
        at = list(present)
        self._labelled[at] += 1
        self._met[np.ix_(at, at)] = True
        self._batches += 1
        self._meets = not self._met.all()
        if self._batches % _TRAINED:
            return []
        trained = self._labelled >= _TRAINED
        strangers = np.argwhere(np.triu(~self._met & trained & trained[:, None]))
        return [f"{self._tasks[i]} and {self._tasks[k]}" for i, k in strangers.tolist()]


class LossWatch:
    """Warns of losses that no affinity can be measured from, once per task or kind.

    A step is seen by the losses after it on the same batch. Where a batch has no second step
    (``Together``, one labelled task) or its forward passes differ anyway (dropout without
    ``replay_rng``), a step that was forgotten is not noticed.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._warned: set[int] = set()
        self._last: list[float] = []
        self._own: Members = ()  # the tasks that were stepped on since
        self._still = 0  # consecutive steps that changed no loss
        self._still_batches = 0  # that these steps are from
        self._told_of_still = False
        # Steps so far that changed losses of their own groups alone; None once another changed.
        self._apart: int | None = 0

    def look(
        self,
        values: list[float],
        members: Members,
        own: Members = (),
        absent: frozenset[int] = frozenset(),
        follows: bool = False,
    ) -> None:
        """Warn of the first NaN, infinite, zero or negative loss of each task in ``members``.

        Also warn, once, if many steps in a row change no loss, and if they change no loss of
        another group: ``follows`` tells that a step was taken since the last losses, which were of
        the same tasks. The tasks in ``own`` are stepped on next. The tasks in ``absent`` have no
        label on this rank, so their losses are zero.
        """
        follows = follows and len(values) == len(self._last)  # not if the group before was skipped
        if follows and not self._told_of_still:
            self._check_moves(values)
        elif self._still:
            self._still_batches += 1
        if follows and self._apart is not None:
            self._check_others(values, members)
        self._own = own
        self._last = values
        if values and min(values) > 0.0 and sum(values) < math.inf:  # false if one is NaN
            return
        for k, value in zip(members, values, strict=True):
            if 0.0 < value < math.inf or k in self._warned or (k in absent and value == 0.0):
                continue
            self._warned.add(k)
            if k in absent:
                meaning = f"on a rank where it has no label. {ZERO_LOSS}"
            else:
                meaning = (
                    "its affinity is measured only from finite, positive losses. Check its data "
                    "and loss, or add a constant to the loss."
                )
            warnings.warn(
                f"The loss of task {self._tasks[k]!r} is {value}: {meaning} This warning is shown "
                "once per task.",
                stacklevel=5,  # the loop's call of group.loss
            )

    def _check_moves(self, values: list[float]) -> None:
        """Warn if many steps, in several batches, changed no loss."""
        if values != self._last:
            self._still = self._still_batches = 0
            return
        self._still += 1
        # A batch of many steps alone may be the first of a warm-up of the learning rate from zero.
        if self._still < _STILL or self._still_batches < _STILL_BATCHES:
            return
        self._told_of_still = True
        self._apart = None  # which would be said of the same loop
        warnings.warn(
            f"The last {self._still} steps changed no loss, so no affinity can be observed. Run "
            "the forward pass inside the loop over the groups, call backward() and then "
            "optimizer.step() for every group, and check that the optimizer holds the parameters "
            "of the model and that its learning rate is above zero. If a GradScaler skips the "
            "steps, the gradients are not finite. This warning is shown once.",
            stacklevel=6,  # the loop's call of group.loss
        )

    def _check_others(self, values: list[float], members: Members) -> None:
        """Warn if the first steps changed losses of their own groups alone."""
        assert self._apart is not None
        own = frozenset(self._own)
        moved = [k for k, v, last in zip(members, values, self._last, strict=True) if v != last]
        if not own.issuperset(moved):
            self._apart = None
        elif moved and len(own) < len(members):
            self._apart += 1
            if self._apart == _STILL:
                self._apart = None
                warnings.warn(
                    f"The first {_STILL} steps changed the losses of their own groups alone, so "
                    "the affinity between tasks stays zero, and no tasks will share a group. Check "
                    "that the parameters that the tasks share require gradients and are in an "
                    "optimizer that takes a step, and that the losses are float32: a small change "
                    "of a bfloat16 loss is rounded off. This warning is shown once.",
                    stacklevel=6,  # the loop's call of group.loss
                )


def refuse_accumulation() -> None:
    """Raise if Accelerate accumulates gradients, which would mix the groups.

    Accelerate counts batches, or calls of ``accumulate()``, and knows nothing of groups: between
    two steps it would add up the gradients of several groups. Hugging Face's Trainer uses it.
    """
    accelerate = sys.modules.get("accelerate.state")  # only where the loop has imported it
    if accelerate is None:
        return
    state = accelerate.GradientState()
    if state.num_steps > 1 or not state.sync_gradients:
        raise RuntimeError(
            "Accelerate (or an earlier Accelerator of this process) is set to "
            "gradient_accumulation_steps above 1, which would mix the groups: leave it at 1 "
            "(accelerator.gradient_accumulation_steps = 1), and in each of the n micro-batches of "
            "a group call accelerator.backward(group.loss(losses, share=1/n)), then "
            "optimizer.step() once. In Hugging Face's Trainer this is not possible: use larger "
            "batches."
        )
