"""The inner products of the gradients of tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taskgroup.ops import _backend
from taskgroup.ops._gradient_list import (
    GradientList,
    Gradients,
    check,
    flatten,
    gram_dtype,
    reference_gram,
)
from taskgroup.ops._plain import read_plain
from taskgroup.ops._sharded import any_sharded, gram_over_ranks


def task_gram(gradients: Gradients) -> Tensor:
    r"""Computes the Gram matrix of the gradients of K tasks: their inner products.

    .. math::
        G_{ij} = \langle g_i, g_j \rangle = \sum_t \sum_x g_{i,t,x} \, g_{j,t,x}

    over all parameters :math:`t` and their elements :math:`x`. Every gradient is read once (once
    for every 64 tasks) from its own memory, with any strides; nothing is concatenated. (On CUDA,
    gradients are copied if they are not dense, or if their strides differ from those of the other
    tasks.) Products of float32, bfloat16 and float16 are summed in float32 over short runs, and the
    runs in float64; the error is at most 1e-6 of :math:`|g_i| |g_j|`. The result is bitwise
    identical from run to run, and does not depend on the number of threads.

    NaN and infinity propagate as in any sum. If the gradients are sharded (DTensor), every rank
    reads its own shards, and the matrices are added up: one all-reduce of K x K numbers over the
    mesh.

    Args:
        gradients: ``[K][T]`` tensors or None, as :func:`taskgroup.task_gradients` returns them; K
            from 1 to 1024. All gradients of a parameter have the same shape and dtype (float32,
            float64, bfloat16 or float16), and all gradients are on one device. None means that the
            task does not reach the parameter, and counts as zero.

    Returns:
        ``[K, K]``, symmetric, on the device of the gradients; float64 if any gradient is float64,
        else float32.

    Raises:
        ValueError: if all gradients are None, or one has another shape, dtype, layout or device;
            the message names the task and the tensor.

    Example:
        >>> depth = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
        >>> normal = [torch.tensor([1.0, 0.0]), None]
        >>> task_gram([depth, normal])
        tensor([[14.,  1.],
                [ 1.,  1.]])
    """
    plain = read_plain(gradients)
    if plain is not None:
        with torch.no_grad():
            matrix: Tensor = torch.ops.taskgroup._plain_task_gram.default(plain.address, plain.like)
        return matrix
    listed = flatten(gradients)
    if not listed.flat:
        raise ValueError("All gradients are None: no task reaches any of the parameters.")
    if any_sharded(listed.flat):
        return gram_over_ranks(gradients, task_gram)
    device = getattr(listed.flat[0], "device", None)
    gram = _backend.choose("cpu" if device is None else device.type, **IMPLEMENTATIONS)
    with torch.no_grad():
        return gram(listed)


def _native(gradients: GradientList) -> Tensor:
    try:
        matrix: Tensor = torch.ops.taskgroup.task_gram(*gradients)
    except (RuntimeError, TypeError):
        check(gradients)
        raise
    return matrix


def _triton(gradients: GradientList) -> Tensor:
    from taskgroup.ops.triton import task_gram as on_triton  # Triton is imported here

    check(gradients)
    matrix: Tensor = on_triton.task_gram(*gradients)
    return matrix


def _reference(gradients: GradientList) -> Tensor:
    return reference_gram(gradients).to(gram_dtype(gradients.flat))


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "cpp": _native,
    "cuda": _native,
    "triton": _triton,
    "reference": _reference,
}
