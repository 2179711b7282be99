"""A grouping turns the affinity matrix into a partition of the tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Grouping"]


class Grouping:
    """What :class:`TaskGroups` asks of a grouping besides the call; all of it optional.

    Attributes:
        reads_affinity: False for a grouping that does not look at the matrix. Such a grouping
            holds from the first batch, without warm-up, and never adds a step to a batch.
        takes_nan: True for a grouping that wants NaN for entries that were never observed; others
            are given 0 there.
    """

    reads_affinity: bool = True
    takes_nan: bool = False

    def start(self, tasks: tuple[str, ...]) -> None:
        """Learn the names of the tasks; raise where they do not fit."""

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Labels, int64 ``[K]``, for an affinity matrix ``[K, K]``; None keeps the partition."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(matrix).")

    def state_dict(self) -> dict[str, Any]:
        """What must be saved for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: if ``state`` was written by another grouping.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"{type(self).__name__} expects the state {sorted(self.state_dict())}, got "
                f"{sorted(state)}; load the checkpoint with the grouping that wrote it."
            )
