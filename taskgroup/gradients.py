"""Gradients of single tasks on shared parameters, and what their inner products tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskgroup.ops import task_gram
from taskgroup.ops._sharded import any_sharded

__all__ = ["conflicts", "pareto_stationarity", "streaming_task_gram", "task_gradients"]

# How far from optimal the weights of pareto_stationarity may be, relative to the longest gradient.
_TOLERANCE = 1e-12


def task_gradients(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    params: Iterable[Tensor],
    *,
    retain_graph: bool = False,
    batched: bool = False,
) -> list[list[Tensor | None]]:
    """The gradient of every task's loss on the parameters, each on its own.

    One backward pass per task. ``.grad`` is neither read nor written. The graph is freed with the
    last pass, unless it is to be kept. In data-parallel training these are the gradients of this
    rank's samples.

    Parameters that are sharded (FSDP2's DTensors) are not in the graph of a loss: FSDP itself puts
    their gradients into ``.grad``, sharded and averaged over the ranks. Each task's is taken from
    there and what was there is put back. The ``.grad`` of parameters that are not among ``params``,
    those of the heads, takes the gradients of all tasks in: call ``zero_grad()`` afterwards. List
    the parameters before the forward, after which whole ones may stand in their place.

    Args:
        losses: K scalars: ``{task: loss}``, a sequence, or one tensor ``[K]``.
        params: T parameters, those the tasks share as a rule. Frozen ones are passed over.
        retain_graph: keep the graph for a backward pass that comes after.
        batched: all tasks in one vectorised backward pass (``torch.vmap``). It is faster where the
            model is small, takes the memory of K passes at once, runs every head's backward pass
            for every task, and needs an operation with a batching rule for each of the model. A
            parameter that only some of the tasks reach gets zeros instead of None for the rest.

    Returns:
        ``[K][T]`` gradients, in the order of the losses and the parameters; None where a task does
        not reach a parameter, or it is frozen. A stacked tensor reaches whatever one of its losses
        reaches: zeros stand there for the others.

    Raises:
        ValueError: if there is no loss or parameter, or a loss is not a scalar with a graph; the
            sentence names the task. If ``batched`` is asked for and parameters are sharded.
        RuntimeError: if the model was compiled so that its backward pass can run only once; the
            sentence names the setting.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> bias = torch.tensor(0.5, requires_grad=True)
        >>> task_gradients({"depth": (x * x).sum(), "normal": x.sum() + bias}, [x, bias])
        [[tensor([2., 4.]), None], [tensor([1., 1.]), tensor(1.)]]
    """
    scalars = _scalars(losses)
    params = list(params)
    if not params:
        raise ValueError("params is empty: name at least one parameter that the tasks share.")
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
        eye = torch.eye(len(scalars), dtype=stacked.dtype, device=stacked.device)
        with _explained():
            rows = torch.autograd.grad(
                stacked,
                active,
                eye,
                retain_graph=retain_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
        found = [[None if r is None else r[k] for r in rows] for k in range(len(scalars))]
    else:
        found = []
        own: Sequence[Tensor | None]
        for k, scalar in enumerate(scalars):
            keep = retain_graph or k < len(scalars) - 1
            with _explained():
                own = torch.autograd.grad(scalar, active, retain_graph=keep, allow_unused=True)
            found.append(list(own))
    if len(active) == len(params):
        return found
    result = []
    for own in found:
        gradients = iter(own)
        result.append([next(gradients) if p.requires_grad else None for p in params])
    return result


def gradients_through_grad(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Iterable[Tensor] = (),
    *,
    retain_graph: bool = False,
) -> list[list[Tensor | None]]:
    """The same by way of ``.grad``, where FSDP puts the gradients of sharded parameters.

    Args:
        losses: K scalars.
        params: T parameters.
        others: parameters that the tasks reach besides; their ``.grad`` is put back as well.
        retain_graph: keep the graph for a backward pass that comes after.
    """
    kept = [(parameter, parameter.grad) for parameter in (*params, *others)]
    found: list[list[Tensor | None]] = []
    try:
        for k, loss in enumerate(losses):
            for parameter, _ in kept:
                parameter.grad = None
            with _explained():
                loss.backward(retain_graph=retain_graph or k < len(losses) - 1)
            found.append([parameter.grad for parameter in params])
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    return found


def streaming_task_gram(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    params: Iterable[Tensor],
    *,
    retain_graph: bool = False,
) -> Tensor:
    r"""The Gram matrix of the tasks' gradients, without ever holding all gradients.

    One vectorised backward pass (``torch.vmap``) for all tasks; as soon as the K gradients on one
    parameter are there their inner products are added up and they are dropped. Besides what the
    backward pass itself needs, K times the largest parameter is held, where
    ``task_gram(task_gradients(losses, params))`` holds K times all of them. The price: every head's
    backward pass runs for every task, and every operation of the model needs a batching rule.

    Args:
        losses: K scalars: ``{task: loss}``, a sequence, or one tensor ``[K]``.
        params: the parameters, those the tasks share as a rule. Frozen ones are passed over.
        retain_graph: keep the graph for a backward pass that comes after.

    Returns:
        ``[K, K]``, row i column j :math:`\langle g_i, g_j \rangle`; of the dtype that
        :func:`taskgroup.task_gram` gives.

    Raises:
        ValueError: if a loss is not a scalar with a graph, or no parameter is reached.
        RuntimeError: as for :func:`task_gradients`.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> streaming_task_gram([(x * x).sum(), x.sum()], [x])
        tensor([[20.,  6.],
                [ 6.,  2.]])
    """
    scalars = _scalars(losses)
    active = [parameter for parameter in params if parameter.requires_grad]
    grams: list[Tensor] = []

    def collect(rows: Tensor) -> None:
        gram = task_gram([[row] for row in rows.unbind()])
        if not grams:
            grams.append(gram.double())
        else:
            grams[0] += gram
        dtypes.add(gram.dtype)

    dtypes: set[torch.dtype] = set()

    def hook(rows: Tensor) -> Tensor:
        nothing: Tensor = _Collect.apply(rows, collect)  # type: ignore[no-untyped-call]
        return nothing

    hooks = [parameter.register_hook(hook) for parameter in active]
    try:
        stacked = torch.stack(scalars)

        def backward(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(
                stacked, active, cotangent, retain_graph=retain_graph, allow_unused=True
            )
            return cotangent

        eye = torch.eye(len(scalars), dtype=stacked.dtype, device=stacked.device)
        if active:
            with _explained():
                torch.func.vmap(backward)(eye)
    finally:
        for handle in hooks:
            handle.remove()
    if not grams:
        raise ValueError("No loss reaches any of the parameters: name those the tasks share.")
    return grams[0].to(torch.float64 if torch.float64 in dtypes else torch.float32)


class _Collect(torch.autograd.Function):
    """Hands the gradients of all tasks on one parameter over, and lets go of them."""

    @staticmethod
    def forward(gradient: Tensor, collect: Callable[[Tensor], None]) -> Tensor:
        raise NotImplementedError("gradients are collected under vmap alone")

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


def conflicts(gram: Tensor) -> Tensor:
    r"""Cosines between the gradients of tasks; where one is negative, the two conflict.

    .. math::
        C_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}

    Args:
        gram: ``[K, K]``, as :func:`taskgroup.task_gram` returns it.

    Returns:
        ``[K, K]`` in [-1, 1], of the dtype and on the device of ``gram``, ones on the diagonal; 0
        between a task whose gradient is zero and any other.

    Raises:
        ValueError: if ``gram`` is not square.

    Example:
        >>> conflicts(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])
    """
    _check_square(gram)
    norm = gram.diagonal().sqrt()
    # Divided twice, since the product of two norms may overflow or vanish where they do not.
    cosines = (gram / norm[:, None] / norm).clamp(-1, 1)
    cosines = torch.where((norm[:, None] == 0) | (norm == 0), 0.0, cosines)
    return cosines.fill_diagonal_(1.0)


def pareto_stationarity(gram: Tensor) -> Tensor:
    r"""How far the shared parameters are from a Pareto-stationary point.

    .. math::
        \min_{w \ge 0,\ \sum_k w_k = 1} w^\top G\, w
        = \min_w \Bigl\lVert \sum_k w_k g_k \Bigr\rVert^2

    Zero where some convex combination of the gradients vanishes: no step improves all tasks at
    once. The sequence of group updates converges to such points (Theorem 4 of "Selective Task Group
    Updates for Multi-Task Optimization", ICLR 2025, arXiv 2502.11986). Solved exactly, by Wolfe's
    algorithm for the point of least norm in a polytope ("Finding the nearest point in a polytope",
    Mathematical Programming 11, 1976), in float64 on the host; it waits for the device.

    Args:
        gram: ``[K, K]``, as :func:`taskgroup.task_gram` returns it.

    Returns:
        A scalar of the dtype and on the device of ``gram``, not negative; NaN where ``gram`` is not
        finite.

    Raises:
        ValueError: if ``gram`` is not square or empty.

    Example:
        >>> pareto_stationarity(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
        tensor(2.)
        >>> pareto_stationarity(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).round(decimals=6)
        tensor(0.)
    """
    _check_square(gram)
    if len(gram) == 0:
        raise ValueError("gram is empty: it needs at least one task.")
    host = gram.detach().double().cpu().numpy()
    if not np.isfinite(host).all():
        return gram.new_full((), torch.nan)
    weights = _least_norm_weights((host + host.T) / 2)
    return gram.new_tensor(max(0.0, float(weights @ host @ weights)))


def _least_norm_weights(gram: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """The weights on the simplex that minimise ``w @ gram @ w``: Wolfe's algorithm."""
    n_tasks = len(gram)
    scale = float(gram.diagonal().max())
    weights = np.zeros(n_tasks)
    weights[gram.diagonal().argmin()] = 1.0
    corral = weights > 0  # the gradients in the combination
    for _ in range(100 * n_tasks):  # it ends by itself; rounding may make it circle
        product = gram @ weights
        entering = int(product.argmin())
        if product[entering] >= weights @ product - _TOLERANCE * scale or corral[entering]:
            break
        corral[entering] = True
        while True:
            # The point of least norm in the affine hull of the corral.
            inside = np.flatnonzero(corral)
            system = np.ones((len(inside) + 1, len(inside) + 1))
            system[0, 0] = 0.0
            system[1:, 1:] = gram[np.ix_(inside, inside)]
            right = np.zeros(len(inside) + 1)
            right[0] = 1.0
            target = np.linalg.lstsq(system, right, rcond=None)[0][1:]
            if (target > 0).all():
                weights[inside] = target
                break
            # Out of the simplex: go as far as it allows, and let go of what reaches zero.
            old = weights[inside]
            shrinking = target <= 0
            ratio = np.full(len(inside), np.inf)
            ratio[shrinking] = old[shrinking] / (old[shrinking] - target[shrinking] + 1e-300)
            step = min(1.0, float(ratio.min()))
            moved = (1 - step) * old + step * target
            moved[ratio.argmin()] = 0.0
            moved[moved < 0] = 0.0
            weights[inside] = moved / moved.sum()
            corral = weights > 0
    return weights


def _scalars(losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The losses one by one, checked."""
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                f"Stacked losses must have shape [K], one per task, got {list(losses.shape)}."
            )
        named = {f"{k}": loss for k, loss in enumerate(losses.unbind())}
    elif isinstance(losses, Mapping):
        named = {repr(task): loss for task, loss in losses.items()}
    else:
        named = {f"{k}": loss for k, loss in enumerate(losses)}
    if not named:
        raise ValueError("losses is empty: it must hold the loss of at least one task.")
    for task, loss in named.items():
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"The loss of task {task} must be a floating-point scalar tensor, got {got}; "
                "reduce it, with .mean() for instance."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"The loss of task {task} has no graph, so it has no gradient; compute it with "
                "gradients on, from outputs that are not detached."
            )
    return list(named.values())


# What torch says, and what to do about it.
_CURES = {
    "donated buffer": (
        "The compiled model frees its buffers in its first backward pass, and gradients of single "
        "tasks need one pass each: set torch._functorch.config.donated_buffer = False before the "
        "model is compiled."
    ),
    "compiled backward function within vmap": (
        "A compiled model has no vectorised backward pass: take the gradients one by one, with "
        "task_gradients(losses, params), or leave the model uncompiled."
    ),
    "Batching rule not implemented": (
        "An operation of the model has no vectorised backward pass: take the gradients one by one, "
        "with task_gradients(losses, params)."
    ),
}


@contextmanager
def _explained() -> Iterator[None]:
    """Says what to do about the backward passes that torch refuses."""
    try:
        yield
    except RuntimeError as error:
        for said, cure in _CURES.items():
            if said in str(error):
                raise RuntimeError(cure) from error
        raise


def _check_square(gram: Tensor) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must have shape [K, K], got {list(gram.shape)}.")
