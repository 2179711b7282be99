"""A fake GPU: its tensors claim to be on a GPU, and operations that would wait for it are recorded.

``FakeGPU`` is a context in which ``"cuda"`` exists. Its tensors hold their numbers on the host, so
a training loop learns what it would learn on a GPU. An operation that mixes tensors of the host and
of the GPU fails as it would on a GPU. Each operation for which the host would have to wait for the
GPU is recorded, with the line that called it. So tests find a new synchronisation on any machine.

These operations of torch's CUDA backend wait:

- reading a number on the host (``item``, ``bool``, ``tolist``),
- a copy to the host, unless it is non-blocking and goes to pinned memory,
- a copy from the host, unless it is non-blocking and comes from pinned memory or is small enough
  for the driver to stage by itself,
- operations whose result has a shape that depends on the values.

Not recorded are waits inside a kernel library and the allocation of memory. Autocast does nothing
here.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from taskgroup.ops import _backend

CUDA = torch.device("cuda", 0)
STAGED = 2**16  # bytes of pageable memory that the driver takes without waiting

_aten = torch.ops.aten
# The values decide the shape of the result, or the host reads them.
_WAITING = {
    _aten._local_scalar_dense,
    _aten.item,
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten._unique,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten.bincount,
    _aten.histc,
    _aten.repeat_interleave,
    _aten.linalg_eigh,
    _aten._linalg_eigh,
    _aten.linalg_solve_ex,
    _aten.linalg_inv_ex,
}
# They allocate memory, and start nothing.
_ALLOCATING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_COPIES = {_aten._to_copy, _aten.copy_, _aten._copy_from}
_FROM_NUMBERS = ("tensor", "as_tensor", "asarray")  # they copy in a way that no mode sees
_VIEWS_OF_DEVICE = {"device", "is_cuda", "is_meta", "is_cpu"}


class OnGPU(torch.Tensor):
    """A tensor on the fake GPU: torch's C++ code sees it on the meta device, Python on cuda:0."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGPU:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="meta",
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class FakeGPU:
    """A context with a fake GPU, which records the operations that would wait for it.

    Attributes:
        waits: for each wait, the operation and the line of the caller.
        planned: the number of waits for an event.
        launches: the operations so far that start a kernel on the GPU, or copy within its memory.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.planned = 0
        self.launches: list[str] = []
        self._recorded = self._reached = 0  # the number of an event
        self._stack = ExitStack()

    def wait(self, what: str) -> None:
        """Record that the host would wait."""
        inside = [
            frame
            for frame in traceback.extract_stack()
            if "torch" not in frame.filename.split("/") and "fake_gpu" not in frame.filename
        ]
        where = inside[-1] if inside else None
        self.waits.append(f"{what} at {where.filename}:{where.lineno}" if where else what)

    def __enter__(self) -> FakeGPU:
        global _gpu
        assert _gpu is None
        enter = self._stack.enter_context
        _gpu = self
        self._stack.callback(_forget)
        for name, fake in self._cuda().items():
            enter(mock.patch.object(torch.cuda, name, fake, create=True))
        if _backend.native.host is not None:  # the C++ kernels stand in for those of the GPU
            there = _backend.Backend(("cuda",))
            enter(mock.patch.dict(_backend.BACKENDS, {"cuda": there}))
        enter(_Dispatch())
        enter(_Functions())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def _cuda(self) -> dict[str, Any]:
        gpu = self

        class Event:
            """An event that is reached once somebody waits for it or for a later event."""

            def __init__(self, enable_timing=False, blocking=False):
                self.enable_timing = enable_timing
                self.at = None

            def record(self, stream=None):
                gpu._recorded += 1
                self.at = gpu._recorded

            def query(self):
                return self.at <= gpu._reached

            def synchronize(self):
                if not self.query():
                    gpu.planned += 1
                    gpu._reached = self.at

            def elapsed_time(self, end):
                if not (self.query() and end.query() and self.enable_timing and end.enable_timing):
                    raise RuntimeError("elapsed_time of events that were not reached, or not timed")
                return float(end.at - self.at)  # milliseconds

        return {
            "Event": Event,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "current_stream": lambda device=None: None,
            "is_bf16_supported": lambda including_emulation=True: True,
            "synchronize": lambda device=None: gpu.wait("synchronize"),
            # One generator stands for both; both are used in the same order.
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "memory_allocated": lambda device=None: 1000,
            "max_memory_allocated": lambda device=None: 5000,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
        }


_gpu: FakeGPU | None = None


def _forget() -> None:
    global _gpu
    _gpu = None


class _Functions(TorchFunctionMode):
    """Changes each call before torch's C++ code sees it: there "cuda" is the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and args and isinstance(args[0], OnGPU):
            asked = getattr(owner, "__name__", "")
            if asked in _VIEWS_OF_DEVICE:
                return {"device": CUDA, "is_cuda": True}.get(asked, False)
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0].to("meta", *args[2:], **kwargs)
        if name == "cpu" and args and isinstance(args[0], OnGPU):
            return args[0].to("cpu")
        if name in ("tolist", "numpy", "__array__") and args and isinstance(args[0], OnGPU):
            _gpu.wait(name)
            with torch._C.DisableTorchFunction():
                return func(args[0].held, *args[1:], **kwargs)
        if name == "data_ptr" and args and isinstance(args[0], OnGPU):
            return args[0].held.data_ptr()
        if name in _FROM_NUMBERS and kwargs.get("device") is not None:
            learns = kwargs.pop("requires_grad", False)
            device = kwargs.pop("device")
            return func(*args, **kwargs, device="cpu").to(_to_meta(device)).requires_grad_(learns)
        if name == "new_tensor" and isinstance(args[0], OnGPU):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to("meta")
        pinned = kwargs.pop("pin_memory", False)
        if name in ("pin_memory", "is_pinned"):
            held = args[0]
            assert not isinstance(held, OnGPU)
            if name == "is_pinned":
                return _is_pinned(held)
            pinned, made = True, held.clone()
        else:
            if "device" in kwargs:
                kwargs["device"] = _to_meta(kwargs["device"])
            made = func(*(map(_to_meta, args) if name == "to" else args), **kwargs)
        if pinned:
            made.in_pinned_memory = True
        return made


def _is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "in_pinned_memory", False)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("meta")
    return "meta" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class _Dispatch(TorchDispatchMode):
    """Sees every operation of torch's C++ code, including factories without tensor arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    device = kwargs.get("device")
    to_gpu = bool(on_gpu) if device is None else torch.device(device).type == "meta"
    if not on_gpu and not to_gpu:
        return func(*args, **kwargs)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    packet = func.overloadpacket
    if packet in _COPIES:
        _note_copy(packet, args, kwargs, to_gpu)
    else:
        _note_wait(packet, args)
        if not func.is_view and packet not in _ALLOCATING:
            _gpu.launches.append(str(packet))
        for tensor in tensors:
            assert isinstance(tensor, OnGPU) or not tensor.is_meta, f"{func}: not made by FakeGPU"
            # A kernel launch can pass a number from the host, but not a tensor.
            if not isinstance(tensor, OnGPU) and tensor.dim() > 0 and packet not in _INDEXING:
                raise RuntimeError(
                    f"{func} got a tensor of shape {list(tensor.shape)} on the host and another "
                    "on the GPU."
                )
    made = func(*map(_held, args), **{key: _held(value) for key, value in kwargs.items()})
    if not to_gpu:
        return made
    of = {id(tensor.held): tensor for tensor in on_gpu}  # to recognize in-place results
    if isinstance(made, (list, tuple)):
        return type(made)(_on_gpu(value, of) for value in made)
    return _on_gpu(made, of)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _held(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_held(item) for item in value]
    return value.held if isinstance(value, OnGPU) else value


def _on_gpu(value: Any, of: dict[int, OnGPU]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_gpu(item, of) for item in value]
    if not isinstance(value, torch.Tensor) or isinstance(value, OnGPU):
        return value
    return of[id(value)] if id(value) in of else OnGPU(value)


def _note_copy(packet: Any, args: Any, kwargs: dict[str, Any], to_gpu: bool) -> None:
    if packet is _aten._to_copy:
        source, target, non_blocking = args[0], None, kwargs.get("non_blocking", False)
        from_gpu = isinstance(source, OnGPU)
    else:
        target, source = args[:2]
        from_gpu, to_gpu = isinstance(source, OnGPU), isinstance(target, OnGPU)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    if from_gpu == to_gpu:
        return
    if from_gpu:
        if not non_blocking or not _is_pinned(target):
            _gpu.wait("a copy to the host")
    elif not non_blocking:
        _gpu.wait("a copy from the host")
    elif not _is_pinned(source) and source.nbytes > STAGED:
        _gpu.wait(f"a copy of {source.nbytes} bytes from memory that is not pinned")


def _note_wait(packet: Any, args: Any) -> None:
    if packet in _WAITING:
        _gpu.wait(f"{packet}")
    if packet in _INDEXING:
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8):
                _gpu.wait(f"{packet} by a mask")
            elif not isinstance(index, OnGPU) and isinstance(args[0], OnGPU):
                _gpu.wait(f"{packet} by an index on the host")
