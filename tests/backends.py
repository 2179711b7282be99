"""The backends that the tests of the ops run.

The Triton kernels run in Triton's interpreter, which must be enabled before Triton is imported:
``TRITON_INTERPRET=1 pytest -k triton``. tests/ops/test_triton_interpreter.py does so.
"""

import importlib
import os
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cpp", "reference", *(["triton"] if INTERPRETED else [])]


def instruction_sets() -> list[str]:
    """The instruction sets that the C++ code must find here, according to the operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    has = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    found = ["portable"]
    for name, flags in (("avx2", {"avx2", "fma"}), ("avx512", {"avx2", "fma", "avx512f"})):
        if flags <= has:
            found.append(name)
    return found


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
