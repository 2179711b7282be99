"""What the groups of one batch have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskgroup.loop.ranks import Ranks
from taskgroup.loop.rounds import Members, Plan

__all__ = ["ZERO_LOSS", "Batch"]

# What to do about a task that only other ranks have labels of.
ZERO_LOSS = (
    "Pass a zero that depends on the output: output.sum() * 0, or a masked mean, "
    "(error * mask).sum() / mask.sum().clamp(min=1)."
)


class Batch:
    """The labelled tasks of one batch, on this rank and on the others.

    Args:
        number: the number of the batch, the same on every rank.
        present: the tasks labelled on any rank.
        absent: the tasks among these without a label on this rank.
        factors: float64 ``[K]`` on the host. The mean over all ranks of the losses times these
            factors is the mean over the ranks that have the label. None where all ranks have it.
    """

    def __init__(
        self,
        number: int,
        present: Members,
        absent: frozenset[int] = frozenset(),
        factors: Tensor | None = None,
    ) -> None:
        self.number = number
        self.present = present
        self.absent = absent
        self.factors = factors
        self._ran: dict[int, int] = {}  # by the id of a module, the place of its first step

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ran": {}}  # the modules of a copy have ids of their own

    @classmethod
    def over_ranks(cls, ranks: Ranks, number: int, here: Members, everyone: Members) -> Batch:
        """The batch of all ranks, with ``here`` labelled on this one. Waits for the other ranks."""
        mine = frozenset(here)
        counts = ranks.count([k in mine for k in everyone], number)
        present = tuple(k for k in everyone if counts[k])
        if all(counts[k] == ranks.number for k in present):
            return cls(number, present)
        factors = torch.zeros(len(everyone), dtype=torch.float64, device="cpu")
        for k in here:
            factors[k] = ranks.number / counts[k]
        return cls(number, present, frozenset(present) - mine, factors)

    def runs_first(self, module: nn.Module, place: int) -> bool:
        """Whether no step before this one has run the module; from now on, one has."""
        return self._ran.setdefault(id(module), place) == place

    def check_absent(
        self, losses: Mapping[str, Tensor], plan: Plan, needed: Members, tasks: Sequence[str]
    ) -> None:
        """Raise unless every absent task has a loss that depends on the outputs."""
        for k in sorted(self.absent.intersection(needed)):
            task = tasks[k]
            if task not in losses:
                wrong = "is missing"
            elif k in plan.members and getattr(losses[task], "is_leaf", False):
                wrong = "depends on no output"
            else:
                continue
            raise ValueError(
                f"The loss of task {task!r} {wrong}: without a label on this rank, it has one on "
                f"another, and all ranks take the same steps. {ZERO_LOSS}"
            )
