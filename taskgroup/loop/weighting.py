"""Weights of the losses of a group that a method finds while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from taskgroup._arguments import listed
from taskgroup.affinity.base import Affinity
from taskgroup.loop.loss_reader import LossReader, send_like
from taskgroup.loop.rounds import Members
from taskgroup.methods import METHODS
from taskgroup.methods.loss_space import WeighingMethod
from taskgroup.nn.outside import Attachment

__all__ = ["Weighting"]


class Weighting:
    """Turns the losses of a group into the loss to step on, by the rule of a method.

    Args:
        method: the method that was given as ``weights``.
        reader: reads the losses; it knows the tasks and the reduction.
    """

    def __init__(self, method: object, reader: LossReader) -> None:
        self.method = _checked(method, reader.tasks)
        self._reader = reader
        self._tasks = reader.tasks
        self._counted: set[int] = set()  # tasks whose losses this batch has counted
        self.attachment: Attachment | None = None  # prepares the steps on the learned parameters

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attachment": None}  # a copy is not attached

    @property
    def checks_losses(self) -> bool:
        """Whether :meth:`check` may raise."""
        return self.method.checks_losses

    @property
    def name(self) -> str:
        """The name of the method's class."""
        return type(self.method).__name__

    def check_observed(self, affinity: Affinity, takes_one_step: bool) -> None:
        """Raise if the method needs the effect of steps, and no batch shows it."""
        if not self.method.observes_step or len(self._tasks) == 1:
            return
        if not affinity.reads_steps:
            raise ValueError(
                f"{self.name} learns from the losses before and after a step, and with "
                f"{type(affinity).__name__} no batch compares them; take tg.ProximalAffinity(), or "
                "weights that need no second step, such as tg.methods.UW."
            )
        if takes_one_step:
            raise ValueError(
                f"{self.name} learns from the losses before and after a step, and with this "
                "grouping and groups_per_batch a batch takes one step alone. Step on several "
                f"groups per batch, or call {self.name}.backward(losses) in a loop without groups."
            )

    def learned_in(self, optimizers: Sequence[Optimizer]) -> dict[str, list[Tensor]] | None:
        """``{task: [its part of each learned parameter]}``, as ``attach()`` takes heads.

        None if the method learns nothing, or in other optimizers.
        """
        held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        learned = self.method.parameters()
        if not learned or not held.issuperset(map(id, learned)):
            return None
        return {task: [own[k] for own in learned] for k, task in enumerate(self._tasks)}

    def begin_batch(self) -> None:
        """Begin a batch."""
        self._counted.clear()
        self.method.begin_batch()

    def check_attached(self) -> None:
        """Raise if the method learns parameters, and no attached optimizer holds them."""
        attachment = self.attachment
        if self.method.parameters() and (attachment is None or attachment.removed):
            raise RuntimeError(
                f"{self.name} learns a weight per task, and no attached optimizer trains them: "
                "pass method.parameters() to the optimizer together with the model's, and call "
                "groups.attach(optimizer, heads), so that a step moves the weights of its own "
                "group alone."
            )

    def check(self, values: list[float], members: Members) -> None:
        """Raise if the method cannot weigh the losses of a group."""
        self.method.check(values, members)

    def count(self, losses: Tensor, members: Members) -> None:
        """Take in the losses ``[n]`` of a group before its step, once per task and batch."""
        if self._counted.issuperset(members):  # a batch of one group takes the same step twice
            return
        self._counted.update(members)
        at = self._at(members)
        self.method.count(self._sent(losses), at)

    def observe_step(self, before: Tensor, after: Tensor, members: Members) -> None:
        """Take in the losses ``[K]`` before and after a step on a group."""
        if self.method.observes_step:
            at = self._at(members)
            self.method.observe_step(self._sent(before)[at], self._sent(after)[at], at)

    def total(
        self, own: Tensor, means: Tensor | None, members: Members, factors: Tensor | None
    ) -> Tensor:
        """The loss to step on, a scalar with a graph.

        Args:
            own: the losses ``[n]`` of the group with their graph, or a scalar for a single task.
            means: the losses ``[n]`` over all ranks; None for a single rank.
            members: the tasks of the group.
            factors: as in :meth:`LossReader.total`.
        """
        own = own.reshape(-1)
        values = own.detach() if means is None else means
        total, weights = self.method.weigh_group(self._sent(values), self._at(members))
        if factors is not None:
            own = own * send_like(factors[list(members)], own)
        # The model gets the gradients of the losses of its own rank, the method those of the means.
        value = total.to(own.device, own.dtype)
        value = value + (weights.to(own.device, own.dtype) * (own - values)).sum()
        return value / len(members) if self._reader.reduction == "mean" else value

    def _sent(self, losses: Tensor) -> Tensor:
        """The losses as the method takes them."""
        return losses.to(self.method.device, torch.float32, non_blocking=True)

    def _at(self, members: Members) -> Tensor:
        """The positions of the tasks on the device of the method."""
        return self._reader.group(members).positions.to(self.method.device, non_blocking=True)


def _checked(method: object, tasks: tuple[str, ...]) -> WeighingMethod:
    """The method; raise if it cannot weigh the losses of a group."""
    name = method.__name__ if isinstance(method, type) else type(method).__name__
    if isinstance(method, type):
        raise TypeError(
            f"weights takes an object, got the class {name}; call it, as in "
            f"tg.methods.{name}(model.encoder, tasks)."
        )
    if not isinstance(method, WeighingMethod):
        known = [kind.__name__ for kind in METHODS.values() if issubclass(kind, WeighingMethod)]
        raise TypeError(
            f"weights takes a method that can weigh the losses of some of the tasks: "
            f"{', '.join(known)}. {name} needs all tasks in one step; call {name}.backward(losses) "
            "in a loop without groups."
        )
    if method.tasks != tasks:
        raise ValueError(
            f"weights is a method of the tasks {listed(method.tasks)}, these are {listed(tasks)}; "
            "name the same tasks in the same order."
        )
    return method
