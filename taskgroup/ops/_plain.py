"""Reads gradients that are plain tensors in one pass of native code.

To pass a list of tensors to an op of torch takes longer than most ops here run. Torch describes a
tensor to native code at a tenth of that (the C functions of DLPack); the op gets the address of
what was read. Whatever is more than a plain tensor takes the way through torch: classes of their
own, modes and transforms that want to see the op, gaps in memory, and every mistake, since that way
says what is wrong.
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
    first: list[Tensor | None]  # of each parameter the first gradient

    def measured(self) -> list[int]:
        """The tasks that have a gradient; from now on the gradients are those of these alone."""

    def read_outputs(self, outputs: Sequence[Tensor | None]) -> bool:
        """Where ``combine`` writes; False if they are not plain or do not fit the gradients."""


class _Reader(Protocol):
    def read(self, gradients: Gradients) -> ReadGradients | None: ...


def _make_reader() -> _Reader | None:
    if _backend.native.host is None:
        return None
    try:
        # Torch keeps the last two to itself; without them nobody says whether a mode is active.
        torch._C._len_torch_dispatch_stack()
        torch._C._functorch.peek_interpreter_stack()
        made: _Reader = _backend.native.host.GradientReader((torch.Tensor, nn.Parameter))
    except (AttributeError, RuntimeError):
        return None
    return made


_reader = _make_reader()


def read_plain(gradients: Gradients) -> ReadGradients | None:
    """The gradients as the native backends take them, or None where they must go through torch.

    Args:
        gradients: ``[K][T]`` tensors or None.
    """
    if (
        _reader is None
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return None
    read = _reader.read(gradients)
    if read is None or _backend.preferred(read.like.device.type, BACKENDS) not in ADDRESSED:
        return None
    return read
