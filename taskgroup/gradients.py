"""Gradients of single tasks on shared parameters, and what their inner products tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskgroup.ops import task_gram
from taskgroup.ops._gradient_list import check_number_of_tasks
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
    scalars = _scalars(losses)
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
        with _explained(vectorised=True):
            rows = torch.autograd.grad(
                stacked,
                active,
                _cotangents(stacked),
                retain_graph=retain_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
        _check_vanishing([_is_constant(r[-1]) for r in rows if r is not None])
        found = [[None if r is None else r[k] for r in rows] for k in range(len(scalars))]
    else:
        found = []
        own: Sequence[Tensor | None]
        for k, scalar in enumerate(scalars):
            keep = retain_graph or k < len(scalars) - 1
            with _explained():
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


def gradients_through_grad(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Iterable[Tensor] = (),
    *,
    retain_graph: bool = False,
) -> list[list[Tensor | None]]:
    """The same by way of ``.grad``, where FSDP puts the gradients of sharded parameters.

    Hooks of ``register_post_accumulate_grad_hook``, such as an optimizer's step, do not run.

    Args:
        losses: K scalars.
        params: T parameters.
        others: parameters that the tasks reach besides; their ``.grad`` is put back as well.
        retain_graph: keep the graph for a backward pass that comes after.
    """
    kept = [(parameter, parameter.grad) for parameter in (*params, *others)]
    found: list[list[Tensor | None]] = []
    try:
        with hooks_held(losses, [parameter for parameter, _ in kept]):
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


@contextmanager
def hooks_held(
    losses: Iterable[Tensor], params: Iterable[Tensor], *, search: bool = False
) -> Iterator[Callable[[], None]]:
    """Holds the hooks of ``register_post_accumulate_grad_hook`` while gradients are incomplete.

    An optimizer in such a hook would step on the gradient of every single task.

    Args:
        losses: with a graph. Where a parameter has such hooks, those of all leaves of the graph are
            held: it takes a search, which takes time.
        params: whose hooks are held.
        search: search the graph in any case.

    Yields:
        What runs the hooks, once each, for the tensors that a gradient came to within the block;
        to be called after it, when ``.grad`` is complete.
    """
    leaves = [parameter for parameter in params if _hooks(parameter)]
    if leaves or search:
        found = (n.variable for n in _nodes(losses) if type(n).__name__ == "AccumulateGrad")
        leaves += [leaf for leaf in found if _hooks(leaf)]
    # Emptied in place, for the handles that remove hooks know the dictionary.
    live = {leaf: _hooks(leaf) for leaf in leaves}
    held = {leaf: dict(hooks) for leaf, hooks in live.items()}
    reached: dict[Tensor, None] = {}

    def run() -> None:
        for leaf in reached:
            for hook in held[leaf].values():
                hook(leaf)

    try:
        for hooks in live.values():
            hooks.clear()
            hooks["held"] = reached.setdefault
        yield run
    finally:
        for leaf, hooks in live.items():
            hooks.clear()
            hooks.update(held[leaf])


def _hooks(tensor: Tensor) -> dict[Any, Callable[[Tensor], Any]]:
    # FSDP reads the same attribute (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py).
    return getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of a graph, each once."""
    waiting: list[Any] = [torch.autograd.graph.get_gradient_edge(t).node for t in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(child for child, _ in node.next_functions)
            yield node


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


def _cotangents(stacked: Tensor) -> Tensor:
    """``[K + 1, K]``: a row for every task, and one of zeros.

    A backward pass is linear, so the gradient of the last row is zero. Where it is not, something
    in it does not depend on the losses, and the other rows hold it even for tasks that do not
    reach it.
    """
    n_tasks = len(stacked)
    return torch.eye(n_tasks + 1, n_tasks, dtype=stacked.dtype, device=stacked.device)


def _is_constant(gradient: Tensor) -> Tensor:
    """Whether the gradient of the row of zeros is something else: a flag on its device."""
    return gradient.nan_to_num(0.0, 0.0, 0.0).any()  # NaN is 0 * inf, and shows by itself


def _check_vanishing(flags: list[Tensor]) -> None:
    if any(flags):
        raise _constant()


def _check_batched(node: Any, found: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    batched = torch._C._functorch.is_batchedtensor
    if any(g is not None and batched(g) for g in given) and not all(
        g is None or batched(g) or g.numel() == 0 for g in found
    ):
        raise _constant(node.name())


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


_ONE_BY_ONE = "take the gradients one by one, with task_gradients(losses, params)"

# What torch says, and what to do about it.
_CURES = {
    "donated buffer": (
        "The compiled model frees its buffers in its first backward pass, and gradients of single "
        "tasks need one pass each: set torch._functorch.config.donated_buffer = False before the "
        "model is compiled."
    ),
    "use_reentrant": (
        "Activation checkpointing with use_reentrant=True writes gradients to .grad alone, where "
        "those of single tasks are not: checkpoint with use_reentrant=False."
    ),
    "compiled backward function within vmap": (
        f"A compiled model has no vectorised backward pass: {_ONE_BY_ONE}, or leave the model "
        "uncompiled."
    ),
    "Batching rule not implemented": (
        f"An operation of the model has no vectorised backward pass: {_ONE_BY_ONE}."
    ),
}
# Errors of any backward pass, whether it is vectorised or not.
_OF_ANY_PASS = (
    "a second time",
    "modified by an inplace operation",
    "returned nan values",
    "can't allocate memory",
)


class _NotVectorisedError(RuntimeError):
    """A vectorised backward pass whose result would be wrong; it says what to do."""


def _constant(node: str = "") -> _NotVectorisedError:
    where = f" of {node}" if node else ""
    return _NotVectorisedError(
        f"The vectorised backward pass{where} gives a gradient that does not depend on the loss, "
        f"or that torch gets wrong: {_ONE_BY_ONE}."
    )


@contextmanager
def _explained(*, vectorised: bool = False) -> Iterator[None]:
    """Says what to do about the backward passes that torch refuses."""
    try:
        yield
    except (_NotVectorisedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # under vmap each operation has its own
        said = " ".join(f"{error}".split())
        of_any_pass = any(part in said for part in _OF_ANY_PASS)
        if vectorised and torch.is_anomaly_enabled() and not of_any_pass:
            raise RuntimeError(
                "Anomaly mode (torch.autograd.set_detect_anomaly) has no vectorised backward pass: "
                f"leave the mode, or {_ONE_BY_ONE}."
            ) from error
        for part, cure in _CURES.items():
            if part in said:
                raise RuntimeError(cure) from error
        if not vectorised or of_any_pass:
            raise
        if "sparse" in said.lower():
            raise RuntimeError(
                "Sparse gradients have no vectorised backward pass: build the embedding with "
                f"sparse=False, or {_ONE_BY_ONE}, and call .to_dense() on the sparse ones."
            ) from error
        raise RuntimeError(
            f"The model has no vectorised backward pass: {_ONE_BY_ONE}. Torch says: {said[:300]}"
        ) from error


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


def _check_square(gram: Tensor) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must have shape [K, K], got {list(gram.shape)}.")
