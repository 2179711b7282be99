"""Asks a grouping for the partition, and checks its answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taskgroup.loop.checks import check_part
from taskgroup.loop.rounds import Members

__all__ = ["Partitioner"]


class Partitioner:
    """Asks a grouping for the partition; the grouping need not define anything but the call.

    Attributes:
        grouping: the grouping.
        learns: whether the partition follows from the affinity. It does not for a single task, nor
            for a grouping that does not read the affinity.
    """

    def __init__(self, grouping: Callable[[Tensor], Tensor | None], tasks: tuple[str, ...]) -> None:
        examples = (
            "tg.AffinityPropagation(), tg.KMeans(m) or tg.Fixed(partition), or a function from the "
            "affinity [K, K] to labels [K]"
        )
        check_part("grouping", grouping, callable(grouping), examples)
        self.grouping: Any = grouping
        if hasattr(grouping, "start"):
            grouping.start(tasks)
        self.learns = len(tasks) > 1 and getattr(grouping, "reads_affinity", True)
        self._n_tasks = len(tasks)

    def partition(self, known: Callable[[], Tensor]) -> list[Members] | None:
        """The new partition, or None if the grouping found none.

        ``known`` gives the affinity ``[K, K]`` on the host, NaN where nothing was observed. It is
        called only if the grouping reads the affinity, because it may wait for a GPU.
        """
        n = self._n_tasks
        if self.learns:
            matrix = known()
        else:
            matrix = torch.full((n, n), math.nan, dtype=torch.float32, device="cpu")
        if not getattr(self.grouping, "takes_nan", False):
            matrix = matrix.nan_to_num(nan=0.0)
        labels = self.grouping(matrix)
        if labels is None:
            return None
        if not isinstance(labels, Tensor) or labels.shape != (n,) or labels.dtype != torch.int64:
            got = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else labels
            raise ValueError(
                f"The grouping must return an int64 tensor of {n} labels, one per task, or None to "
                f"keep the partition; got {got}."
            )
        members: dict[int, list[int]] = {}
        for k, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(k)
        return [tuple(group) for group in members.values()]

    def state_dict(self) -> dict[str, Any]:
        """The state of the grouping; empty if it has none."""
        return self.grouping.state_dict() if hasattr(self.grouping, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned."""
        if hasattr(self.grouping, "load_state_dict"):
            self.grouping.load_state_dict(state)
