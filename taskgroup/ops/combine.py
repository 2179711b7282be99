"""The weighted sum of the gradients of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taskgroup.ops import _backend
from taskgroup.ops._gradient_list import GradientList, Gradients, check, flatten
from taskgroup.ops._plain import read_plain
from taskgroup.ops._sharded import any_sharded, is_sharded, local_like, wrapped


def combine(
    gradients: Gradients,
    weights: Tensor | Sequence[float],
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    r"""Combines the gradients of K tasks into one: :math:`g_t = \sum_k w_k \, g_{k,t}`.

    Every gradient is read once and the result is written once. Nothing is copied, except on CUDA
    tensors that are not dense or whose strides differ from those of the other tasks. The sums are
    in float32 (float64 for float64 gradients), in the order of the tasks, and are rounded once to
    the dtype of the parameter. A method that needs inner products alone calls
    :func:`taskgroup.task_gram` and this function: two passes over the gradients, and no other
    memory of their size.

    NaN and infinity propagate as in any sum: zero times infinity is NaN. If the gradients are
    sharded (DTensor), every rank combines its own shards, and the result is sharded in the same
    way.

    Args:
        gradients: ``[K][T]`` tensors or None, as for :func:`taskgroup.task_gram`.
        weights: ``[K]``, any floating dtype, on the device of the gradients; or K numbers.
        out: ``[T]`` tensors to write to, such as the ``.grad`` of the parameters: dense, not
            expanded, with the shape, dtype and device of the gradients. They may be gradients
            themselves. For a parameter that no task reaches, the tensor is set to zero and may be
            None.

    Returns:
        ``[T]``: ``out``, or new tensors, with None for a parameter that no task reaches.

    Raises:
        ValueError: if the weights or ``out`` do not fit the gradients, or a gradient has another
            shape, dtype, layout or device than the others; the message names it.

    Example:
        >>> depth = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
        >>> normal = [torch.tensor([1.0, 0.0]), None]
        >>> combine([depth, normal], [0.5, 0.25])
        [tensor([0.7500, 1.0000]), tensor([[1.5000]])]
    """
    if out is not None:
        out = list(out)
    plain = read_plain(gradients)
    if plain is not None:
        result = _outputs(plain.first, out)
        if plain.read_outputs(result):
            weights = _weights(weights, len(gradients), plain.like.device)
            with torch.no_grad():
                torch.ops.taskgroup._plain_combine.default(plain.address, weights)
            return _with_zeros(result, plain.first)
    listed = flatten(gradients)
    # One gradient of each parameter; None if no task reaches the parameter.
    first = [next((g for g in column if g is not None), None) for column in zip(*gradients)]  # noqa: B905
    if not all(isinstance(gradient, Tensor) for gradient in first if gradient is not None):
        check(listed)
    if any_sharded(listed.flat):
        return _combine_shards(gradients, weights, first, out)
    result = _outputs(first, out)
    if out is not None:
        _check_out(result, first)
    if listed.flat:
        _run(listed, weights, first, result)
    return _with_zeros(result, first)


def _outputs(first: list[Tensor | None], out: list[Tensor | None] | None) -> list[Tensor | None]:
    if out is not None:
        return out
    return [None if gradient is None else torch.empty_like(gradient) for gradient in first]


def _with_zeros(result: list[Tensor | None], first: list[Tensor | None]) -> list[Tensor | None]:
    """Returns the result, with zeros for the parameters that no task reaches."""
    for gradient, untouched in zip(first, result, strict=True):
        if gradient is None and untouched is not None:
            untouched.detach().zero_()
    return result


def _run(
    listed: GradientList,
    weights: Tensor | Sequence[float],
    first: list[Tensor | None],
    result: list[Tensor | None],
) -> None:
    device = listed.flat[0].device
    weights = _weights(weights, listed.n_tasks, device)
    reached = [t for t, gradient in enumerate(first) if gradient is not None]
    if len(reached) < len(first):  # the ops take only the parameters that are reached
        position = {t: p for p, t in enumerate(reached)}
        slots = [
            position[t] * listed.n_tasks + k
            for t, k in zip(listed.parameters(), listed.tasks(), strict=True)
        ]
        listed = listed._replace(slots=slots)
    run = _backend.choose(device.type, **IMPLEMENTATIONS)
    with torch.no_grad():
        run(listed, weights, [result[t].detach() for t in reached])  # type: ignore[union-attr]


def _combine_shards(
    gradients: Gradients,
    weights: Tensor | Sequence[float],
    first: list[Tensor | None],
    out: list[Tensor | None] | None,
) -> list[Tensor | None]:
    """:func:`combine` for DTensors: combines the parts on this rank."""
    if out is not None:
        _check_out(out, first)
    like = first if out is None else out
    local = [
        [None if to is None else local_like(g, to) for g, to in zip(own, like, strict=True)]
        for own in gradients
    ]
    into = None if out is None else [None if to is None else local_like(to, to) for to in out]
    result = combine(local, weights, into)
    if out is not None:
        return out
    return [
        wrapped(own, to) if own is not None and to is not None and is_sharded(to) else own
        for own, to in zip(result, like, strict=True)
    ]


def _weights(weights: Tensor | Sequence[float], n_tasks: int, device: torch.device) -> Tensor:
    if not isinstance(weights, Tensor):
        try:
            weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError):
            raise TypeError(f"weights takes one number per task, got {weights!r}.") from None
        weights = weights.to(device, non_blocking=True)
    if weights.shape != (n_tasks,) or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating point [{n_tasks}], one per task, got {weights.dtype} "
            f"{list(weights.shape)}."
        )
    if weights.device != device:
        raise ValueError(
            f"weights must be on the device of the gradients, {device}, got {weights.device}."
        )
    weights = weights.detach()
    if weights.dtype not in (torch.float32, torch.float64):
        weights = weights.float()
    return weights.contiguous()


def _check_out(out: list[Tensor | None], first: list[Tensor | None]) -> None:
    if len(out) != len(first):
        raise ValueError(f"out must hold one tensor per parameter, {len(first)}, got {len(out)}.")
    for t, (tensor, gradient) in enumerate(zip(out, first, strict=True)):
        if gradient is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"out must hold a tensor to write to for tensor {t}, which a task reaches, got "
                f"{type(tensor).__name__}; give one like the parameter, such as "
                "torch.zeros_like(parameter)."
            )
        if (tensor.shape, tensor.dtype, tensor.device) != (
            gradient.shape,
            gradient.dtype,
            gradient.device,
        ):
            raise ValueError(
                f"out must have the shape, dtype and device of the gradients: tensor {t} is "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, its gradient "
                f"{gradient.dtype} {list(gradient.shape)} on {gradient.device}."
            )
        if tensor.layout != torch.strided:
            raise ValueError(
                f"out must hold dense tensors: tensor {t} has layout {tensor.layout}; give one "
                "like the parameter, such as torch.zeros_like(parameter)."
            )
        if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride())):  # noqa: B905
            raise ValueError(
                f"out must not be expanded: elements of tensor {t} share their memory; give one "
                "like the parameter, such as torch.zeros_like(parameter)."
            )


def _native(gradients: GradientList, weights: Tensor, out: list[Tensor]) -> None:
    try:
        torch.ops.taskgroup.combine(gradients.flat, gradients.slots, weights, out)
    except (RuntimeError, TypeError):
        check(gradients)
        raise


def _triton(gradients: GradientList, weights: Tensor, out: list[Tensor]) -> None:
    from taskgroup.ops.triton import combine as on_triton  # Triton is imported here

    check(gradients)
    on_triton.combine(gradients.flat, gradients.slots, weights, out)


def _reference(gradients: GradientList, weights: Tensor, out: list[Tensor]) -> None:
    check(gradients)
    sums: dict[int, Tensor] = {}
    for k, t, gradient in zip(
        gradients.tasks(), gradients.parameters(), gradients.flat, strict=True
    ):
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        term = wide * weights[k].to(wide.dtype)
        sums[t] = sums[t] + term if t in sums else term
    for t, total in sums.items():
        out[t].copy_(total)


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "cpp": _native,
    "cuda": _native,
    "triton": _triton,
    "reference": _reference,
}
