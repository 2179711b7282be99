"""The inner products of the gradients of tasks, in two passes.

In the first pass every program sums over a run of blocks of elements, for one pair of blocks of
tasks. The second pass adds these partial sums. The runs depend on the sizes alone and the order of
the sums is fixed, so the results are bitwise identical from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskgroup.ops._gradient_list import fake_gram, gram_dtype
from taskgroup.ops.triton._addresses import (
    TRITON_DTYPES,
    Parameter,
    Table,
    on_device_of,
    parameter_of,
    parameters_by_dtype,
    table,
    upload,
)


@triton.jit
def _products(
    left,  # [BK] addresses
    right,  # [BK] addresses
    x,  # [BP] elements
    n,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sums over a few elements, ``[BK, BK]``: in float32, for float64 in float64."""
    left_ptr = left.to(tl.pointer_type(DTYPE))[:, None] + x[None, :]
    right_ptr = right.to(tl.pointer_type(DTYPE))[:, None] + x[None, :]
    if ALIGNED:
        left_ptr = tl.multiple_of(left_ptr, (1, 16))
        right_ptr = tl.multiple_of(right_ptr, (1, 16))
    # A mask with the number of elements would prevent wide loads: the compiler does not know it.
    left_mask = (left != 0)[:, None]
    right_mask = (right != 0)[:, None]
    if MASKED:
        left_mask = left_mask & (x < n)[None, :]
        right_mask = right_mask & (x < n)[None, :]
    a = tl.load(left_ptr, mask=left_mask, other=0)  # [BK, BP]
    b = a if ONE_BLOCK else tl.load(right_ptr, mask=right_mask, other=0)
    if DOT is None:
        products = tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        products = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision="ieee").to(tl.float64)
    # A missing task adds nothing. Multiplied as zero with infinity it would add NaN.
    return tl.where((left != 0)[:, None] & (right != 0)[None, :], products, 0)


@triton.jit(do_not_specialize=["n_parameters", "n_tasks", "n_blocks", "blocks_per_part", "part_0"])
def gram_partials_kernel(
    table_ptr,  # int64: see _addresses.table
    partials_ptr,  # float64 [parts, pairs, BK, BK]
    n_parameters,
    n_tasks,
    n_blocks,
    blocks_per_part,
    part_0,  # the first part of this launch
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,  # the dtype of the operands of tl.dot; None: float64, without tl.dot
    BK: tl.constexpr,  # tasks of a block
    BP: tl.constexpr,  # elements of a block
    ONE_BLOCK: tl.constexpr,  # one block holds all tasks
    ALIGNED: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    task_block_a = tl.program_id(2)
    task_block_b = tl.program_id(1)
    if task_block_b < task_block_a:
        return
    i = task_block_a * BK + tl.arange(0, BK)
    j = task_block_b * BK + tl.arange(0, BK)
    elements_ptr = table_ptr + n_parameters + 1
    addresses_ptr = elements_ptr + 2 * n_parameters
    block = part * blocks_per_part
    end = tl.minimum(block + blocks_per_part, n_blocks)
    t = parameter_of(table_ptr, n_parameters, block)
    sums = tl.zeros([BK, BK], tl.float64)
    while block < end:
        first = tl.load(table_ptr + t)
        stop = tl.minimum(tl.load(table_ptr + t + 1), end)
        n = tl.load(elements_ptr + t)
        row_ptr = addresses_ptr + t.to(tl.int64) * n_tasks
        left = tl.load(row_ptr + i, mask=i < n_tasks, other=0)
        right = tl.load(row_ptr + j, mask=j < n_tasks, other=0)
        whole = tl.minimum(stop, first + n // BP)
        for at in range(block, whole):
            x = (at - first) * BP + tl.arange(0, BP)
            sums += _products(left, right, x, n, DTYPE, DOT, ONE_BLOCK, ALIGNED, False)
        if whole < stop:  # the last block of the parameter, which is shorter
            x = (whole - first) * BP + tl.arange(0, BP)
            sums += _products(left, right, x, n, DTYPE, DOT, ONE_BLOCK, ALIGNED, True)
        block = stop
        t += 1
    pair = pair_of(task_block_a, task_block_b, tl.num_programs(2))
    pairs = tl.num_programs(2) * (tl.num_programs(2) + 1) // 2
    rows = tl.arange(0, BK)
    tile_ptr = partials_ptr + ((part_0 + part) * pairs + pair) * BK * BK
    tl.store(tile_ptr + rows[:, None] * BK + rows[None, :], sums)


@triton.jit
def pair_of(a, b, n_task_blocks):
    """The index of the pair of task blocks a <= b among all pairs, row by row."""
    return a * n_task_blocks - a * (a - 1) // 2 + b - a


@triton.jit
def sum_of_partials(
    partials_ptr,  # float64 [parts, pairs, BK, BK]
    row,  # the row of the block that this program sums
    task_block_a,
    task_block_b,
    n_task_blocks,
    n_parts,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # parts that are summed side by side
):
    """One row of one block of the Gram matrix, ``[BK]``, in a fixed order."""
    pair = pair_of(task_block_a, task_block_b, n_task_blocks)
    pairs = n_task_blocks * (n_task_blocks + 1) // 2
    column = tl.arange(0, BK)
    sums = tl.zeros([PARTS, BK], tl.float64)
    for begin in range(0, n_parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        tile = (part.to(tl.int64) * pairs + pair) * BK * BK
        sums += tl.load(
            partials_ptr + tile[:, None] + row * BK + column[None, :],
            mask=(part < n_parts)[:, None],
            other=0,
        )
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["n_tasks", "n_parts"])
def task_gram_kernel(
    partials_ptr,  # float64 [parts, pairs, BK, BK]
    matrix_ptr,  # float32 or float64 [K, K]
    n_tasks,
    n_parts,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    task_block_a = tl.program_id(2)
    task_block_b = tl.program_id(1)
    i = task_block_a * BK + row
    if (task_block_b < task_block_a) | (i >= n_tasks):
        return
    products = sum_of_partials(
        partials_ptr, row, task_block_a, task_block_b, tl.num_programs(2), n_parts, BK, PARTS
    )
    j = task_block_b * BK + tl.arange(0, BK)
    upper = (j >= i) & (j < n_tasks)
    products = products.to(matrix_ptr.dtype.element_ty)
    tl.store(matrix_ptr + i * n_tasks + j, products, mask=upper)
    tl.store(matrix_ptr + j * n_tasks + i, products, mask=upper)


class Settings(NamedTuple):
    """The sizes of the blocks, and the number of warps of a program."""

    tasks: int
    elements: int
    num_warps: int


def settings(n_tasks: int, dtype: torch.dtype, *, wide: bool) -> Settings:
    """Chooses the sizes of the blocks.

    ``wide`` means that some gradient is float64; blocks of tasks are then as small as its tiles.

    A chain of 32 sums in float32 has an error of at most 1e-6, if every rounding goes in the same
    direction. Tensor cores, which take bfloat16 and float16, round only every 16th sum.
    """
    tasks = 16 if wide else min(64, max(16, triton.next_power_of_2(n_tasks)))
    elements = {torch.float64: 16, torch.float32: 32}.get(dtype, 64)
    one = 4 if dtype == torch.float64 else 1
    return Settings(tasks, elements, {16: one, 32: 4, 64: 8}[tasks])


def dot_dtype(dtype: torch.dtype) -> tl.dtype | None:
    """The dtype of the operands of tl.dot: that of the gradients, which are multiplied exactly."""
    if dtype == torch.float64:
        return None
    # Triton's interpreter stores bfloat16 as integers, and would multiply the integers.
    return tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPES[dtype]


class Plan(NamedTuple):
    """The division of the first pass into programs. It depends on the sizes alone."""

    tables: list[Table]
    parts: list[int]  # of each table
    blocks_per_part: list[int]
    task_blocks: int
    block: int  # tasks of a block
    rows: list[Parameter]  # keeps the copies alive that the tables point to


def plan(gradients: list[Tensor], slots: list[int], n_tasks: int) -> Plan:
    """Cuts the gradients into blocks and parts."""
    by_dtype, _ = parameters_by_dtype(gradients, slots, n_tasks)
    wide = torch.float64 in by_dtype
    size = settings(n_tasks, torch.float32, wide=wide).tasks
    task_blocks = triton.cdiv(n_tasks, size)
    pairs = task_blocks * (task_blocks + 1) // 2
    # A part is large enough to be worth writing its sums, and all sums fit into 130 MB.
    least_elements = 128 * size
    most_parts = max(32, 65536 // (size * pairs))
    made = Plan([], [], [], task_blocks, size, [])
    for dtype, parameters in by_dtype.items():
        elements = settings(n_tasks, dtype, wide=wide).elements
        own = table(dtype, parameters, n_tasks, elements)
        blocks = max(least_elements // elements, triton.cdiv(own.n_blocks, most_parts))
        made.tables.append(own)
        made.blocks_per_part.append(blocks)
        made.parts.append(triton.cdiv(own.n_blocks, blocks))
        made.rows.extend(parameters)
    return made


def partials(made: Plan, tables: list[Tensor], n_tasks: int) -> Tensor:
    """Runs the first pass: float64 ``[parts, pairs, BK, BK]``. One launch per dtype."""
    pairs = made.task_blocks * (made.task_blocks + 1) // 2
    size = made.block
    result = torch.empty(
        sum(made.parts), pairs, size, size, dtype=torch.float64, device=tables[0].device
    )
    part_0 = 0
    wide = any(own.dtype == torch.float64 for own in made.tables)
    for own, entries, parts, blocks in zip(
        made.tables, tables, made.parts, made.blocks_per_part, strict=True
    ):
        _, elements, num_warps = settings(n_tasks, own.dtype, wide=wide)
        gram_partials_kernel[(parts, made.task_blocks, made.task_blocks)](
            entries,
            result,
            own.n_parameters,
            n_tasks,
            own.n_blocks,
            blocks,
            part_0,
            DTYPE=TRITON_DTYPES[own.dtype],
            DOT=dot_dtype(own.dtype),
            BK=size,
            BP=elements,
            ONE_BLOCK=made.task_blocks == 1,
            ALIGNED=own.aligned,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        part_0 += parts
    return result


def parts_at_once(size: int) -> int:
    """The number of parts that a program of the second pass sums side by side."""
    return 1024 // size


@torch.library.custom_op(
    "taskgroup_triton::task_gram",
    mutates_args=(),
    schema="(Tensor[] gradients, int[] slots, int n_tasks) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # see upload
)
def task_gram(gradients: list[Tensor], slots: list[int], n_tasks: int) -> Tensor:
    """Runs both passes; without elements the matrix is zero."""
    matrix = gradients[0].new_empty(n_tasks, n_tasks, dtype=gram_dtype(gradients))
    made = plan(gradients, slots, n_tasks)
    if not made.tables:
        return matrix.zero_()
    with on_device_of(matrix):
        tables = upload([own.entries for own in made.tables], matrix.device)
        sums = partials(made, tables, n_tasks)
        task_gram_kernel[(made.block, made.task_blocks, made.task_blocks)](
            sums,
            matrix,
            n_tasks,
            len(sums),
            BK=made.block,
            PARTS=parts_at_once(made.block),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return matrix


task_gram.register_fake(fake_gram)
