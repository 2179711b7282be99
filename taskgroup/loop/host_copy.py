"""How numbers reach the host without stopping the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "waits_for"]


def waits_for(device: torch.device) -> bool:
    """Whether the host has to wait for this device to read a number from it."""
    return device.type == "cuda"


class HostCopy:
    """A copy of some tensors on its way from the GPU to pinned memory.

    The copy is queued on the current stream at once. :meth:`wait` blocks until it is done, not
    until the work that was queued after it is. Copying and pickling this object wait as well.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        # One tensor, one transfer. float32 survives the way through float64 bitwise.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._flat = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
        self._flat.copy_(flat, non_blocking=True)
        self._event: torch.cuda.Event | None = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(flat.device))

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return {**self.__dict__, "_event": None}  # an event cannot be copied

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in the order they were given."""
        if self._event is not None:
            self._event.synchronize()
        parts = self._flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
