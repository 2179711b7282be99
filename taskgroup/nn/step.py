"""The step that a module runs for: what the module asks it, and what it reports to it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

__all__ = ["Step", "check_step"]


class Step(Protocol):
    """The step that a forward pass is for; every :class:`~taskgroup.Group` is one."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the step is taken on."""

    @property
    def graph(self) -> tuple[str, ...]:
        """The tasks whose losses must have a graph: those of the step, and those it measures."""

    @property
    def observed(self) -> tuple[str, ...]:
        """The tasks whose losses the step needs."""

    def runs_first(self, module: nn.Module) -> bool:
        """Report that a module runs; False if an earlier step of this batch has run it."""

    def ran(self, model: Any) -> None:  # a MultiTaskModel, whose module imports this one
        """Report the model that runs for this step."""


def check_step(group: object) -> None:
    """Raise unless this is the step that a forward pass is for."""
    if not hasattr(group, "runs_first"):  # not "observed", which lists up to K tasks
        raise TypeError(
            f"group= takes the group of the loop, for group in groups, got {group!r}; leave it out "
            "to run every head."
        )
