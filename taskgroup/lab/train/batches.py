"""The training batches of a run, on the device that it trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from taskgroup.lab.problem import Batch, Problem
from taskgroup.lab.recipe import Recipe

__all__ = ["Batches"]


class Batches:
    """An endless iterator of a problem's training batches, sent to a device without waiting.

    Each batch of the problem comes as often in a row as the recipe's ``batch_repeats`` says. The
    first ``drawn`` batches, which a run has drawn before, are passed over. The attribute ``drawn``
    counts all batches drawn so far.
    """

    def __init__(
        self, problem: Problem, recipe: Recipe, device: torch.device, drawn: int = 0
    ) -> None:
        self.drawn = drawn
        self._device = device
        self._repeats = recipe.batch_repeats
        self._stream = problem.batches(recipe.batch_size, recipe.seed, drawn // self._repeats)
        self._loaded: Batch | None = None  # the last batch of the stream
        self._ahead: Batch | None = None  # the next batch, if it is loaded
        self._error: Exception | None = None  # raised while it was loaded

    def __next__(self) -> Batch:
        batch, self._ahead = self.peek(), None
        self.drawn += 1
        return batch

    def peek(self) -> Batch:
        """The next batch, which stays the next one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._ahead is None:
            if self._loaded is None or self.drawn % self._repeats == 0:
                self._loaded = tree_map(self._send, next(self._stream))
            self._ahead = self._loaded
        return self._ahead

    def load_ahead(self) -> None:
        """Load the next batch; an error is raised when that batch is asked for."""
        try:
            self.peek()
        except Exception as error:  # the batch before it must be counted first
            self._error = error

    def _send(self, tensor: Any) -> Any:
        if isinstance(tensor, Mapping):  # one that torch does not know, as of Hugging Face
            return tree_map(self._send, dict(tensor))
        if not isinstance(tensor, Tensor):  # such as the name of a file
            return tensor
        if self._device.type == "cuda" and not tensor.is_pinned():
            # Copies the tensor's own numbers alone, if it is a part of a larger one.
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        return tensor.to(self._device, non_blocking=True)
