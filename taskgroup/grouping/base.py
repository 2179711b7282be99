"""The base class of groupings, which turn the affinity matrix into a partition of the tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Grouping"]


class Grouping:
    """The base class of groupings: a call, and optional methods for :class:`TaskGroups`.

    Attributes:
        reads_affinity: False for a grouping that does not use the matrix. Such a grouping applies
            from the first batch, without warm-up, and never adds a step to a batch.
        takes_nan: True for a grouping that expects NaN for entries that were never observed; other
            groupings get 0 there.
    """

    reads_affinity: bool = True
    takes_nan: bool = False

    def start(self, tasks: tuple[str, ...]) -> None:
        """Take the names of the tasks; raise an error if they do not fit."""

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Return labels, int64 ``[K]``, for an affinity ``[K, K]``; None keeps the partition."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(matrix).")

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an exact resume needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned.

        Raises:
            ValueError: if ``state`` was written by another grouping.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"{type(self).__name__} expects the state {sorted(self.state_dict())}, got "
                f"{sorted(state)}; load the checkpoint with the grouping that wrote it."
            )
