"""The inter-task affinity by its definition: take a step, compare the losses, undo the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taskgroup._arguments import parameters_of
from taskgroup._kept import Kept
from taskgroup._losses import Losses, check_graph, losses_by_task
from taskgroup._random_state import RandomState
from taskgroup.gradients.per_task import task_gradients

__all__ = ["lookahead_affinity"]


def lookahead_affinity(
    closure: Callable[[], Losses],
    optimizer: Optimizer,
    shared: nn.Module | Iterable[Tensor],
) -> Tensor:
    r"""Measure the inter-task affinity once, by stepping on each task and undoing the step.

    .. math::
        A_{ik} = 1 - \frac{L_k(\Theta_s - \Delta_i)}{L_k(\Theta_s)}

    with :math:`\Delta_i` the optimizer's step on the loss of task :math:`i`, which moves only the
    shared parameters :math:`\Theta_s` (Fifty et al., "Efficiently Identifying Task Groupings for
    Multi-Task Learning", NeurIPS 2021). Afterwards parameters, gradients, the state of the
    optimizer and torch's random state are restored bitwise. The parameters, the tensors of the
    optimizer's state and its lists and dicts stay the same objects.

    It takes 2K forward and K backward passes. Every call of ``closure`` starts from the same random
    state, so that dropout draws the same masks. Anything else that a forward pass changes is not
    restored: prevent updates of BatchNorm's running statistics, for instance with ``model.eval()``.
    For mixed precision, run the model within ``torch.autocast`` in the closure; losses are not
    scaled, so prefer bfloat16 to float16.

    Args:
        closure: a function that runs the model on one batch, without a backward pass, and returns
            the losses, ``{task: scalar}`` or a tensor ``[K]``, of the same tasks at every call.
        optimizer: the optimizer whose step is measured, which a trainer may have wrapped. Its
            ``step()`` must not need a closure, as those of L-BFGS and SAM do.
        shared: the parameters that the tasks share, or the module that holds them.

    Returns:
        Float32 ``[K, K]`` on the device of the losses; row i is the effect of stepping task i,
        column k the effect on task k. NaN if :math:`L_k` is not finite and positive.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, ``shared`` holds anything but tensors, or
            ``closure`` returns neither a mapping nor a tensor.
        ValueError: if a loss is not a scalar with a graph, the tasks change from call to call, the
            optimizer holds none of the shared parameters, or its step needs a closure.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> target = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 2.0])}
        >>> closure = lambda: {t: (x - y).square().sum() for t, y in target.items()}
        >>> lookahead_affinity(closure, torch.optim.SGD([x], lr=0.25), [x])
        tensor([[ 0.7500, -0.2500],
                [-0.2500,  0.7500]])
    """
    if not callable(closure) or isinstance(closure, type):
        raise TypeError(
            "lookahead_affinity takes a closure, a function without arguments that returns the "
            f"losses on one batch, lambda: criterion(model(images), labels); got {closure!r}."
        )
    optimizer = _unwrapped(optimizer)
    moving = _moving(shared, optimizer)
    kept = Kept([optimizer], moving)
    random_states = [RandomState(device) for device in {p.device: None for p in moving}]

    def run() -> dict[Any, Tensor]:
        for state in random_states:
            state.replay()
        torch.clear_autocast_cache()  # which holds copies of the weights from before a step
        return losses_by_task(closure(), what="The losses that closure returns")

    names: tuple[Any, ...] | None = None
    rows: list[Tensor] = []
    try:
        while names is None or len(rows) < len(names):
            with torch.enable_grad():
                losses = run()
            before = _stacked(losses).detach()
            if names is not None and tuple(losses) != names:
                raise ValueError(
                    f"The closure returned losses of {list(names)} and then of {list(losses)}: it "
                    "must name the same tasks at every call."
                )
            names = tuple(losses)
            task = names[len(rows)]
            check_graph({task: losses[task]}, "no step can be taken on it")
            (gradients,) = task_gradients([losses[task]], moving)
            kept.clear_gradients()
            for parameter, gradient in zip(moving, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()  # may be shared
            _step(optimizer)
            kept.restore_parameters(besides=moving)  # weight decay may move others
            with torch.no_grad():
                after = _stacked(run())
            kept.restore()
            valid = before.isfinite() & (before > 0)
            rows.append(torch.where(valid, 1 - after / before, torch.nan))
    finally:
        kept.restore()
        for state in random_states:
            state.replay()
        torch.clear_autocast_cache()
    return torch.stack(rows).float()


def _stacked(losses: dict[Any, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).double()


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, without the wrappers of a trainer."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "lookahead_affinity takes the optimizer whose step it measures, got "
            f"{type(optimizer).__name__}; pass a torch.optim.Optimizer."
        )
    return optimizer


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:  # each optimizer raises its own
        if "closure" not in str(error).lower():
            raise
        name = type(optimizer).__name__
        raise ValueError(
            f"The step of {name} needs a closure, but lookahead_affinity calls step() without one: "
            "pass another optimizer on the same parameters, such as "
            f"torch.optim.SGD(model.parameters(), lr) or the one that {name} wraps."
        ) from error


def _moving(shared: nn.Module | Iterable[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """The shared parameters that require a gradient."""
    found = parameters_of("shared", shared)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moving = list(dict.fromkeys(parameter for parameter in found if parameter.requires_grad))
    if not any(id(parameter) in held for parameter in moving):
        raise ValueError(
            "The optimizer holds none of the shared parameters: pass the one that trains the "
            "encoder, and the encoder's parameters as shared."
        )
    return moving
