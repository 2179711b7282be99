"""The backends that the tests of the ops run.

The Triton kernels run in Triton's interpreter, which must be enabled before Triton is imported:
``TRITON_INTERPRET=1 pytest -k triton``. tests/ops/test_triton_interpreter.py does so.
"""

import ctypes
import importlib
import os
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cpp", "reference", *(["triton"] if INTERPRETED else [])]

# The flags in /proc/cpuinfo, by the names that TASKGROUP_CPU_ISA takes.
INSTRUCTION_SETS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f"},
    "avx512bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}


def instruction_sets() -> list[str]:
    """The instruction sets that the C++ code must find here, according to the operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    has = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    found = ["portable"]
    for name, flags in INSTRUCTION_SETS.items():  # each includes the ones before it
        if not flags <= has or (name == "amx" and not may_use_tiles()):
            break
        found.append(name)
    return found


def may_use_tiles() -> bool:
    """Whether Linux lets this process use the matrix tiles of AMX."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


WITH_OPS = [backend for backend in BACKENDS if backend != "reference"]


def backends_op(backend: str, name: str):
    """The registered op itself, without the Python function around it."""
    if backend == "cpp":
        return getattr(torch.ops.taskgroup, name).default
    importlib.import_module(f"taskgroup.ops.triton.{name.rstrip('_')}")
    return getattr(torch.ops.taskgroup_triton, name).default


def examples(n: int) -> int:
    """The number of hypothesis examples: fewer in the interpreter, which is slow."""
    return n // 10 if INTERPRETED else n
