"""The update of the affinity matrix by the step of one group."""

from __future__ import annotations

import torch
from torch import Tensor

from taskgroup.ops import _backend


def affinity_update_(
    matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float
) -> Tensor:
    r"""Updates the affinity matrix, in place, by what the step of one group did to every task.

    With :math:`S` the group that was stepped, :math:`n = |S|`, and the ratio

    .. math::
        r_k = \frac{1}{n} \operatorname{clamp}\left(
            1 - \frac{\mathrm{after}_k}{\mathrm{before}_k}, -1, 1\right)

    every row :math:`i \in S` moves to

    .. math::
        A_{ik} \leftarrow (1 - \beta) A_{ik} + \beta \begin{cases}
            r_k & k \notin S, \text{ or } k \in S,\ k \ne i,\ r_i r_k \ge 0 \\
            r_i & k = i,\ r_i \ge 0 \\
            -\max(r_i, r_k) & k \in S,\ k \ne i,\ r_i r_k < 0
        \end{cases}

    and the rest of the matrix stays. This is the proximal inter-task affinity of "Selective Task
    Group Updates for Multi-Task Optimization" (ICLR 2025, arXiv:2502.11986), read off the training
    steps themselves. A ratio is valid where ``before`` is finite and positive and ``after`` is
    finite; an entry that needs an invalid ratio stays as it was. Where every valid loss is exactly
    what it was, no step happened (a gradient scaler skipped it, say) and nothing is observed.

    One fused kernel where there is one for the device; it never waits for the device. Arithmetic is
    in float64.

    Args:
        matrix: Affinity :math:`A`, ``[K, K]``, float32, contiguous. Row i is the effect of
            stepping task i, column k the effect on task k.
        before: Losses before the step, ``[K]``, any floating dtype.
        after: Losses after the step, ``[K]``, of the same dtype.
        mask: The group :math:`S`, ``[K]``, bool.
        decay: Weight :math:`\beta` of the observation, in (0, 1].

    Returns:
        ``matrix``.

    Raises:
        ValueError: If an argument has another shape, dtype, layout or device than these, or
            ``matrix`` requires a gradient. Nothing is changed then.

    Example:
        >>> matrix = torch.zeros(3, 3)
        >>> before, after = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 1.0, 5.0])
        >>> group = torch.tensor([True, True, False])
        >>> affinity_update_(matrix, before, after, group, decay=1.0)
        tensor([[ 0.2500,  0.2500, -0.1250],
                [ 0.2500,  0.2500, -0.1250],
                [ 0.0000,  0.0000,  0.0000]])
    """
    before, after = _losses(before), _losses(after)
    _check(matrix, before, after, mask, decay)
    update_checked_(matrix, before, after, mask.contiguous(), float(decay))
    return matrix


def update_checked_(
    matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float
) -> None:
    """The same for arguments that are known to be right, in float32 or float64, contiguous."""
    update = _backend.choose(
        matrix.device.type, cpp=_native, cuda=_native, triton=_triton, reference=_reference
    )
    update(matrix, before, after, mask, decay)


def _losses(losses: Tensor) -> Tensor:
    losses = losses.detach().contiguous()
    return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses


def _check(matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have shape [K, K], got {list(matrix.shape)}.")
    if matrix.dtype != torch.float32:
        raise ValueError(f"matrix must be float32, got {matrix.dtype}.")
    if not matrix.is_contiguous():
        raise ValueError("matrix must be contiguous: it is updated in place.")
    if matrix.requires_grad:
        raise ValueError("matrix must not require a gradient: it is updated in place.")
    for name, vector in (("before", before), ("after", after), ("mask", mask)):
        if vector.dim() != 1 or vector.shape[0] != matrix.shape[0]:
            raise ValueError(
                f"{name} must have shape [{matrix.shape[0]}], an entry for each row of matrix, "
                f"got {list(vector.shape)}."
            )
        if vector.device != matrix.device:
            raise ValueError(
                f"{name} must be on the device of matrix, {matrix.device}, got {vector.device}."
            )
    if before.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"before must have a floating dtype, got {before.dtype}.")
    if after.dtype != before.dtype:
        raise ValueError(f"after must have the dtype of before, {before.dtype}, got {after.dtype}.")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}.")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")


def _native(matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float) -> None:
    torch.ops.taskgroup.affinity_update_(matrix, before, after, mask, decay)


def _triton(matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float) -> None:
    from taskgroup.ops.triton import affinity_update as on_triton  # Triton is imported here

    on_triton.affinity_update_(matrix, before, after, mask, decay)


def _reference(matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float) -> None:
    b, a = before.double(), after.double()
    valid = b.isfinite() & (b > 0) & a.isfinite()
    stepped = (valid & (a != b)).any()
    nothing = torch.full_like(b, torch.nan)
    group_size = mask.sum().clamp(min=1)
    ratio = torch.where(valid, (1 - a / b).clamp(-1, 1) / group_size, nothing)  # [K]

    ri, rk = ratio[:, None], ratio[None, :]
    inside = torch.where(ri * rk < 0, -torch.maximum(ri, rk), rk + 0 * ri)  # NaN where either is
    itself = torch.eye(len(ratio), dtype=torch.bool, device=ratio.device)
    inside = torch.where(itself, torch.where(rk >= 0, rk, nothing), inside)
    observed = torch.where(mask[None, :], inside, rk)  # [K, K]; rows outside the group are unused
    updated = (1 - decay) * matrix.double() + decay * observed
    matrix.copy_(torch.where(mask[:, None] & stepped & ~observed.isnan(), updated, matrix))


def _fake(matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float) -> None:
    """The op writes to its argument and returns nothing: without data there is nothing to do."""


if _backend.native.host is not None:
    torch.library.register_fake("taskgroup::affinity_update_", _fake)
