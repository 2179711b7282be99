"""The update of the affinity matrix with the gradients of tasks, to first order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskgroup.ops.triton._addresses import as_float64, bits, on_device_of, upload
from taskgroup.ops.triton.task_gram import partials, parts_at_once, plan, sum_of_partials


@triton.jit
def _observe(matrix_ptr, losses_ptr, observed_ptr, i, k, product, mask, n_tasks, decay, lr):
    """Sets entries to ``(1 - decay) A_ik + decay * lr * product / L_k`` where that is finite."""
    infinity = float("inf")
    loss = tl.load(losses_ptr + k, mask=mask, other=0).to(tl.float64)
    valid = mask & (tl.abs(product) < infinity) & (loss > 0) & (loss < infinity)
    entry = i * n_tasks + k
    old = tl.load(matrix_ptr + entry, mask=valid, other=0).to(tl.float64)
    new = (1 - decay) * old + decay * (lr * product / tl.where(valid, loss, 1))
    tl.store(matrix_ptr + entry, new.to(tl.float32), mask=valid)
    if observed_ptr is not None:
        count = tl.load(observed_ptr + entry, mask=valid, other=0)
        tl.store(observed_ptr + entry, count + 1, mask=valid)


@triton.jit(do_not_specialize=["n_tasks", "n_measured", "n_parts", "decay_bits", "lr_bits"])
def gram_affinity_update_kernel(
    partials_ptr,  # float64 [parts, pairs, BK, BK]
    matrix_ptr,  # float32 [K, K]
    tasks_ptr,  # int64 [M]: the measured tasks
    losses_ptr,  # float32 or float64 [K]
    observed_ptr,  # int32 [K, K], or None
    n_tasks,
    n_measured,
    n_parts,
    decay_bits,
    lr_bits,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    task_block_a = tl.program_id(2)
    task_block_b = tl.program_id(1)
    i = task_block_a * BK + row
    if (task_block_b < task_block_a) | (i >= n_measured):
        return
    products = sum_of_partials(
        partials_ptr, row, task_block_a, task_block_b, tl.num_programs(2), n_parts, BK, PARTS
    )
    j = task_block_b * BK + tl.arange(0, BK)
    upper = (j >= i) & (j < n_measured)
    left = tl.load(tasks_ptr + i)
    right = tl.load(tasks_ptr + j, mask=upper, other=0)
    left = tl.where(upper, left, 0)
    decay = as_float64(decay_bits)
    lr = as_float64(lr_bits)
    _observe(matrix_ptr, losses_ptr, observed_ptr, left, right, products, upper, n_tasks, decay, lr)
    lower = upper & (j != i)  # every entry is updated once
    _observe(matrix_ptr, losses_ptr, observed_ptr, right, left, products, lower, n_tasks, decay, lr)


@torch.library.custom_op(
    "taskgroup_triton::gram_affinity_update_",
    mutates_args=("matrix", "observed"),
    schema="(Tensor(a!) matrix, Tensor[] gradients, int[] slots, int[] tasks, Tensor losses, "
    "float decay, float lr, Tensor(b!)? observed=None) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # see upload
)
def gram_affinity_update_(
    matrix: Tensor,
    gradients: list[Tensor],
    slots: list[int],
    tasks: list[int],
    losses: Tensor,
    decay: float,
    lr: float,
    observed: Tensor | None = None,
) -> None:
    """Runs the first pass of the Gram matrix, and a second pass that writes the affinity."""
    made = plan(gradients, slots, len(tasks))
    with on_device_of(matrix):
        *tables, index = upload([*(own.entries for own in made.tables), tasks], matrix.device)
        if tables:
            sums = partials(made, tables, len(tasks))
        else:  # without elements every product is zero
            sums = matrix.new_empty(0, dtype=torch.float64)
        gram_affinity_update_kernel[(made.block, made.task_blocks, made.task_blocks)](
            sums,
            matrix,
            index,
            losses,
            observed,
            len(matrix),
            len(tasks),
            len(sums),
            bits(decay),
            bits(lr),
            BK=made.block,
            PARTS=parts_at_once(made.block),
            num_warps=4,
            enable_fp_fusion=False,  # rounds as the reference does
        )
