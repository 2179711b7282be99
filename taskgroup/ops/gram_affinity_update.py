"""The update of the affinity matrix with the gradients of tasks, to first order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taskgroup.ops import _backend
from taskgroup.ops._gradient_list import (
    GradientList,
    Gradients,
    check,
    flatten,
    reference_gram,
)
from taskgroup.ops._plain import read_plain
from taskgroup.ops._sharded import any_sharded, gram_over_ranks
from taskgroup.ops.affinity_update import (
    check_affinity,
    check_loss_dtype,
    check_tensors,
    contiguous_losses,
)
from taskgroup.ops.task_gram import task_gram


def gram_affinity_update_(
    matrix: Tensor,
    gradients: Gradients,
    losses: Tensor,
    decay: float,
    lr: float = 1.0,
    observed: Tensor | None = None,
) -> Tensor:
    r"""Updates the affinity matrix, in place, with the effect of a small step on each task.

    To first order a gradient step of size :math:`\eta` on task :math:`i` lowers the loss of task
    :math:`k` by :math:`\eta \langle g_i, g_k \rangle`, so every entry becomes

    .. math::
        A_{ik} \leftarrow (1 - \beta) A_{ik} + \beta \, \eta \, \frac{\langle g_i, g_k \rangle}{L_k}

    (Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning", NeurIPS 2021,
    and "Selective Task Group Updates for Multi-Task Optimization", ICLR 2025, arXiv 2502.11986,
    whose affinities this approximates.) The op is fused: the last step of the sum writes the
    affinity, and no tensor of the size of the gradients is copied.

    An entry does not change if its inner product or loss :math:`L_k` is not finite, or its loss is
    not positive. The rows and columns of tasks that are not measured do not change either. Sharded
    gradients (DTensor) are read as in :func:`taskgroup.task_gram`; the update itself is then plain
    PyTorch.

    Args:
        matrix: affinity :math:`A`, float32 ``[K, K]``, contiguous. Row i is the effect of a step on
            task i, column k the effect on task k.
        gradients: ``[K][T]`` tensors or None, as for :func:`taskgroup.task_gram`. A task whose
            gradients are all None is not measured.
        losses: ``[K]``, float16, bfloat16, float32 or float64, on the device of ``matrix``.
        decay: weight :math:`\beta` of the observation, in (0, 1].
        lr: step size :math:`\eta`. It cancels when the affinity is normalised for clustering.
        observed: the number of observations of each entry of ``matrix``, ``[K, K]``, int32,
            contiguous, in separate memory. The call adds one, in place, for every entry that it
            updates. None does not count.

    Returns:
        ``matrix``.

    Raises:
        ValueError: if an argument has another type, shape, dtype, layout or device, or ``observed``
            shares memory with ``matrix``; the message names it. Nothing has changed then.

    Example:
        >>> gradients = [[torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])], [None]]
        >>> losses = torch.tensor([1.0, 2.0, 1.0])
        >>> matrix, observed = torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.int32)
        >>> gram_affinity_update_(matrix, gradients, losses, decay=1.0, observed=observed)
        tensor([[1.0000, 0.5000, 0.0000],
                [1.0000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
        >>> observed
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    check_tensors(matrix=matrix, losses=losses)
    losses = contiguous_losses(losses)
    plain = read_plain(gradients)
    if plain is not None:
        _check(matrix, len(gradients), plain.like, losses, decay, observed)
        tasks = plain.keep_measured()
        with torch.no_grad():
            torch.ops.taskgroup._plain_gram_affinity_update_.default(
                matrix, plain.address, tasks, losses, float(decay), float(lr), observed
            )
        return matrix
    listed = flatten(gradients)
    if listed.flat and not isinstance(listed.flat[0], Tensor):
        check(listed)
    any_gradient = listed.flat[0] if listed.flat else None
    _check(matrix, listed.n_tasks, any_gradient, losses, decay, observed)
    measured = sorted(set(listed.tasks()))
    if not measured:
        return matrix
    if any_sharded(listed.flat):
        gram = gram_over_ranks([gradients[k] for k in measured], task_gram)
        _update(matrix, gram.double(), measured, losses, float(decay), float(lr), observed)
        return matrix
    if len(measured) < listed.n_tasks:  # the ops take only the measured tasks
        place = {k: p for p, k in enumerate(measured)}
        n = len(measured)
        slots = [t * n + place[k] for t, k in zip(listed.parameters(), listed.tasks(), strict=True)]
        listed = GradientList(listed.flat, slots, n)
    update = _backend.choose(matrix.device.type, **IMPLEMENTATIONS)
    with torch.no_grad():
        update(matrix, listed, measured, losses, float(decay), float(lr), observed)
    return matrix


def _check(
    matrix: Tensor,
    n_tasks: int,
    gradient: Tensor | None,
    losses: Tensor,
    decay: float,
    observed: Tensor | None,
) -> None:
    if matrix.shape != (n_tasks, n_tasks):
        raise ValueError(
            f"matrix must have shape [{n_tasks}, {n_tasks}], a row per task, got "
            f"{list(matrix.shape)}."
        )
    check_affinity(matrix, observed)
    if losses.shape != (n_tasks,):
        raise ValueError(f"losses must have shape [{n_tasks}], got {list(losses.shape)}.")
    check_loss_dtype("losses", losses)
    if losses.device != matrix.device:
        raise ValueError(
            f"losses must be on the device of matrix, {matrix.device}, got {losses.device}."
        )
    if gradient is not None and gradient.device != matrix.device:
        raise ValueError(
            f"gradients must be on the device of matrix, {matrix.device}, got {gradient.device}."
        )
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")


def _native(matrix: Tensor, gradients: GradientList, *rest: Any) -> None:
    try:
        torch.ops.taskgroup.gram_affinity_update_(matrix, gradients.flat, gradients.slots, *rest)
    except (RuntimeError, TypeError):
        check(gradients)
        raise


def _triton(matrix: Tensor, gradients: GradientList, *rest: Any) -> None:
    from taskgroup.ops.triton import gram_affinity_update as on_triton  # Triton is imported here

    check(gradients)
    on_triton.gram_affinity_update_(matrix, gradients.flat, gradients.slots, *rest)


def _reference(matrix: Tensor, gradients: GradientList, *rest: Any) -> None:
    _update(matrix, reference_gram(gradients), *rest)


def _update(
    matrix: Tensor,
    gram: Tensor,
    tasks: list[int],
    losses: Tensor,
    decay: float,
    lr: float,
    observed: Tensor | None,
) -> None:
    """Updates the affinity with the inner products of the measured tasks, float64."""
    index = torch.tensor(tasks, dtype=torch.int64, device="cpu")
    index = index.to(matrix.device, non_blocking=True)
    own = losses.double()[index]
    valid = gram.isfinite() & own.isfinite() & (own > 0)
    entries = (index[:, None], index)
    old = matrix[entries]
    new = ((1 - decay) * old.double() + decay * (lr * gram / own)).float()
    matrix[entries] = torch.where(valid, new, old)
    if observed is not None:
        observed[entries] += valid


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "cpp": _native,
    "cuda": _native,
    "triton": _triton,
    "reference": _reference,
}
