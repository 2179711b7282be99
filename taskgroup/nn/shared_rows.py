"""A parameter whose elements belong to several tasks, such as one linear layer for all heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

__all__ = ["SharedRows", "zero_gradient"]


class SharedRows:
    """Holds the elements of a parameter that belong to tasks outside the group.

    An optimizer steps on whole parameters. So the elements of the tasks outside the group are set
    to zero during the step, values and gradients alike. After the step they are restored, together
    with the optimizer's state for them. This works for optimizers whose state has the shape of the
    parameter, and whose step on an element depends on that element alone: SGD, Adam and most
    others.

    Args:
        parameter: a parameter in the optimizer.
        owner: int64 tensor of the parameter's shape: the position of the task that each element
            belongs to, and -1 for elements of no task.
        n_tasks: the number of tasks, K.
    """

    def __init__(self, parameter: Tensor, owner: Tensor, n_tasks: int) -> None:
        self.parameter = parameter
        self._owner = owner
        self._n_tasks = n_tasks
        self._kept: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    def leave_out(self, inside: frozenset[int], optimizer: Optimizer, hold: bool) -> bool:
        """Keep the elements of tasks outside the group out of the step; True if they must return.

        With ``hold``, their values are kept out as well as their gradients. They return with
        :meth:`restore`, after the step.
        """
        parameter = self.parameter
        if not parameter.requires_grad:
            return False
        if parameter.grad is None:
            if not hold:
                zero_gradient(parameter, optimizer)
            return False
        if parameter.grad.is_sparse:
            raise RuntimeError(
                f"The parameter of shape {list(parameter.shape)}, whose rows belong to several "
                "tasks, has a sparse gradient: make the layer with sparse=False."
            )
        self._owner = self._owner.to(parameter.device, non_blocking=True)
        moves = torch.zeros(self._n_tasks + 1, dtype=torch.bool, device="cpu")
        moves[[*inside, -1]] = True  # -1: the elements of no task
        outside = ~moves.to(parameter.device, non_blocking=True)[self._owner]
        parameter.grad.masked_fill_(outside, 0)
        if not hold:
            return False
        state = {
            name: value.clone()
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        self._kept = outside, parameter.detach().clone(), state
        parameter.masked_fill_(outside, 0)  # or weight decay would change a new momentum
        return True

    def restore(self, optimizer: Optimizer) -> None:
        """Restore what :meth:`leave_out` kept."""
        assert self._kept is not None
        (outside, values, state), self._kept = self._kept, None
        parameter = self.parameter
        parameter.copy_(torch.where(outside, values, parameter))
        for name, value in optimizer.state.get(parameter, {}).items():
            if name in state:
                value.copy_(torch.where(outside, state[name], value))
            elif isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise RuntimeError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {list(value.shape)} for "
                    f"the parameter of shape {list(parameter.shape)}, whose rows belong to several "
                    "tasks, so the rows cannot be held apart: give every task a head of its own, "
                    "or take an optimizer that works element by element, such as Adam or SGD."
                )


def zero_gradient(parameter: Tensor, optimizer: Optimizer) -> None:
    """Set the gradient to zero for a step of this optimizer, in place if there is one."""
    if parameter.grad is not None:
        if parameter.grad.grad_fn is not None:
            parameter.grad.detach_()  # as zero_grad() does; refused for DDP's views of its buckets
        parameter.grad.requires_grad_(False).zero_()
    elif parameter.requires_grad and not isinstance(optimizer, SparseAdam):
        # SparseAdam takes sparse gradients alone, and moves only the rows that are in them. SGD's
        # momentum of sparse gradients is sparse, and torch cannot add a dense gradient to it.
        state = optimizer.state.get(parameter, {}).values()
        sparse = (own for own in state if isinstance(own, Tensor) and own.is_sparse)
        parameter.grad = torch.zeros_like(next(sparse, parameter))
