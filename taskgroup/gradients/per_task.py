"""The gradients of single tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

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
    """The gradient of every task's loss on the parameters, each on its own.

    One backward pass per task. ``.grad`` is neither read nor written. The graph is freed with the
    last pass, unless it is to be kept. In data-parallel training these are the gradients of this
    rank's samples. Strides are those of the parameter, as in ``.grad``: fused optimizers read past
    other ones. The gradient of an embedding with ``sparse=True`` is a sparse tensor; the ops take
    dense ones.

    Parameters that are sharded (FSDP2's DTensors) are not in the graph of a loss: FSDP itself puts
    their gradients into ``.grad``, sharded and averaged over the ranks. Each task's is taken from
    there and what was there is put back. The ``.grad`` of parameters that are not among ``params``,
    those of the heads, takes the gradients of all tasks in: call ``zero_grad()`` afterwards. List
    the parameters before the forward, after which whole ones may stand in their place.

    Args:
        losses: K scalars: ``{task: loss}``, a sequence, or one tensor ``[K]``.
        params: T parameters, those the tasks share as a rule; each once. Frozen ones are passed
            over.
        retain_graph: keep the graph for a backward pass that comes after.
        batched: all tasks in one vectorised backward pass (``torch.vmap``). It is faster where the
            model is small, takes the memory of K + 1 passes at once, runs every head's backward
            pass for every task, and needs an operation with a batching rule for each of the model.
            A parameter that only some of the tasks reach gets zeros instead of None for the rest.

    Returns:
        ``[K][T]`` gradients, in the order of the losses and the parameters; None where a task does
        not reach a parameter, or it is frozen. A stacked tensor reaches whatever one of its losses
        reaches: zeros stand there for the others.

    Raises:
        ValueError: if there is no loss or parameter, a parameter is listed twice, or a loss is not
            a scalar with a graph; the sentence names the task. If ``batched`` is asked for and
            parameters are sharded.
        RuntimeError: if the backward pass can run only once (a compiled model), or only writes to
            ``.grad`` (reentrant checkpointing); the sentence names the setting. With ``batched``,
            if torch cannot vectorise the backward pass, or a part of a gradient does not depend on
            the losses: take the gradients one by one then.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> bias = torch.tensor(0.5, requires_grad=True)
        >>> task_gradients({"depth": (x * x).sum(), "normal": x.sum() + bias}, [x, bias])
        [[tensor([2., 4.]), None], [tensor([1., 1.]), tensor(1.)]]
    """
    scalars = scalars_with_graph(losses)
    params = list(params)
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
                "forward, which puts others in their place."
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
    found = [[_laid_out(g, p) for g, p in zip(own, active, strict=True)] for own in found]
    if len(active) == len(params):
        return found
    result = []
    for own in found:
        gradients = iter(own)
        result.append([next(gradients) if p.requires_grad else None for p in params])
    return result


def scalars_with_graph(losses: Losses | Sequence[Tensor]) -> list[Tensor]:
    """The losses one by one, checked."""
    by_task = losses_by_task(
        losses if isinstance(losses, Mapping | Tensor) else dict(enumerate(losses))
    )
    check_graph(by_task)
    return list(by_task.values())


def _laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient as ``.grad`` holds it, with the strides of the parameter.

    Autograd may hand out one that is transposed or expanded, or that is to be negated when read.
    Fused optimizers on the CPU, which read memory in order, would step along other numbers.
    """
    if gradient is None or gradient.layout != torch.strided:
        return gradient
    gradient = gradient.resolve_conj().resolve_neg()
    if gradient.is_contiguous() and parameter.is_contiguous():  # nearly always
        return gradient
    if _strides(gradient) == _strides(parameter) and 0 not in _strides(gradient):
        return gradient
    # Where the parameter is not dense itself, torch chooses.
    like = torch.empty_like(parameter.detach(), dtype=gradient.dtype, device=gradient.device)
    return gradient if _strides(gradient) == _strides(like) else like.copy_(gradient)


def _strides(tensor: Tensor) -> list[int]:
    """Those that matter."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
