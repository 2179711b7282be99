"""Weights of the losses of a group that a method finds while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from taskgroup._arguments import listed
from taskgroup.loop.host_copy import waits_for
from taskgroup.loop.loss_reader import send_like
from taskgroup.loop.rounds import Members
from taskgroup.methods import METHODS
from taskgroup.methods.loss_space import WeighingMethod
from taskgroup.nn.outside import Attachment

__all__ = ["Weighting"]


class Weighting:
    """Turns the losses of a group into the loss to step on, by the rule of a method.

    Args:
        method: the method that was given as ``weights``.
        tasks: the K task names.
        reduction: ``"sum"`` or ``"mean"``, which divides by the size of the group.
    """

    def __init__(self, method: object, tasks: tuple[str, ...], reduction: str) -> None:
        self.method = _checked(method, tasks)
        self._tasks = tasks
        self._reduction = reduction
        self.attachment: Attachment | None = None  # prepares the steps on the learned parameters

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attachment": None}  # a copy is not attached

    def learned_in(self, optimizers: Sequence[Optimizer]) -> dict[str, list[Tensor]] | None:
        """``{task: [its part of each learned parameter]}``, as ``attach()`` takes heads.

        None if the method learns nothing, or in other optimizers.
        """
        held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        learned = self.method.parameters()
        if not learned or not held.issuperset(map(id, learned)):
            return None
        return {task: [own[k] for own in learned] for k, task in enumerate(self._tasks)}

    def check(self, own: Tensor, members: Members) -> None:
        """Raise if the losses of a group cannot be weighed, before anything changes."""
        attachment = self.attachment
        if self.method.parameters() and (attachment is None or attachment.removed):
            name = type(self.method).__name__
            raise RuntimeError(
                f"{name} learns a weight per task, and no optimizer is attached that trains them: "
                "pass method.parameters() to the optimizer together with the model's, and call "
                "groups.attach(optimizer, heads), so that a step moves the weights of its own "
                "group alone."
            )
        if self.method.checks_losses and not waits_for(own.device):
            self.method.check(own.detach().reshape(-1).tolist(), members)

    def total(
        self, own: Tensor, means: Tensor | None, members: Members, factors: Tensor | None
    ) -> Tensor:
        """The loss to step on, a scalar with a graph.

        Args:
            own: the losses ``[n]`` of the group with their graph, or a scalar for a single task.
            means: the losses ``[K]`` over all ranks; None for a single rank.
            members: the tasks of the group.
            factors: as in :meth:`LossReader.total`.
        """
        own = own.reshape(-1)
        device = self.method.device
        at = torch.tensor(members, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
        values = own.detach() if means is None else means[at.to(means.device)]
        total, weights = self.method.weigh_group(values.to(device, torch.float32), at)
        if factors is not None:
            own = own * send_like(factors[list(members)], own)
        # The method sees the means over the ranks, so all ranks find the same weights; the model
        # gets the gradients of the losses of its own rank.
        value = total.to(own.device, own.dtype)
        value = value + (weights.to(own.device, own.dtype) * (own - values)).sum()
        return value / len(members) if self._reduction == "mean" else value

    def state(self) -> dict[str, Any]:
        """The memory of the method."""
        return self.method.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state` returned."""
        self.method.load_state_dict(state)


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
            f"weights takes a method that weighs the losses of any of the tasks: {listed(known)}. "
            f"{name} needs all tasks in one step; call {name}.backward(losses) in a loop without "
            "groups."
        )
    if method.tasks != tasks:
        raise ValueError(
            f"weights is a method of the tasks {listed(method.tasks)}, these are {listed(tasks)}; "
            "name the same tasks in the same order."
        )
    return method
