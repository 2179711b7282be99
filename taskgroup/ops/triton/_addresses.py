"""Tables of addresses in device memory, in which the kernels find the gradients."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Parameter(NamedTuple):
    """The gradients on one parameter, not empty, all with the same order of elements in memory."""

    rows: list[Tensor]
    tasks: list[int]
    out: Tensor | None = None  # receives the combination, in the same order of elements


class Table(NamedTuple):
    """The parameters of one dtype, as the kernels read them. It does not own what it points to."""

    dtype: torch.dtype
    entries: list[int]
    n_parameters: int
    n_blocks: int
    aligned: bool  # all rows start at multiples of 16 bytes


def parameters_by_dtype(
    gradients: list[Tensor], slots: list[int], n_tasks: int, out: list[Tensor] | None = None
) -> tuple[dict[torch.dtype, list[Parameter]], list[tuple[Tensor, Tensor]]]:
    """Sorts the flat list by parameter and dtype.

    Rows are copied if they are not dense, or if their strides differ from those of other rows of
    the parameter.

    Returns:
        The parameters by dtype, and pairs of a tensor of ``out`` that the kernel cannot write to
        and the buffer from which to fill it afterwards.
    """
    found: dict[int, Parameter] = {}
    for slot, gradient in zip(slots or range(len(gradients)), gradients, strict=True):
        t, k = divmod(slot, n_tasks)
        if gradient.numel():
            parameter = found.setdefault(t, Parameter([], [], out[t] if out else None))
            parameter.rows.append(gradient)
            parameter.tasks.append(k)
    by_dtype: dict[torch.dtype, list[Parameter]] = {}
    late = []
    for rows, tasks, target in found.values():
        laid_out = Parameter(rows, tasks, target)
        if not _in_one_order(rows if target is None else [*rows, target]):
            laid_out = Parameter([row.contiguous() for row in rows], tasks, target)
            if target is not None and not target.is_contiguous():
                buffer = torch.empty_like(target, memory_format=torch.contiguous_format)
                laid_out = laid_out._replace(out=buffer)
                late.append((target, buffer))
        by_dtype.setdefault(rows[0].dtype, []).append(laid_out)
    return by_dtype, late


def _in_one_order(tensors: list[Tensor]) -> bool:
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    first = tensors[0]
    if any(tensor.stride() != first.stride() for tensor in tensors):
        return False
    dense = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size == 1:
            continue
        if stride != dense:
            return False
        dense *= size
    return True


def table(dtype: torch.dtype, parameters: list[Parameter], n_tasks: int, block: int) -> Table:
    """Describes T parameters that are cut into blocks of ``block`` elements.

    The entries are: ``[T + 1]`` the first block of each parameter, ``[T]`` its number of elements,
    ``[T]`` the address of its result, ``[T, K]`` the addresses of its gradients, 0 for None.
    """
    starts, elements, results, addresses = [0], [], [], []
    for rows, tasks, out in parameters:
        n = rows[0].numel()
        starts.append(starts[-1] + -(-n // block))
        elements.append(n)
        results.append(0 if out is None else out.data_ptr())
        own = [0] * n_tasks
        for row, k in zip(rows, tasks, strict=True):
            own[k] = row.data_ptr()
        addresses.extend(own)
    aligned = all(address % 16 == 0 for address in [*results, *addresses])
    entries = [*starts, *elements, *results, *addresses]
    return Table(dtype, entries, len(parameters), starts[-1], aligned)


def upload(lists: list[list[int]], device: torch.device) -> list[Tensor]:
    """Copies lists to the device as int64, all in one asynchronous copy.

    The copy reads host memory that is freed after the call, so a CUDA graph cannot replay it.
    """
    joined = [entry for entries in lists for entry in entries]
    on_cuda = device.type == "cuda"
    if on_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "taskgroup's Triton backend cannot be captured in a CUDA graph here: it sends the "
            "addresses of the gradients to the device in every call. Call this op outside of the "
            "capture."
        )
    host = torch.tensor(joined, dtype=torch.int64, device="cpu", pin_memory=on_cuda)
    on_device = host.to(device, non_blocking=True)
    return list(on_device.split([len(entries) for entries in lists]))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def bits(number: float) -> int:
    """The bits of a float64. Triton would pass the number itself to a kernel in float32."""
    (integer,) = struct.unpack("q", struct.pack("d", number))
    return int(integer)


@triton.jit
def as_float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def parameter_of(starts_ptr, n_parameters, block):
    """The parameter of a block: the last parameter that starts at or before the block."""
    low = tl.zeros([], tl.int32)
    high = tl.zeros([], tl.int32) + n_parameters
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low
