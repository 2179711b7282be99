"""Reads the addresses of plain gradients in one pass of native code.

Passing a list of tensors to an op takes torch longer than most ops here run. The C functions that
torch offers for DLPack describe a tensor in a tenth of that time, and the op then takes one
address. Everything else is passed through torch: subclasses of Tensor, tensors with gaps in memory,
calls inside modes, transforms and traces, and every invalid argument, because that path raises the
error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from taskgroup.ops import _backend
from taskgroup.ops._gradient_list import Gradients

BACKENDS = ("cpp", "cuda", "triton", "reference")
ADDRESSED = ("cpp", "cuda")  # those that take an address


class ReadGradients(Protocol):
    """What was read; it keeps the tensors alive."""

    address: int
    like: Tensor  # any of the gradients
    first: list[Tensor | None]  # the first gradient of each parameter

    def keep_measured(self) -> list[int]:
        """Number the gradients by the tasks that have one alone, and return these tasks."""

    def read_outputs(self, outputs: Sequence[Tensor | None]) -> bool:
        """Where ``combine`` writes; False if they are not plain or do not fit the gradients."""


class _Reader(Protocol):
    def read(self, gradients: Gradients) -> ReadGradients | None: ...


def _make_reader() -> _Reader | None:
    if _backend.native.host is None:
        return None
    try:
        _is_intercepted()
        made: _Reader = _backend.native.host.GradientReader((torch.Tensor, nn.Parameter))
    except (AttributeError, RuntimeError):
        return None
    return made


def _is_intercepted() -> bool:
    """Whether somebody wants to see the op or replace its tensors: a mode, transform or trace.

    Raises:
        AttributeError: if this torch has other names for these functions, which are private.
    """
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


_reader = _make_reader()


def read_plain(gradients: Gradients) -> ReadGradients | None:
    """The gradients as the native backends take them, or None to pass them through torch.

    Args:
        gradients: ``[K][T]`` tensors or None.
    """
    if _reader is None or torch.compiler.is_compiling() or _is_intercepted():
        return None
    read = _reader.read(gradients)
    if read is None or _backend.preferred(read.like.device.type, BACKENDS) not in ADDRESSED:
        return None
    return read
