"""Every forward of a batch from the same random state."""

from __future__ import annotations

import torch

__all__ = ["RandomState"]


class RandomState:
    """The state of the generators a forward draws from: the CPU's and one GPU's.

    Args:
        device: of the losses; None where it is not known yet, then the current GPU's, if any.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._cpu = torch.get_rng_state()
        self._device: torch.device | int | None = None
        if device is not None and device.type == "cuda":
            self._device = device
        elif device is None and torch.cuda.is_initialized():
            self._device = torch.cuda.current_device()
        if self._device is not None:
            self._gpu = torch.cuda.get_rng_state(self._device)

    def replay(self) -> None:
        """Go back to the state as it was."""
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)
