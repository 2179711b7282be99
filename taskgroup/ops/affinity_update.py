"""The update of the affinity matrix after the step of one group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taskgroup.ops import _backend
from taskgroup.ops._plain import update_plain


def affinity_update_(
    matrix: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor,
    decay: float,
    observed: Tensor | None = None,
) -> Tensor:
    r"""Updates the affinity matrix, in place, with the effect of the step of one group.

    With :math:`S` the group that took the step, :math:`n = |S|`, and the ratio

    .. math::
        r_k = \frac{1}{n} \operatorname{clamp}\left(
            1 - \frac{\mathrm{after}_k}{\mathrm{before}_k}, -1, 1\right)

    every row :math:`i \in S` becomes

    .. math::
        A_{ik} \leftarrow (1 - \beta) A_{ik} + \beta \begin{cases}
            r_k & k \notin S, \text{ or } k \in S,\ k \ne i,\ r_i r_k \ge 0 \\
            r_i & k = i,\ r_i \ge 0 \\
            -\max(r_i, r_k) & k \in S,\ k \ne i,\ r_i r_k < 0
        \end{cases}

    and the other rows do not change. This is the proximal inter-task affinity of "Selective Task
    Group Updates for Multi-Task Optimization" (ICLR 2025, arXiv:2502.11986), measured on the
    training steps themselves. A ratio is valid if ``before`` is finite and positive and ``after``
    is finite; entries that need an invalid ratio do not change. If no valid loss has changed at
    all, there was no step (a gradient scaler may have skipped it), and nothing is observed.

    The update is one fused kernel on the devices that have one, and it never waits for the device.
    The arithmetic is in float64.

    Args:
        matrix: Affinity :math:`A`, ``[K, K]``, float32, contiguous. Row i is the effect of a step
            on task i, column k the effect on task k.
        before: Losses before the step, ``[K]``, float16, bfloat16, float32 or float64.
        after: Losses after the step, ``[K]``, of the same dtype.
        mask: The group :math:`S`, ``[K]``, bool.
        decay: Weight :math:`\beta` of the observation, in (0, 1].
        observed: The number of observations of each entry of ``matrix``, ``[K, K]``, int32,
            contiguous, in separate memory. The call adds one, in place, for every entry that it
            updates. None does not count.

    Returns:
        ``matrix``.

    Raises:
        ValueError: If an argument has another type, shape, dtype, layout or device,
            ``matrix`` requires a gradient, or ``observed`` shares memory with it. Nothing has
            changed then.

    Example:
        >>> matrix = torch.zeros(3, 3)
        >>> before, after = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 1.0, 5.0])
        >>> group = torch.tensor([True, True, False])
        >>> observed = torch.zeros(3, 3, dtype=torch.int32)
        >>> affinity_update_(matrix, before, after, group, decay=1.0, observed=observed)
        tensor([[ 0.2500,  0.2500, -0.1250],
                [ 0.2500,  0.2500, -0.1250],
                [ 0.0000,  0.0000,  0.0000]])
        >>> observed
        tensor([[1, 1, 1],
                [1, 1, 1],
                [0, 0, 0]], dtype=torch.int32)
    """
    check_tensors(matrix=matrix, before=before, after=after, mask=mask)
    check_affinity(matrix, observed)
    before, after = contiguous_losses(before), contiguous_losses(after)
    _check(matrix, before, after, mask, decay)
    _update(matrix, before, after, mask.contiguous(), float(decay), observed)
    return matrix


def update_checked_(
    matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float, observed: Tensor
) -> None:
    """:func:`affinity_update_` for valid arguments: contiguous, losses in float32 or float64."""
    if not update_plain(matrix, before, after, mask, decay, observed):
        _update(matrix, before, after, mask, decay, observed)


def _update(matrix: Tensor, *arguments: Any) -> None:
    _backend.choose(matrix.device.type, **IMPLEMENTATIONS)(matrix, *arguments)


def check_tensors(**tensors: object) -> None:
    """Raises a ValueError that names the first argument that is not a dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a Tensor, got {type(tensor).__name__}.")
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{name} must be dense, got layout {tensor.layout}: call .to_dense() on it."
            )


def contiguous_losses(losses: Tensor) -> Tensor:
    """The losses as the kernels read them: detached, and in float32 if they have 16 bits."""
    losses = losses.detach().contiguous()
    return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses


def check_loss_dtype(name: str, losses: Tensor) -> None:
    """Raises a ValueError if the losses have a dtype that the kernels do not read."""
    if losses.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must have a floating dtype (float16, bfloat16, float32 or float64), got "
            f"{losses.dtype}."
        )


def check_affinity(matrix: Tensor, observed: Tensor | None) -> None:
    """Raises a ValueError unless an update may write to the affinity matrix and its counts."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have shape [K, K], got {list(matrix.shape)}.")
    if matrix.dtype != torch.float32:
        raise ValueError(f"matrix must be float32, got {matrix.dtype}.")
    if not matrix.is_contiguous():
        raise ValueError("matrix must be contiguous: it is updated in place.")
    if matrix.requires_grad:
        raise ValueError("matrix must not require a gradient: it is updated in place.")
    if observed is None:
        return
    check_tensors(observed=observed)
    if observed.shape != matrix.shape:
        raise ValueError(
            f"observed must have the shape of matrix, {list(matrix.shape)}, got "
            f"{list(observed.shape)}."
        )
    if observed.dtype != torch.int32:
        raise ValueError(f"observed must be int32, got {observed.dtype}.")
    if not observed.is_contiguous():
        raise ValueError("observed must be contiguous: it is updated in place.")
    if observed.device != matrix.device:
        raise ValueError(
            f"observed must be on the device of matrix, {matrix.device}, got {observed.device}."
        )
    # A compiler handles views itself, and cannot trace storages.
    if not torch.compiler.is_compiling() and _overlap(matrix, observed):
        raise ValueError("observed must not share memory with matrix: use a separate tensor.")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors of the same shape and element size share memory."""
    apart = int(a.storage_offset()) - int(b.storage_offset())
    return a.untyped_storage() is b.untyped_storage() and abs(apart) < a.numel()


def _check(matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float) -> None:
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
    check_loss_dtype("before", before)
    if after.dtype != before.dtype:
        raise ValueError(f"after must have the dtype of before, {before.dtype}, got {after.dtype}.")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}.")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")


def _native(*arguments: Any) -> None:
    torch.ops.taskgroup.affinity_update_(*arguments)


def _triton(*arguments: Any) -> None:
    from taskgroup.ops.triton import affinity_update as on_triton  # Triton is imported here

    on_triton.affinity_update_(*arguments)


def _reference(
    matrix: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor,
    decay: float,
    observed: Tensor | None,
) -> None:
    b, a = before.double(), after.double()
    valid = b.isfinite() & (b > 0) & a.isfinite()
    stepped = (valid & (a != b)).any()
    nothing = torch.full_like(b, torch.nan)
    group_size = mask.sum().clamp(min=1)
    ratio = torch.where(valid, (1 - a / b).clamp(-1, 1) / group_size, nothing)  # [K]

    ri, rk = ratio[:, None], ratio[None, :]
    inside = torch.where(ri * rk < 0, -torch.maximum(ri, rk), rk + 0 * ri)  # NaN if either is NaN
    itself = torch.eye(len(ratio), dtype=torch.bool, device=ratio.device)
    inside = torch.where(itself, torch.where(rk >= 0, rk, nothing), inside)
    seen = torch.where(mask[None, :], inside, rk)  # [K, K]; rows outside the group are unused
    moves = mask[:, None] & stepped & ~seen.isnan()
    matrix.copy_(torch.where(moves, (1 - decay) * matrix.double() + decay * seen, matrix))
    if observed is not None:
        observed.add_(moves)


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "cpp": _native,
    "cuda": _native,
    "triton": _triton,
    "reference": _reference,
}
