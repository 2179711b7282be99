"""Turns the losses of a training loop into what a step needs.

That is the loss to step on, with a graph, and the losses of the observed tasks, without one. All
checks are made before anything changes, and none of them synchronises with a GPU.
"""

from __future__ import annotations

import math
import numbers
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taskgroup._arguments import listed
from taskgroup._losses import Losses, check_graph, check_losses, check_one_device
from taskgroup.loop.host_copy import waits_for
from taskgroup.loop.rounds import Members
from taskgroup.ops._plain import read_scalars

__all__ = ["LossReader", "send_like"]

# More than the groups that recur in a run, such as those of 1000 single tasks.
_GROUPS_KEPT = 4096


class GroupTensors(NamedTuple):
    """The tensors of a group on the device of the losses, created once per group."""

    mask: Tensor  # bool [K]
    positions: Tensor  # int64 [n]
    weights: Tensor | None  # float64 [n]; None where all are 1


class LossReader:
    """Reads losses, ``{task: scalar}`` or one tensor in task order.

    Args:
        tasks: the K task names.
        weights: the weights of the losses, ``{task: weight}`` or one per task; None is 1 for each.
        reduction: ``"sum"`` or ``"mean"`` over the losses of a group.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        weights: Mapping[str, float] | Sequence[float] | None,
        reduction: str,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")
        self.tasks = tasks
        self.everyone: Members = tuple(range(len(tasks)))
        self.device: torch.device | None = None  # of the losses, once known
        self.later = False  # reading a loss on the host would wait for the device
        self._known = frozenset(tasks)
        self.weights = _checked_weights(weights, tasks)
        self.reduction = reduction
        self._kept: dict[Members, GroupTensors] = {}

    def names(self, members: Members) -> tuple[str, ...]:
        """The tasks at these positions."""
        return tuple(self.tasks[k] for k in members)

    def forget_device(self) -> None:
        """Forget the device; the next call to :meth:`read` sets it."""
        self.device = None
        self._kept.clear()

    def group(self, members: Members) -> GroupTensors:
        """The tensors of a group, on the device of the losses."""
        kept = self._kept.get(members)
        if kept is None:
            if len(self._kept) >= _GROUPS_KEPT:
                self._kept.clear()
            positions = torch.tensor(members, dtype=torch.int64, device="cpu")
            mask = torch.zeros(len(self.tasks), dtype=torch.bool, device="cpu")
            mask[positions] = True
            weights = None
            if self.weights is not None:
                own = [self.weights[k] for k in members]
                weights = self._send(torch.tensor(own, dtype=torch.float64, device="cpu"))
            kept = GroupTensors(self._send(mask), self._send(positions), weights)
            self._kept[members] = kept
        return kept

    def _send(self, tensor: Tensor) -> Tensor:
        """Send to the device of the losses without waiting, since new groups appear in training."""
        return tensor.to(self.device, non_blocking=True)

    def read(
        self,
        losses: Losses,
        members: Members,
        needed: Members,
    ) -> tuple[Tensor, Tensor]:
        """Check the losses, and take what a step needs of them.

        Args:
            losses: ``{task: scalar}``, or one tensor of all K tasks or of those in ``needed``.
            members: the tasks to step on.
            needed: the tasks to measure, which include ``members``.

        Returns:
            The losses ``[n]`` of ``members`` with their graph, or a scalar for a single task; and a
            copy of the losses of ``needed`` without a graph. Both are float32 or float64.
        """
        if isinstance(losses, Tensor):
            own, measured = self._read_stacked(losses, members, needed)
        else:
            own, measured = self._read_named(losses, members, needed)
        return _at_least_float32(own), _at_least_float32(measured)

    def total(self, own: Tensor, members: Members, factors: Tensor | None = None) -> Tensor:
        """The weighted sum (or mean) of the losses of a group, a scalar with a graph.

        Args:
            own: the losses of ``members``, as :meth:`read` returned them.
            members: the tasks of the group.
            factors: float64 ``[K]`` on the host, multiplied with the losses; None is 1 for each.
        """
        if self.weights is not None:
            weights = self.group(members).weights
            assert weights is not None
            own = own * weights.to(own.dtype)
        if factors is not None:
            own = own * send_like(factors[list(members)], own)
        if own.dim() > 0:
            own = own.mean() if self.reduction == "mean" else own.sum()
        return own

    def with_graph(self, losses: Losses, members: Members, needed: Members) -> list[Tensor]:
        """The losses of ``members`` one by one, with their graph, of losses that :meth:`read` took.

        Raise if one has no graph.
        """
        if isinstance(losses, Tensor):
            stacked = len(losses) == len(self.tasks)
            return [losses[k if stacked else bisect_left(needed, k)] for k in members]
        found = {self.tasks[k]: losses[self.tasks[k]] for k in members}
        check_graph(
            found,
            "this step cannot measure its gradient",
            "call the MultiTaskModel with group=group, or compute the losses of the tasks in "
            "group.graph with gradients on",
        )
        return list(found.values())

    def spread(self, measured: Tensor, needed: Members) -> Tensor:
        """The losses ``[K]`` of all tasks, NaN for those not in ``needed``."""
        if len(needed) == len(self.tasks):
            return measured
        losses = measured.new_full((len(self.tasks),), math.nan)
        return losses.index_copy_(0, self.group(needed).positions, measured)

    def _read_named(
        self, losses: Mapping[str, Tensor], members: Members, needed: Members
    ) -> tuple[Tensor, Tensor]:
        measured = None
        if len(needed) == len(self.tasks):  # the usual case
            measured = read_scalars(losses, self.tasks)
        checked = measured is not None
        try:
            mine = [losses[self.tasks[k]] for k in members]
            if measured is None:
                values = mine if members == needed else [losses[self.tasks[k]] for k in needed]
                measured = torch.stack(values).detach()
            own = torch.stack(mine) if len(mine) > 1 else mine[0].clone()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            self._explain(losses, members, needed)
            raise
        if not all(value.requires_grad for value in mine) or not (
            checked
            or (
                isinstance(losses, Mapping)
                and self._known.issuperset(losses)
                and measured.dim() == 1
                and measured.is_floating_point()
            )
        ):
            self._explain(losses, members, needed)
        self._settle_on(measured.device)
        return own, measured

    def _explain(self, losses: Losses, members: Members, needed: Members) -> None:
        """Raise an error that says what is wrong with the losses."""
        names = self.names(needed)
        check_losses(losses, self.tasks, names, names="group.observed")
        own = self.names(members)
        if isinstance(losses, Tensor):
            losses = dict.fromkeys(own, losses)
        else:
            check_one_device({task: losses[task] for task in names})
        group = f"the group {listed(own)} cannot be stepped on"
        check_graph({task: losses[task] for task in own}, group)

    def _read_stacked(
        self, losses: Tensor, members: Members, needed: Members
    ) -> tuple[Tensor, Tensor]:
        if (
            losses.shape not in ((len(self.tasks),), (len(needed),))
            or not losses.is_floating_point()
            or not losses.requires_grad
        ):
            self._explain(losses, members, needed)
        self._settle_on(losses.device)
        given = self.everyone if len(losses) == len(self.tasks) else needed
        # Copies: compiled models may write their next output over this one.
        return self.select(losses, given, members), self.select(losses.detach(), given, needed)

    def select(self, losses: Tensor, given: Members, wanted: Members) -> Tensor:
        """Copy the losses of the ``wanted`` tasks from those of the ``given`` tasks."""
        if wanted == given:
            return losses.clone()
        # By index: a mask would be read on the host, and multiplying by 0 keeps NaN.
        if given == self.everyone:
            return losses.index_select(0, self.group(wanted).positions)
        places = [bisect_left(given, k) for k in wanted]
        index = torch.tensor(places, dtype=torch.int64, device="cpu")
        return losses.index_select(0, self._send(index))

    def _settle_on(self, device: torch.device) -> None:
        if self.device is None:
            self.forget_device()  # masks made before the first loss are on the CPU
            self.device = device
            self.later = waits_for(device)
        elif device != self.device:
            raise ValueError(
                f"The losses are on {device}, those before were on {self.device}; keep all losses "
                "on one device."
            )


def _checked_weights(
    weights: Mapping[str, float] | Sequence[float] | None, tasks: tuple[str, ...]
) -> list[float] | None:
    if weights is None:
        return None
    wanted = (
        "weights takes {task: weight}, a list of one number per task, or a method such as "
        "tg.methods.UW(model.encoder, tasks)"
    )
    if isinstance(weights, str) or not isinstance(weights, Mapping | Iterable):
        raise TypeError(f"{wanted}; got {weights!r}.")
    if isinstance(weights, Mapping):
        if differing := sorted(set(weights) ^ set(tasks), key=repr):
            raise ValueError(
                f"weights must name every task and no other; {listed(differing)} are missing or "
                "unknown."
            )
        given = [weights[task] for task in tasks]
    else:
        given = list(weights)
        if len(given) != len(tasks):
            raise ValueError(f"weights has {len(given)} entries for {len(tasks)} tasks.")
    for task, weight in zip(tasks, given, strict=True):
        scalar = isinstance(weight, Tensor | np.ndarray) and weight.ndim == 0
        if not (scalar or isinstance(weight, numbers.Real)) or isinstance(weight, bool):
            raise TypeError(f"{wanted}; the weight of task {task!r} is {weight!r}.")
    floats = [float(weight) for weight in given]
    for task, weight in zip(tasks, floats, strict=True):
        if not 0.0 <= weight < math.inf:
            raise ValueError(
                f"The weight of task {task!r} must be finite and not negative, got {weight}."
            )
    return floats


def send_like(values: Tensor, like: Tensor) -> Tensor:
    """Send to the device of ``like``, with its dtype, without waiting for the device."""
    return values.to(like.device, like.dtype, non_blocking=True)


def _at_least_float32(losses: Tensor) -> Tensor:
    return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
