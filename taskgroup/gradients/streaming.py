"""The Gram matrix of gradients that are never held all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taskgroup.gradients.per_task import _scalars
from taskgroup.gradients.through_grad import _nodes
from taskgroup.gradients.vectorised import (
    _check_batched,
    _check_vanishing,
    _constant,
    _cotangents,
    _explained,
    _is_constant,
)
from taskgroup.ops._gradient_list import check_number_of_tasks
from taskgroup.ops._sharded import any_sharded
from taskgroup.ops.task_gram import task_gram

__all__ = ["streaming_task_gram"]


def streaming_task_gram(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    params: Iterable[Tensor],
    *,
    retain_graph: bool = False,
) -> Tensor:
    r"""The Gram matrix of the tasks' gradients, without ever holding all gradients.

    One vectorised backward pass (``torch.vmap``) for all tasks; as soon as the K gradients on one
    parameter are there their inner products are added up and they are dropped. Besides what the
    backward pass itself needs, K + 1 times the largest parameter is held, where
    ``task_gram(task_gradients(losses, params))`` holds K times all of them. The price: every head's
    backward pass runs for every task, and every operation of the model needs a batching rule.

    Args:
        losses: K scalars: ``{task: loss}``, a sequence, or one tensor ``[K]``; K from 1 to 1024.
        params: the parameters, those the tasks share as a rule; one that is listed twice counts
            once. Frozen ones are passed over.
        retain_graph: keep the graph for a backward pass that comes after.

    Returns:
        ``[K, K]``, row i column j :math:`\langle g_i, g_j \rangle` (its real part, where parameters
        are complex); of the dtype that :func:`taskgroup.task_gram` gives.

    Raises:
        ValueError: if a loss is not a scalar with a graph, or no parameter is reached.
        RuntimeError: as for :func:`task_gradients` with ``batched``.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> streaming_task_gram([(x * x).sum(), x.sum()], [x])
        tensor([[20.,  6.],
                [ 6.,  2.]])
    """
    scalars = _scalars(losses)
    n_tasks = len(scalars)
    check_number_of_tasks(n_tasks)
    active = list(dict.fromkeys(parameter for parameter in params if parameter.requires_grad))
    if any_sharded(active):
        raise ValueError(
            "Sharded parameters have no vectorised backward pass: call "
            "task_gram(task_gradients(losses, params))."
        )
    grams: list[Tensor] = []
    constant: list[Tensor] = []

    def collect(rows: Tensor) -> None:
        if rows.is_complex():
            rows = torch.view_as_real(rows.resolve_conj())
        constant.append(_is_constant(rows[-1]))
        gram = task_gram([[row] for row in rows[:-1].unbind()])
        if not grams:
            grams.append(gram.double())
        else:
            grams[0] += gram
        dtypes.add(gram.dtype)

    dtypes: set[torch.dtype] = set()

    def hook(rows: Tensor, keep: bool) -> Tensor:
        nothing: Tensor = _Collect.apply(rows, collect)  # type: ignore[no-untyped-call]
        return rows if keep else nothing

    # What is computed passes its gradient on to what it was computed from.
    hooks = [p.register_hook(partial(hook, keep=not p.is_leaf)) for p in active]
    try:
        stacked = torch.stack(scalars)
        # Torch's own rule for cdist drops the batch dimension (functorch), without a word.
        hooks += [node.register_hook(partial(_check_batched, node)) for node in _nodes([stacked])]

        def backward(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(
                stacked, active, cotangent, retain_graph=retain_graph, allow_unused=True
            )
            return cotangent

        if active:
            with _explained(vectorised=True):
                torch.func.vmap(backward)(_cotangents(stacked))
    finally:
        for handle in hooks:
            handle.remove()
    if not grams:
        raise ValueError("No loss reaches any of the parameters: name those the tasks share.")
    _check_vanishing(constant)
    return grams[0].to(torch.float64 if torch.float64 in dtypes else torch.float32)


class _Collect(torch.autograd.Function):
    """Hands the gradients of all tasks on one parameter over, and lets go of them."""

    @staticmethod
    def forward(gradient: Tensor, collect: Callable[[Tensor], None]) -> Tensor:
        raise _constant()  # a gradient without the dimension of the tasks

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, gradient: Tensor, collect: Callable[[Tensor], None]
    ) -> tuple[Tensor, int]:
        collect(gradient.movedim(in_dims[0], 0))
        # Autograd wants a gradient back: one of the right shape that holds a single number.
        return gradient.new_zeros(()).expand(gradient.shape), in_dims[0]
