"""Reads the addresses of plain tensors in one pass of native code.

torch takes longer to pass a list of tensors to an op than most ops here take to run. Its C
functions for DLPack describe a tensor in a tenth of that time, and the op then takes a single
address. All other calls pass their arguments through torch: subclasses of Tensor, tensors with gaps
in memory, calls inside modes, transforms and traces, and invalid arguments, for which that path
raises the error that names the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from taskgroup.ops import _backend
from taskgroup.ops._gradient_list import Gradients

if TYPE_CHECKING:  # importing it takes a millisecond
    from numpy.typing import NDArray

BACKENDS = ("cpp", "cuda", "triton", "reference")
ADDRESSED = ("cpp", "cuda")  # the backends that take an address


class ReadGradients(Protocol):
    """The gradients that were read. The object keeps the tensors alive."""

    address: int
    like: Tensor  # one of the gradients
    first: list[Tensor | None]  # the first gradient of each parameter

    def keep_measured(self) -> list[int]:
        """Leave out the tasks without any gradient, and return the other tasks."""

    def read_outputs(self, outputs: Sequence[Tensor | None]) -> bool:
        """Read the tensors that ``combine`` writes to; False if not plain, or of another shape."""


class _Reader(Protocol):
    def read(self, gradients: Gradients) -> ReadGradients | None: ...

    def read_scalars(
        self, scalars: dict[str, Tensor], names: tuple[str, ...]
    ) -> NDArray[Any] | None: ...

    def update_affinity(
        self,
        matrix: Tensor,
        before: Tensor,
        after: Tensor,
        mask: Tensor,
        decay: float,
        observed: Tensor,
    ) -> bool: ...


def _make_reader() -> _Reader | None:
    if _backend.native.host is None:
        return None
    try:
        _is_intercepted()
        made: _Reader = _backend.native.host.TensorReader((torch.Tensor, nn.Parameter))
    except (AttributeError, RuntimeError):
        return None
    return made


def _is_intercepted() -> bool:
    """Whether a mode, transform or trace intercepts the op or replaces its tensors.

    Raises:
        AttributeError: if this version of torch has renamed these private functions.
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
    """Reads the gradients for the native backends; None if they must pass through torch."""
    if _reader is None or torch.compiler.is_compiling() or _is_intercepted():
        return None
    read = _reader.read(gradients)
    if read is None or _backend.preferred(read.like.device.type, BACKENDS) not in ADDRESSED:
        return None
    return read


def read_scalars(scalars: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    """Copies scalars on the CPU into one tensor ``[n]``, float32 or float64, without a graph.

    None if they must pass through torch, do not have the same of these dtypes, or are not those of
    ``names``, in the same order; and if the backend is ``"reference"``, which is plain PyTorch.
    """
    # Modes need not see this read. The tensors of transforms and fake tensors are not plain.
    if (
        type(scalars) is not dict
        or _reader is None
        or _backend.requested() == "reference"
        or torch.compiler.is_compiling()
    ):
        return None
    read = _reader.read_scalars(scalars, names)
    return None if read is None else torch.from_numpy(read)


def update_plain(
    matrix: Tensor, before: Tensor, after: Tensor, mask: Tensor, decay: float, observed: Tensor
) -> bool:
    """Updates an affinity matrix on the CPU, in a fifth of the time that the op takes.

    False, and nothing has changed, if the arguments must pass through torch.
    """
    # Modes need not see this update, which is part of the loop.
    if (
        _reader is None
        or _backend.requested() not in (None, "cpp")
        or torch.compiler.is_compiling()
    ):
        return False
    return _reader.update_affinity(matrix, before, after, mask, decay, observed)
