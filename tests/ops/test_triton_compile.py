"""Every Triton kernel is compiled to machine code, for GPUs that need not be here."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taskgroup.ops.triton import affinity_update, combine, gram_affinity_update, task_gram
from taskgroup.ops.triton._addresses import TRITON_DTYPES
from tests.random_gradients import DTYPES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITIES = [80, 90, 100]
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}


def compiled(kernel, capability, arguments, constants, num_warps, *, fp_fusion=False):
    """``arguments``: type by name, in the order of the kernel's parameters."""
    pointers = [n for n, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    pointers = [n for n in pointers if kernel.arg_names[n] not in constants]  # None
    source = ASTSource(
        kernel,
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in pointers},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": fp_fusion}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert set(kernel.arg_names) == {*arguments, *constants}
    return result.asm["ptx"], result.asm["cubin"]


@pytest.fixture
def assert_no_spills(tmp_path):
    """Registers that do not fit go to local memory, which is slow."""

    def check(cubin):
        file = tmp_path / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.check_output([CUOBJDUMP, "-res-usage", file], text=True)
        assert re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage) == [("0", "0")], usage

    return check


def compiled_gram_partials(capability, n_tasks, dtype, *, aligned=True):
    settings = task_gram.settings(n_tasks, dtype, wide=dtype == torch.float64)
    integers = ["n_parameters", "n_tasks", "n_blocks", "blocks_per_part", "part_0"]
    return compiled(
        task_gram.gram_partials_kernel,
        capability,
        {"table_ptr": "*i64", "partials_ptr": "*fp64", **dict.fromkeys(integers, "i32")},
        {
            "DTYPE": TRITON_DTYPES[dtype],
            "DOT": task_gram.dot_dtype(dtype),
            "BK": settings.tasks,
            "BP": settings.elements,
            "ONE_BLOCK": n_tasks <= settings.tasks,
            "ALIGNED": aligned,
        },
        settings.num_warps,
        fp_fusion=True,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("n_tasks", "dtype"),
    [
        *itertools.product([11, 32, 130], [torch.float32, torch.bfloat16]),
        *itertools.product([11, 130], [torch.float64, torch.float16]),
    ],
    ids=str,
)
def test_gram_partials(capability, n_tasks, dtype, assert_no_spills):
    wide = dtype == torch.float64
    settings = task_gram.settings(n_tasks, dtype, wide=wide)
    ptx, cubin = compiled_gram_partials(capability, n_tasks, dtype)
    assert_no_spills(cubin)
    if dtype in (torch.bfloat16, torch.float16):
        # Half a warp of tasks is too few for the wide products of later GPUs.
        assert re.search(TENSOR_CORES[capability if settings.tasks == 64 else 80], ptx)
    elif dtype == torch.float32:
        assert not re.search("tf32", ptx)
    if not wide:  # 16 bytes at a time, on their way while others are multiplied
        assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize(("n_tasks", "dtype"), [(11, torch.bfloat16), (130, torch.float32)])
def test_gram_partials_of_unaligned_gradients(n_tasks, dtype, assert_no_spills):
    ptx, cubin = compiled_gram_partials(90, n_tasks, dtype, aligned=False)
    assert_no_spills(cubin)
    assert "cp.async.cg.shared.global" not in ptx  # 16 bytes at a time


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("size", [16, 64])
def test_second_passes(capability, size, assert_no_spills):
    constants = {"BK": size, "PARTS": task_gram.parts_at_once(size)}
    integers = {"n_tasks": "i32", "n_parts": "i32"}
    for matrix in ("*fp32", "*fp64"):
        arguments = {"partials_ptr": "*fp64", "matrix_ptr": matrix, **integers}
        _, cubin = compiled(task_gram.task_gram_kernel, capability, arguments, constants, 4)
        assert_no_spills(cubin)
    integers = dict.fromkeys(["n_tasks", "n_measured", "n_parts"], "i32")
    kernel = gram_affinity_update.gram_affinity_update_kernel
    for losses, observed in (("*fp32", "*i32"), ("*fp64", "*i32"), ("*fp32", None)):
        arguments = {"partials_ptr": "*fp64", "matrix_ptr": "*fp32", "tasks_ptr": "*i64"}
        arguments |= {"losses_ptr": losses, **integers, "decay_bits": "i64", "lr_bits": "i64"}
        own = {**constants}
        (arguments if observed else own)["observed_ptr"] = observed
        _, cubin = compiled(kernel, capability, arguments, own, 4)
        assert_no_spills(cubin)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(capability, dtype, assert_no_spills):
    ptx, cubin = compiled(
        combine.combine_kernel,
        capability,
        {"table_ptr": "*i64", "weights_ptr": "*fp32", "n_parameters": "i32", "n_tasks": "i32"},
        {
            "DTYPE": TRITON_DTYPES[dtype],
            "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
            "BLOCK": combine.BLOCK,
            "ALIGNED": True,
        },
        combine.NUM_WARPS,
    )
    assert_no_spills(cubin)
    wide = r"global\.v2\.b64" if dtype == torch.float64 else r"global\.v4\.b32"
    assert re.search("ld." + wide, ptx)
    assert re.search("st." + wide, ptx)
    if dtype == torch.bfloat16:  # to the nearest, which the interpreter does not do
        assert re.search(r"cvt\.rn\.bf16", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("n_tasks", [11, 1024])
@pytest.mark.parametrize(
    ("losses", "observed"), [("*fp32", "*i32"), ("*fp64", "*i32"), ("*fp32", None)]
)
def test_affinity_update(capability, n_tasks, losses, observed, assert_no_spills):
    rows, block, num_warps = affinity_update.settings(n_tasks)
    pointers = {"matrix_ptr": "*fp32", "before_ptr": losses, "after_ptr": losses, "mask_ptr": "*u8"}
    constants = {"ROWS": rows, "BLOCK": block}
    (pointers if observed else constants)["observed_ptr"] = observed
    _, cubin = compiled(
        affinity_update.affinity_update_kernel,
        capability,
        {**pointers, "n_tasks": "i32", "decay_bits": "i64"},
        constants,
        num_warps,
    )
    assert_no_spills(cubin)


@pytest.mark.parametrize(
    ("n_tasks", "shapes"), [(3, [5]), (11, [2**24, 7]), (64, [2**22]), (1024, [3000] * 3)]
)
def test_parts_hold_every_block_and_their_sums_fit(n_tasks, shapes):
    rows = [torch.empty(n) for n in shapes for _ in range(n_tasks)]
    plan = task_gram.plan(rows, [], n_tasks)
    (table,), (parts,), (blocks,) = plan.tables, plan.parts, plan.blocks_per_part
    assert table.n_blocks == sum(-(-n // 32) for n in shapes)
    assert (parts - 1) * blocks < table.n_blocks <= parts * blocks
    pairs = plan.task_blocks * (plan.task_blocks + 1) // 2
    assert parts * pairs * plan.block**2 * 8 < 150e6
