"""The published code's rule for whose step changed a loss, to compare with."""

from __future__ import annotations

from torch import Tensor

import taskgroup as tg

__all__ = ["PublishedCredit"]


class PublishedCredit(tg.ProximalAffinity):
    """A proximal affinity that credits a change of loss to the group about to be stepped on.

    The step on the group before it caused the change, but this is how the published runs of
    "Selective Task Group Updates for Multi-Task Optimization" (ICLR 2025) count. The first group of
    a batch gets nothing. On planted problems this finds the true groups in no batch.
    """

    def observe(
        self, before: Tensor, after: Tensor, mask: Tensor, following: Tensor | None = None
    ) -> None:
        """Take in a change of the losses, which ``following`` is credited with."""
        assert following is not None
        super().observe(before, after, following)

    def known(self) -> Tensor:
        """The matrix, with zeros where nothing was observed, as the published code has it."""
        return self.matrix
