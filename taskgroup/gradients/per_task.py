"""The gradients of single tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from taskgroup._arguments import parameters_of
from taskgroup._losses import Losses, check_graph, losses_by_task
from taskgroup.gradients.through_grad import gradients_through_grad
from taskgroup.gradients.vectorised import check_vanishing, cotangents, explained, is_constant
from taskgroup.ops._sharded import any_sharded

__all__ = ["task_gradients"]


def task_gradients(
    losses: Losses | Sequence[Tensor],
    params: Iterable[Tensor],
    *,
    retain_graph: bool = False,
    batched: bool = False,
) -> list[list[Tensor | None]]:
    """Compute the gradient of each task's loss on the parameters.

    This takes one backward pass per task, and neither reads nor writes ``.grad``. The last pass
    frees the graph unless ``retain_graph`` is True. In data-parallel training these are the
    gradients of this rank's samples. A gradient has the strides of its parameter, as ``.grad``
    does, because fused optimizers assume it. The gradient of an embedding with ``sparse=True`` is a
    sparse tensor, while the ops take dense ones.

    Sharded parameters (FSDP2's DTensors) are not in the graph of a loss: FSDP puts their gradients
    into ``.grad``, sharded and averaged over the ranks. Each task's gradients are taken from there,
    and the previous ``.grad`` is put back. Parameters that are not among ``params``, such as those
    of the heads, accumulate the gradients of all tasks in ``.grad``: call ``zero_grad()``
    afterwards. List the parameters before the forward pass, which may replace them by unsharded
    ones.

    Args:
        losses: K scalars: ``{task: loss}``, a sequence, or one tensor ``[K]``.
        params: T different parameters, usually those that the tasks share. Frozen ones are skipped.
        retain_graph: keep the graph for a later backward pass.
        batched: compute all gradients in one vectorised backward pass (``torch.vmap``). It is
            faster for small models, but takes the memory of K + 1 passes, runs the backward pass of
            every head for every task, and needs a batching rule for every operation of the model.
            A parameter that only some tasks reach gets zeros instead of None for the others.

    Returns:
        ``[K][T]`` gradients, in the order of the losses and the parameters; None if a task does not
        reach a parameter or the parameter is frozen. If the losses are stacked in one tensor, a
        parameter that any task reaches gets zeros instead of None for the others.

    Raises:
        ValueError: if there is no loss or parameter, a parameter is listed twice, a loss is not a
            scalar with a graph (the message names the task), or ``batched`` is True and parameters
            are sharded.
        TypeError: if ``losses`` is not a mapping, a sequence or a tensor.
        RuntimeError: if the backward pass can run only once (a compiled model) or only writes to
            ``.grad`` (reentrant checkpointing); the message names the setting. With ``batched``, if
            torch cannot vectorise the backward pass, or a part of a gradient does not depend on the
            losses; compute the gradients without ``batched`` then.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> bias = torch.tensor(0.5, requires_grad=True)
        >>> task_gradients({"depth": (x * x).sum(), "normal": x.sum() + bias}, [x, bias])
        [[tensor([2., 4.]), None], [tensor([1., 1.]), tensor(1.)]]
    """
    scalars = scalars_with_graph(losses)
    params = parameters_of("params", params)
    if not params:
        raise ValueError("params is empty: name at least one parameter that the tasks share.")
    seen: dict[Tensor, int] = {}
    for t, parameter in enumerate(params):
        if (first := seen.setdefault(parameter, t)) != t:
            raise ValueError(
                f"params lists one parameter twice, as entries {first} and {t}: its gradients "
                "would count twice. Pass list(dict.fromkeys(params))."
            )
    active = [parameter for parameter in params if parameter.requires_grad]
    if not active:
        return [[None] * len(params) for _ in scalars]
    found: list[list[Tensor | None]]
    if any_sharded(params):
        if batched:
            raise ValueError(
                "Sharded parameters have no vectorised backward pass: call task_gradients(losses, "
                "params) without batched=True."
            )
        found = gradients_through_grad(scalars, params, retain_graph=retain_graph)
        if all(gradient is None for own in found for gradient in own):
            raise ValueError(
                "No loss reaches any of the sharded parameters: list the parameters before the "
                "forward pass, which may replace them."
            )
        return found
    if batched:
        stacked = torch.stack(scalars)
        with explained(vectorised=True):
            rows = torch.autograd.grad(
                stacked,
                active,
                cotangents(stacked),
                retain_graph=retain_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
        check_vanishing([is_constant(r[-1]) for r in rows if r is not None])
        found = [[None if r is None else r[k] for r in rows] for k in range(len(scalars))]
    else:
        found = []
        own: Sequence[Tensor | None]
        for k, scalar in enumerate(scalars):
            keep = retain_graph or k < len(scalars) - 1
            with explained():
                own = torch.autograd.grad(scalar, active, retain_graph=keep, allow_unused=True)
            found.append(list(own))
    result = []
    for own in found:
        by_parameter = {p: laid_out(g, p) for g, p in zip(own, active, strict=True)}
        result.append([by_parameter.get(parameter) for parameter in params])
    return result


def scalars_with_graph(losses: Losses | Sequence[Tensor]) -> list[Tensor]:
    """The losses one by one, each checked to be a scalar with a graph."""
    if isinstance(losses, Mapping | Tensor | str) or not isinstance(losses, Iterable):
        by_task = losses_by_task(losses)
    else:
        by_task = losses_by_task(dict(enumerate(losses)))
    check_graph(by_task)
    return list(by_task.values())


def laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient as ``.grad`` would hold it, with the strides of the parameter.

    Autograd may return a tensor that is transposed, expanded or lazily negated. Fused optimizers on
    the CPU read the memory in order, so they would step along wrong numbers.
    """
    if gradient is None or gradient.layout != torch.strided:
        return gradient
    gradient = gradient.resolve_conj().resolve_neg()
    if gradient.is_contiguous() and parameter.is_contiguous():  # nearly always
        return gradient
    if _strides(gradient) == _strides(parameter) and 0 not in _strides(gradient):
        return gradient
    # If the parameter is not dense itself, torch chooses the strides.
    like = torch.empty_like(parameter.detach(), dtype=gradient.dtype, device=gradient.device)
    return gradient if _strides(gradient) == _strides(like) else like.copy_(gradient)


def _strides(tensor: Tensor) -> list[int]:
    """The strides of all dimensions larger than 1."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
