"""The inter-task affinity by its definition: step, look, go back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taskgroup.losses import Losses
from taskgroup.replay import RandomState

__all__ = ["lookahead_affinity"]


def lookahead_affinity(
    closure: Callable[[], Losses],
    optimizer: Optimizer,
    shared: nn.Module | Iterable[Tensor],
) -> Tensor:
    r"""Measures the inter-task affinity once, by stepping on each task and taking the step back.

    .. math::
        A_{ik} = 1 - \frac{L_k(\Theta_s - \Delta_i)}{L_k(\Theta_s)}

    with :math:`\Delta_i` the optimizer's step on the loss of task :math:`i`, of which the shared
    parameters :math:`\Theta_s` alone are moved (Fifty et al., "Efficiently Identifying Task
    Groupings for Multi-Task Learning", NeurIPS 2021). Afterwards everything is as it was, to the
    bit: parameters, gradients, the optimizer's state and the random state.

    It takes 2K forward and K backward passes. Every call of ``closure`` starts from the same
    random state, so that dropout draws the same masks. What a forward pass changes besides is not
    known here: keep BatchNorm's running statistics from moving, with ``model.eval()`` say.

    Args:
        closure: runs the model on one batch and returns the losses, ``{task: scalar}`` or a tensor
            ``[K]``, the same tasks at every call. It takes no backward pass.
        optimizer: whose step is measured; any whose ``step()`` needs no closure.
        shared: the parameters that the tasks share, or the module that holds them.

    Returns:
        Float32 ``[K, K]`` on the device of the losses; row i is the effect of stepping task i,
        column k the effect on task k. NaN where :math:`L_k` is not finite and positive.

    Raises:
        ValueError: if a loss is not a scalar with a graph, the tasks change from call to call, or
            the optimizer holds none of the shared parameters.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> target = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 2.0])}
        >>> closure = lambda: {t: (x - y).square().sum() for t, y in target.items()}
        >>> lookahead_affinity(closure, torch.optim.SGD([x], lr=0.25), [x])
        tensor([[ 0.7500, -0.2500],
                [-0.2500,  0.7500]])
    """
    moving = list(shared.parameters() if isinstance(shared, nn.Module) else shared)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moving = [parameter for parameter in moving if parameter.requires_grad]
    if not any(id(parameter) in held for parameter in moving):
        raise ValueError(
            "The optimizer holds none of the shared parameters: pass the one that trains the "
            "encoder, and the encoder's parameters as shared."
        )
    kept = _Kept(optimizer, moving)
    random_state = RandomState(moving[0].device)
    names: tuple[Any, ...] | None = None
    rows: list[Tensor] = []
    try:
        while names is None or len(rows) < len(names):
            random_state.replay()
            losses = closure()
            before = _stacked(losses).detach().double()
            if names is not None and _names(losses) != names:
                raise ValueError(
                    f"The closure returned losses of {list(names)} and then of "
                    f"{list(_names(losses))}: it must name the same tasks at every call."
                )
            names = _names(losses)
            loss = list(losses.values() if isinstance(losses, Mapping) else losses)[len(rows)]
            if not loss.requires_grad:
                raise ValueError(
                    f"The loss of task {names[len(rows)]!r} has no graph, so no step can be taken "
                    "on it; compute it with gradients on, from outputs that are not detached."
                )
            gradients = torch.autograd.grad(loss, moving, allow_unused=True)
            kept.clear_gradients()
            for parameter, gradient in zip(moving, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            kept.restore_parameters(besides=moving)  # weight decay, say, may move the others
            random_state.replay()
            with torch.no_grad():
                after = _stacked(closure()).double()
            kept.restore()
            valid = before.isfinite() & (before > 0)
            rows.append(torch.where(valid, 1 - after / before, torch.nan))
    finally:
        kept.restore()
        random_state.replay()
    return torch.stack(rows).float()


class _Kept:
    """All that a step changes, and the way back."""

    def __init__(self, optimizer: Optimizer, shared: list[Tensor]) -> None:
        self._optimizer = optimizer
        in_groups = [p for group in optimizer.param_groups for p in group["params"]]
        self._parameters = list({id(p): p for p in (*in_groups, *shared)}.values())
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._gradients = [parameter.grad for parameter in self._parameters]
        # Where a state is a tensor both it and its values are kept: others may hold it too.
        self._state = {
            parameter: {
                name: (value, value.clone() if isinstance(value, Tensor) else copy.deepcopy(value))
                for name, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }
        self._settings = [
            {name: copy.deepcopy(v) for name, v in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def restore_parameters(self, besides: list[Tensor] | None = None) -> None:
        left = {id(parameter) for parameter in besides or ()}
        for parameter, value in zip(self._parameters, self._values, strict=True):
            if id(parameter) not in left:
                parameter.copy_(value)

    @torch.no_grad()
    def restore(self) -> None:
        self.restore_parameters()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        state = self._optimizer.state
        for parameter in list(state):
            if parameter not in self._state:
                del state[parameter]
        for parameter, kept in self._state.items():
            restored: dict[str, Any] = {}
            for name, (value, copied) in kept.items():
                if isinstance(value, Tensor):
                    value.copy_(copied)
                    restored[name] = value
                else:
                    restored[name] = copy.deepcopy(copied)
            state[parameter] = restored
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(copy.deepcopy(settings))


def _names(losses: Losses) -> tuple[Any, ...]:
    return tuple(losses) if isinstance(losses, Mapping) else tuple(range(len(losses)))


def _stacked(losses: Losses) -> Tensor:
    if isinstance(losses, Mapping):
        for task, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                raise ValueError(f"The loss of task {task!r} must be a scalar tensor, got {loss}.")
        losses = torch.stack(list(losses.values()))
    if losses.dim() != 1 or len(losses) == 0:
        raise ValueError(
            f"The closure must return {{task: scalar}} or a tensor [K], got {list(losses.shape)}."
        )
    return losses
