"""The weighted sum of the gradients of tasks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskgroup.ops.triton._addresses import (
    TRITON_DTYPES,
    on_device_of,
    parameter_of,
    parameters_by_dtype,
    table,
    upload,
)

BLOCK = 1024  # elements of a program
NUM_WARPS = 4  # 8 elements per thread: all its loads of a task are in flight at once


@triton.jit
def _weighted_sum(
    addresses_ptr,  # int64 [K]
    weights_ptr,  # float32 or float64 [K]
    result,  # address
    x,  # [BLOCK]
    inside,  # [BLOCK]
    n_tasks,
    DTYPE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    sums = tl.zeros([BLOCK], SUM)
    for k in range(n_tasks):
        address = tl.load(addresses_ptr + k)
        # A missing gradient is left out, not multiplied: infinity times zero is not zero.
        there = (tl.zeros([BLOCK], tl.int64) + address) != 0
        row_ptr = address.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            row_ptr = tl.multiple_of(row_ptr, 16)
        if MASKED:
            values = tl.load(row_ptr + x, mask=inside & there, other=0)
        else:
            values = tl.load(row_ptr + x, mask=there, other=0)
        term = values.to(SUM) * tl.load(weights_ptr + k).to(SUM)
        sums += tl.where(there, term, 0)
    result_ptr = result.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        result_ptr = tl.multiple_of(result_ptr, 16)
    if MASKED:
        tl.store(result_ptr + x, sums.to(DTYPE), mask=inside)
    else:
        tl.store(result_ptr + x, sums.to(DTYPE))


@triton.jit(do_not_specialize=["n_parameters", "n_tasks"])
def combine_kernel(
    table_ptr,  # int64: see _addresses.table
    weights_ptr,  # float32 or float64 [K]
    n_parameters,
    n_tasks,
    DTYPE: tl.constexpr,
    SUM: tl.constexpr,  # the dtype of the sums
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    t = parameter_of(table_ptr, n_parameters, block)
    elements_ptr = table_ptr + n_parameters + 1
    results_ptr = elements_ptr + n_parameters
    addresses_ptr = results_ptr + n_parameters + t.to(tl.int64) * n_tasks
    n = tl.load(elements_ptr + t)
    result = tl.load(results_ptr + t)
    first = (block - tl.load(table_ptr + t)) * BLOCK
    x = first + tl.arange(0, BLOCK)
    # A mask with the number of elements would prevent wide loads: the compiler does not know it.
    if first + BLOCK <= n:
        _weighted_sum(
            addresses_ptr, weights_ptr, result, x, x < n, n_tasks, DTYPE, SUM, BLOCK, ALIGNED, False
        )
    else:
        _weighted_sum(
            addresses_ptr, weights_ptr, result, x, x < n, n_tasks, DTYPE, SUM, BLOCK, ALIGNED, True
        )


@torch.library.custom_op(
    "taskgroup_triton::combine",
    mutates_args=("out",),
    schema="(Tensor[] gradients, int[] slots, Tensor weights, Tensor(a!)[] out) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # see upload
)
def combine(gradients: list[Tensor], slots: list[int], weights: Tensor, out: list[Tensor]) -> None:
    """One launch per dtype. Every program reads its elements of all tasks before it writes."""
    n_tasks = len(weights)
    by_dtype, late = parameters_by_dtype(gradients, slots, n_tasks, out)
    if not by_dtype:
        return
    tables = [table(dtype, own, n_tasks, BLOCK) for dtype, own in by_dtype.items()]
    with on_device_of(weights):
        uploaded = upload([made.entries for made in tables], weights.device)
        for made, entries in zip(tables, uploaded, strict=True):
            combine_kernel[(made.n_blocks,)](
                entries,
                weights,
                made.n_parameters,
                n_tasks,
                DTYPE=TRITON_DTYPES[made.dtype],
                SUM=tl.float64 if made.dtype == torch.float64 else tl.float32,
                BLOCK=BLOCK,
                ALIGNED=made.aligned,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,  # rounds as the reference does
            )
        for target, buffer in late:
            target.copy_(buffer)
