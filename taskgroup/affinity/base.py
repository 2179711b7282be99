"""The affinity matrix: how far the step of one task changes the loss of another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskgroup._losses import Losses

__all__ = ["Affinity", "Losses"]


class Affinity:
    """A moving average of the effect of every task on every other: base of the affinities.

    Args:
        decay: the weight of a new observation, in (0, 1].

    Attributes:
        matrix: float32 ``[K, K]``, a copy; row i is the effect of stepping task i, column k the
            effect on task k. Zero at the start; on the device of the losses once they have been
            seen.
        observed: int64 ``[K, K]``, a copy on the same device: how often each entry was observed;
            0 where it never was.
        decay: the weight of a new observation.
        every: rounds of a task from one measurement of its gradient to the next; None for an
            affinity that takes no gradients.
        reads_steps: True where :class:`taskgroup.TaskGroups` must show it what a step did,
            which takes two steps in a batch.
    """

    reads_steps = False
    every: int | None = None
    _matrix: Tensor
    _observed: Tensor  # int32 [K, K]
    _complete: bool  # every entry was observed, as far as is known

    def __init__(self, decay: float) -> None:
        name = type(self).__name__
        if isinstance(decay, bool) or not isinstance(decay, int | float | np.floating):
            raise TypeError(f"{name} takes decay as a number in (0, 1], got {decay!r}.")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}.")
        if 0.9 <= decay < 1.0:
            warnings.warn(
                f"{name}(decay={decay:g}) gives the newest observation a weight of {decay:g} and "
                f"nearly forgets all others. To keep {decay:g} of the average at every "
                f"observation, as in momentum={decay:g}, write decay={1 - decay:.4g}.",
                stacklevel=3,
            )
        self.decay = float(decay)

    @property
    def matrix(self) -> Tensor:  # noqa: D102 (documented by the class)
        return self._matrix.clone()

    @property
    def observed(self) -> Tensor:  # noqa: D102 (documented by the class)
        return self._observed.long()

    def known(self) -> Tensor:
        """The matrix with NaN where nothing was observed, as groupings that take NaN read it."""
        if self._complete:
            return self.matrix
        observed = self._observed > 0
        if observed.device.type == "cpu":  # elsewhere it would have to be waited for
            self._complete = bool(observed.all())
        return torch.where(observed, self.matrix, math.nan)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Begin with zeros for these tasks; :class:`TaskGroups` calls it once.

        Raises:
            RuntimeError: if another :class:`TaskGroups` uses this object already.
        """
        if hasattr(self, "_matrix"):
            raise RuntimeError(
                f"This {type(self).__name__} already belongs to a TaskGroups; make a new one for "
                "each."
            )
        shape = (len(tasks), len(tasks))
        self._matrix = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._observed = torch.zeros(shape, dtype=torch.int32, device="cpu")
        self._complete = False

    def to(self, device: torch.device) -> None:
        """Move to ``device``, the one of the losses, without waiting for it."""
        if self._matrix.device != device:
            self._matrix = self._matrix.to(device, non_blocking=True)
            self._observed = self._observed.to(device, non_blocking=True)

    def draw(self, present: Sequence[int]) -> tuple[int, ...]:
        """Which of the tasks at these positions to measure by their gradients, now that it is due.

        Called only where :attr:`every` is a number.
        """
        return tuple(present)

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`state_dict` copies, on the devices where it lies."""
        return {"matrix": self._matrix, "observed": self._observed}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: copies, on the CPU."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, for the same number of tasks.

        Raises:
            ValueError: if ``state`` is not of such an affinity, or of other tasks. Nothing has
                changed then.
        """
        kept = self.tensors()
        for name, value in kept.items():
            other = state.get(name)
            if (
                set(state) != set(kept)
                or not isinstance(other, Tensor)
                or other.shape != value.shape
                or other.dtype != value.dtype
            ):
                raise ValueError(
                    f"The state of a {type(self).__name__} holds a {value.dtype} {name} of shape "
                    f"{list(value.shape)}, got keys {sorted(state)}; load the checkpoint with the "
                    "affinity that wrote it."
                )
        self._load({name: value.detach().to("cpu", copy=True) for name, value in state.items()})

    def _load(self, state: dict[str, Tensor]) -> None:
        """Take over copies that have been checked."""
        self._matrix = state["matrix"]
        self._observed = state["observed"]
        self._complete = False
