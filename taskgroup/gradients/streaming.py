"""The Gram matrix of the tasks' gradients without holding all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taskgroup._arguments import parameters_of
from taskgroup._graph import graph_nodes
from taskgroup._losses import Losses
from taskgroup.gradients.per_task import scalars_with_graph
from taskgroup.gradients.vectorised import (
    check_batched,
    check_vanishing,
    constant_error,
    cotangents,
    explained,
    is_constant,
)
from taskgroup.ops._gradient_list import check_number_of_tasks
from taskgroup.ops._sharded import any_sharded
from taskgroup.ops.task_gram import task_gram

__all__ = ["streaming_task_gram"]


def streaming_task_gram(
    losses: Losses | Sequence[Tensor],
    params: Iterable[Tensor],
    *,
    retain_graph: bool = False,
) -> Tensor:
    r"""Compute the Gram matrix of the tasks' gradients without holding all of them at once.

    One vectorised backward pass (``torch.vmap``) covers all tasks. As soon as the K gradients on
    one parameter are computed, their inner products are added to the matrix and the gradients are
    freed. Besides the memory of the backward pass itself, this takes K + 1 times the largest
    parameter, while ``task_gram(task_gradients(losses, params))`` takes K times all parameters. In
    return, the backward pass of every head runs for every task, and every operation of the model
    needs a batching rule.

    Args:
        losses: K scalars: ``{task: loss}``, a sequence, or one tensor ``[K]``; K from 1 to 1024.
        params: the parameters, usually those that the tasks share. One that is listed twice counts
            once; frozen ones are skipped.
        retain_graph: keep the graph for a later backward pass.

    Returns:
        ``[K, K]``; row i, column j is :math:`\langle g_i, g_j \rangle`, or its real part if
        parameters are complex. The dtype is that of :func:`taskgroup.task_gram`.

    Raises:
        ValueError: if a loss is not a scalar with a graph, no loss reaches a parameter, or
            parameters are sharded.
        TypeError: if ``losses`` is not a mapping, a sequence or a tensor.
        RuntimeError: as for :func:`task_gradients` with ``batched``.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> streaming_task_gram([(x * x).sum(), x.sum()], [x])
        tensor([[20.,  6.],
                [ 6.,  2.]])
    """
    scalars = scalars_with_graph(losses)
    n_tasks = len(scalars)
    check_number_of_tasks(n_tasks)
    active = list(dict.fromkeys(p for p in parameters_of("params", params) if p.requires_grad))
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
        constant.append(is_constant(rows[-1]))
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

    # A tensor that is not a leaf has to pass its gradient on.
    hooks = [p.register_hook(partial(hook, keep=not p.is_leaf)) for p in active]
    try:
        stacked = torch.stack(scalars)
        # Torch's own batching rule for cdist silently drops the batch dimension.
        hooks += [
            node.register_hook(partial(check_batched, node)) for node in graph_nodes([stacked])
        ]

        def backward(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(
                stacked, active, cotangent, retain_graph=retain_graph, allow_unused=True
            )
            return cotangent

        if active:
            with explained(vectorised=True):
                torch.func.vmap(backward)(cotangents(stacked))
    finally:
        for handle in hooks:
            handle.remove()
    if not grams:
        raise ValueError("No loss reaches any of the parameters: name those the tasks share.")
    check_vanishing(constant)
    return grams[0].to(torch.float64 if torch.float64 in dtypes else torch.float32)


class _Collect(torch.autograd.Function):
    """Passes the gradients of all tasks on one parameter to a function, and frees them."""

    @staticmethod
    def forward(gradient: Tensor, collect: Callable[[Tensor], None]) -> Tensor:
        raise constant_error()  # runs only if the gradient has no dimension for the tasks

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, gradient: Tensor, collect: Callable[[Tensor], None]
    ) -> tuple[Tensor, int]:
        collect(gradient.movedim(in_dims[0], 0))
        # Autograd expects a gradient: this one has the right shape, but holds a single number.
        return gradient.new_zeros(()).expand(gradient.shape), in_dims[0]
