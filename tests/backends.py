"""Which backends the tests of the ops run.

The Triton kernels run in Triton's interpreter, which must be asked for before Triton is imported:
``TRITON_INTERPRET=1 pytest -k triton``. tests/ops/test_triton_interpreter.py does so.
"""

import importlib
import os
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cpp", "reference", *(["triton"] if INTERPRETED else [])]


def instruction_sets() -> list[str]:
    """Those that the C++ code must find here, by what the operating system says."""
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
    """The op itself, without its Python face."""
    if backend == "cpp":
        return getattr(torch.ops.taskgroup, name).default
    importlib.import_module(f"taskgroup.ops.triton.{name.rstrip('_')}")
    return getattr(torch.ops.taskgroup_triton, name).default


def examples(n: int) -> int:
    """Of hypothesis: the interpreter takes milliseconds per program."""
    return n // 10 if INTERPRETED else n
