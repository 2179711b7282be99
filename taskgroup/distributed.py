"""Every rank takes the same decision, because every rank decides on the same numbers."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over_ranks"]


def mean_over_ranks(losses: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The losses averaged over the ranks, bitwise the same on each; in one process, themselves.

    Args:
        losses: ``[K]``, without a graph.
        process_group: the ranks that train one model; None is all of them.

    Returns:
        ``[K]``. NaN for a task that is NaN on any rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return losses
    ranks = dist.get_world_size(process_group)
    if ranks == 1:
        return losses
    mean = losses / ranks
    dist.all_reduce(mean, group=process_group)
    return mean
