"""The published code's rule for whose step changed a loss, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import taskgroup as tg

__all__ = ["PublishedCredit"]


class PublishedCredit(tg.Grouping):
    """Groups by an affinity that credits a change of loss to the group about to be stepped on.

    The change was caused by the step on the group before it; so did the published runs of
    "Selective Task Group Updates for Multi-Task Optimization" (ICLR 2025). The first group of a
    batch gets nothing. On planted problems this finds the true groups in no batch.

    It stands in for the grouping of a :class:`taskgroup.TaskGroups` and is shown every step.

    Args:
        n_tasks: K.
        decay: of the affinity.
        grouping: from affinity to partition.
    """

    def __init__(
        self, n_tasks: int, decay: float, grouping: Callable[[Tensor], Tensor | None]
    ) -> None:
        self._matrix = torch.zeros(n_tasks, n_tasks, dtype=torch.float32, device="cpu")
        self._decay = decay
        self._grouping = grouping
        self._before: Tensor | None = None

    def observe(self, group: tg.Group, losses: Mapping[str, Tensor]) -> None:
        """Take in the losses that a group is about to be stepped on with."""
        values = torch.stack([loss.detach().cpu() for loss in losses.values()])
        if not group.first and self._before is not None:
            mask = group.mask.cpu()
            tg.affinity_update_(self._matrix, self._before, values, mask, self._decay)
        self._before = values

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """The groups of the affinity credited so; the other one is not read."""
        return self._grouping(self._matrix)

    def state_dict(self) -> dict[str, Any]:
        """The affinity, to go on from."""
        return {"matrix": self._matrix.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._matrix = state["matrix"].clone()
