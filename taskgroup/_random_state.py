"""Several forward passes from the same random state."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RandomState"]


class RandomState:
    """The state of the generators that a forward pass uses: the CPU's and one accelerator's.

    Args:
        device: the device of the losses. If it is None, because it is not known yet, the current
            accelerator, if this process uses one.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._cpu = torch.get_rng_state()
        self._device = _in_use() if device is None else device
        module = _random_of(self._device)
        self._state = None if module is None else module.get_rng_state(self._device)

    def replay(self) -> None:
        """Return to the state at the time this object was made."""
        torch.set_rng_state(self._cpu)
        if self._state is not None:
            _random_of(self._device).set_rng_state(self._state, self._device)


def _random_of(device: torch.device | None) -> Any:
    """The module of the device, such as ``torch.cuda``; None if it has no generator of its own."""
    if device is None or device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


def _in_use() -> torch.device | None:
    """The current accelerator; None if there is none, or this process has not initialised it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    started = getattr(torch.get_device_module(accelerator), "is_initialized", None)
    if started is not None and not started():
        return None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
