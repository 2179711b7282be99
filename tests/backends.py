"""Which backends the tests of the ops run.

The Triton kernels run in Triton's interpreter, which must be asked for before Triton is imported:
``TRITON_INTERPRET=1 pytest -k triton``. tests/ops/test_triton_interpreter.py does so.
"""

import importlib
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cpp", "reference", *(["triton"] if INTERPRETED else [])]

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
