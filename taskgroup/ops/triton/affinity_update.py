"""The update of the affinity matrix after the step of one group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskgroup.ops.triton._addresses import as_float64, bits, on_device_of

_TILE = 4096  # entries of the matrix that a program updates; up to 64 tasks take one program


@triton.jit
def _ratio(before_ptr, after_ptr, k, n_tasks, group_size):
    """``clamp(1 - after / before, -1, 1) / group_size``, if it is valid, if the loss changed."""
    b = tl.load(before_ptr + k, mask=k < n_tasks, other=0).to(tl.float64)
    a = tl.load(after_ptr + k, mask=k < n_tasks, other=0).to(tl.float64)
    infinity = float("inf")
    valid = (b > 0) & (b < infinity) & (tl.abs(a) < infinity)
    ratio = 1 - a / tl.where(valid, b, 1)
    ratio = tl.where(ratio > 1, 1, tl.where(ratio < -1, -1, ratio)) / group_size
    return tl.where(valid, ratio, 0), valid, valid & (a != b)


@triton.jit(do_not_specialize=["n_tasks", "decay_bits"])
def affinity_update_kernel(
    matrix_ptr,  # float32 [K, K]
    before_ptr,  # float32 or float64 [K]
    after_ptr,  # as before
    mask_ptr,  # uint8 [K]
    observed_ptr,  # int32 [K, K], or None
    n_tasks,
    decay_bits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least K
):
    k = tl.arange(0, BLOCK)
    in_group_k = tl.load(mask_ptr + k, mask=k < n_tasks, other=0) != 0  # [K]
    group_size = tl.sum(in_group_k.to(tl.int32), 0).to(tl.float64)
    group_size = tl.where(group_size > 0, group_size, 1)
    ratio_k, valid_k, moved = _ratio(before_ptr, after_ptr, k, n_tasks, group_size)
    # If no loss has changed at all, there was no step.
    if tl.sum(moved.to(tl.int32), 0) == 0:
        return

    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_group_i = tl.load(mask_ptr + i, mask=i < n_tasks, other=0) != 0  # [ROWS]
    ratio_i, valid_i, _ = _ratio(before_ptr, after_ptr, i, n_tasks, group_size)

    ri, rk = ratio_i[:, None], ratio_k[None, :]
    inside = tl.where(ri * rk < 0, -tl.where(ri > rk, ri, rk), rk)  # [ROWS, K]
    other = i[:, None] != k[None, :]
    seen = tl.where(in_group_k[None, :] & other, inside, rk)
    there = in_group_i[:, None] & valid_k[None, :]
    there = there & (valid_i[:, None] | (in_group_k[None, :] == 0)) & (other | (rk >= 0))

    decay = as_float64(decay_bits)
    entry = i[:, None].to(tl.int64) * n_tasks + k[None, :]
    old = tl.load(matrix_ptr + entry, mask=there, other=0).to(tl.float64)
    new = (1 - decay) * old + decay * seen
    tl.store(matrix_ptr + entry, new.to(tl.float32), mask=there)
    if observed_ptr is not None:
        count = tl.load(observed_ptr + entry, mask=there, other=0)
        tl.store(observed_ptr + entry, count + 1, mask=there)


@torch.library.custom_op(
    "taskgroup_triton::affinity_update_",
    mutates_args=("matrix", "observed"),
    schema="(Tensor(a!) matrix, Tensor before, Tensor after, Tensor mask, float decay, "
    "Tensor(b!)? observed=None) -> ()",
)
def affinity_update_(
    matrix: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor,
    decay: float,
    observed: Tensor | None = None,
) -> None:
    """One launch; every program computes the ratios of all tasks and updates some rows."""
    n_tasks = len(matrix)
    if n_tasks == 0:
        return
    rows, block, num_warps = settings(n_tasks)
    with on_device_of(matrix):
        affinity_update_kernel[(triton.cdiv(n_tasks, rows),)](
            matrix,
            before,
            after,
            mask.view(torch.uint8),
            observed,
            n_tasks,
            bits(decay),
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,  # rounds as the reference does
        )


def settings(n_tasks: int) -> tuple[int, int, int]:
    """The numbers of rows, columns and warps of a program."""
    block = max(16, triton.next_power_of_2(n_tasks))
    rows = max(1, min(block, _TILE // block))
    return rows, block, 4 if block <= 32 else 8
