"""Every rank takes the same decision, because every rank decides on the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_gradients_over_ranks", "mean_over_ranks"]


def mean_over_ranks(losses: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The losses averaged over the ranks, bitwise the same on each; in one process, themselves.

    Args:
        losses: ``[K]``, without a graph.
        process_group: the ranks that train one model; None is all of them.

    Returns:
        ``[K]``. NaN for a task that is NaN on any rank.
    """
    ranks = _ranks(process_group)
    if ranks == 1:
        return losses
    mean = losses / ranks
    dist.all_reduce(mean, group=process_group)
    return mean


def mean_gradients_over_ranks(
    gradients: list[list[Tensor | None]],
    params: Sequence[Tensor],
    process_group: dist.ProcessGroup | None,
) -> None:
    """Averages the gradients of single tasks over the ranks, in place; in one process, nothing.

    Args:
        gradients: ``[K][T]`` on the parameters; the same tasks on every rank. None counts as zero;
            only for frozen parameters it stays.
        params: the T parameters.
        process_group: the ranks that train one model; None is all of them.
    """
    ranks = _ranks(process_group)
    if ranks == 1:
        return
    active = [t for t, parameter in enumerate(params) if parameter.requires_grad]
    for own in gradients:  # one task at a time: no second copy of all gradients
        parts = [torch.zeros_like(params[t]) if own[t] is None else own[t] for t in active]
        flat = torch.cat([part.flatten() for part in parts if part is not None])
        flat /= ranks
        dist.all_reduce(flat, group=process_group)
        for t, mean in zip(active, flat.split([params[t].numel() for t in active]), strict=True):
            own[t] = mean.view(params[t].shape).to(params[t].dtype)


def _ranks(process_group: dist.ProcessGroup | None) -> int:
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(process_group)
