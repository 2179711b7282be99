"""Every rank takes the same decision, because every rank decides on the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from taskgroup.ops._sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

__all__ = ["Ranks"]


class Ranks:
    """The ranks that train one model, one process each; a single one where torch joins none.

    Args:
        process_group: the ranks; None is all of them.
    """

    def __init__(self, process_group: ProcessGroup | None) -> None:
        self._process_group = process_group

    @property
    def number(self) -> int:
        """How many there are."""
        if not dist.is_available() or not dist.is_initialized():
            return 1
        return max(1, dist.get_world_size(self._process_group))

    def check_alike(self, parts: Mapping[str, object]) -> None:
        """Raise, on every rank, if the ranks differ in any part. Waits for the other ranks.

        Args:
            parts: what decisions follow from, by name; the names are the same on every rank.

        Raises:
            RuntimeError: naming the parts.
        """
        checksums = [zlib.crc32(repr(_plain(part)).encode()) for part in parts.values()]
        # The greatest and, by its negative, the least; they are one where all are.
        both = torch.tensor([checksums, [-checksum for checksum in checksums]])
        greatest, negative_least = self._reduced(both, dist.ReduceOp.MAX).tolist()
        if differing := [
            name
            for name, high, low in zip(parts, greatest, negative_least, strict=True)
            if high != -low
        ]:
            raise RuntimeError(
                f"The ranks differ in the {' and the '.join(differing)} of their TaskGroups: make "
                "it with the same arguments on every rank, and load the same checkpoint on all; if "
                "they train models of their own, name the ranks of each with process_group=."
            )

    def count(self, labelled: Sequence[bool]) -> list[int]:
        """On how many ranks each task is labelled. Waits for the other ranks.

        Args:
            labelled: for each of the K tasks, whether it is labelled here.
        """
        counts: list[int] = self._reduced(torch.tensor(labelled).long(), dist.ReduceOp.SUM).tolist()
        return counts

    def mean(self, losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The losses averaged over the ranks, bitwise the same on each; one all-reduce.

        Args:
            losses: ``[K]``, without a graph.
            mask: bool ``[K]``, True for the tasks of the group at hand.

        Returns:
            ``[K]`` the mean, NaN for a task that is NaN on any rank, and ``[K]`` on how many ranks
            the task is in the group, for :meth:`check_votes`.
        """
        both = torch.cat([losses, mask.to(losses.dtype)])
        dist.all_reduce(both, group=self._process_group)
        n_tasks = len(losses)
        return both[:n_tasks] / self.number, both[n_tasks:]

    def check_votes(self, votes: list[float], tasks: tuple[str, ...]) -> None:
        """Raise, on every rank, if the ranks did not step on the same group.

        Args:
            votes: on how many ranks each task was in it.
            tasks: those that were on this rank.

        Raises:
            RuntimeError: naming the tasks.
        """
        if not {0, self.number}.issuperset(votes):
            raise RuntimeError(
                f"The ranks step on different groups; rank {dist.get_rank()} steps on "
                f"{', '.join(tasks)}. Loop over the same TaskGroups on every rank: call iter() or "
                "batch() equally often, and skip a group or leave a batch early on all ranks or on "
                "none."
            )

    def mean_gradients(
        self, gradients: list[list[Tensor | None]], params: Sequence[Tensor]
    ) -> None:
        """Averages the gradients of single tasks over the ranks, in place.

        Args:
            gradients: ``[K][T]`` on the parameters; the same tasks on every rank. None counts as
                zero; only for frozen parameters it stays.
            params: the T parameters. Sharded ones are passed over: FSDP has averaged theirs.
        """
        active = [t for t, p in enumerate(params) if p.requires_grad and not is_sharded(p)]
        if not active:
            return
        for own in gradients:  # one task at a time: no second copy of all gradients
            parts = [torch.zeros_like(params[t]) if own[t] is None else own[t] for t in active]
            flat = torch.cat([part.flatten() for part in parts if part is not None])
            flat /= self.number
            dist.all_reduce(flat, group=self._process_group)
            means = flat.split([params[t].numel() for t in active])
            for t, mean in zip(active, means, strict=True):
                own[t] = mean.view(params[t].shape).to(params[t].dtype)

    def _reduced(self, values: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduced over the ranks, on the host if the ranks can talk there."""
        backends = dist.get_backend_config(self._process_group)  # such as "cpu:gloo,cuda:nccl"
        devices = [backend.partition(":")[0] for backend in backends.split(",")]
        values = values.to("cpu" if "cpu" in devices else devices[0])
        dist.all_reduce(values, by, group=self._process_group)
        return values


def _plain(part: object) -> object:
    """The same with tensors as bytes: alike where its ``repr`` is."""
    if isinstance(part, Tensor):
        return part.numpy(force=True).tobytes()
    if isinstance(part, Mapping):
        return [(key, _plain(part[key])) for key in sorted(part)]
    if isinstance(part, list | tuple):
        return [_plain(item) for item in part]
    return part
