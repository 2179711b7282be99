"""What a module asks of the step that it is run for: the part of a group that it may use."""

from __future__ import annotations

from typing import Protocol

from torch import nn

__all__ = ["Step"]


class Step(Protocol):
    """The step that a forward pass is for; every :class:`~taskgroup.Group` is one.

    Attributes:
        first: True for the first step of the batch.
    """

    first: bool

    @property
    def observed(self) -> tuple[str, ...]:
        """The tasks whose losses the step needs."""

    @property
    def graph(self) -> tuple[str, ...]:
        """The tasks whose losses must carry a graph."""

    def runs_first(self, module: nn.Module) -> bool:
        """Whether no step before this one, in its batch, has run the module; now it has."""

    def ran(self, model: nn.Module) -> None:
        """Say which model runs for this step."""
