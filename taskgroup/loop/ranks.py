"""Every rank takes the same decisions, because all ranks decide on the same numbers."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from taskgroup._arguments import listed
from taskgroup.ops._sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

__all__ = ["Ranks", "settings_of"]


_PARTS = 5  # that check_alike() compares


def _check_group(group: object) -> None:
    """Raise unless this is a process group, or what new_group() returns to other ranks."""
    if group is None or not dist.is_available():
        return
    outsider = dist.distributed_c10d.GroupMember.NON_GROUP_MEMBER
    if not isinstance(group, dist.ProcessGroup) and group is not outsider:
        raise TypeError(
            "process_group takes what torch.distributed.new_group(ranks) or DeviceMesh.get_group() "
            f"returned, or None for all ranks; got {group!r}."
        )


class Ranks:
    """The ranks that train one model, one process each; a single rank without torch.distributed.

    All exchanges are sums of float64 numbers, and from the second one on they have the same length.
    Each carries the number of its batch and its kind, so that ranks at different places of the loop
    notice it instead of adding up numbers that do not belong together.

    A deep copy has the same ranks; an unpickled object finds the ranks of its own process.

    Args:
        process_group: the ranks; None for all of them.

    Attributes:
        number: the number of ranks; 1 before :meth:`join`.
        first: whether this is the first of them.
    """

    def __init__(self, process_group: ProcessGroup | None) -> None:
        _check_group(process_group)
        self.number = 1
        self.first = True
        self._joined = False
        self._alike = False  # the ranks have been compared
        self._process_group = process_group
        self._length = 2 * _PARTS
        self._joins = _Joins()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        other = Ranks(self._process_group)  # a process group cannot be copied
        vars(other).update(vars(self), _alike=False)
        return other

    def __reduce__(self) -> tuple[type[Ranks], tuple[None]]:
        if self._process_group is not None:
            raise TypeError(
                "TaskGroups with a process_group cannot be pickled, because the group belongs to "
                "this process: make the TaskGroups in the process that uses it, and load "
                "state_dict() there."
            )
        return Ranks, (None,)

    def changed(self) -> bool:
        """Whether torch.distributed was initialised or destroyed since :meth:`join`."""
        return self._joined != (dist.is_available() and dist.is_initialized())

    def is_first(self) -> bool:
        """Whether this is the first of the ranks, now; they need not have joined."""
        if not (dist.is_available() and dist.is_initialized()):
            return True
        return dist.get_rank(self._process_group) == 0

    def meet(self, decisive: Callable[[], Mapping[str, object]], n_tasks: int) -> None:
        """Call :meth:`join` and :meth:`check_alike`, on what ``decisive`` gives, unless done."""
        if self.changed():
            self.join()
            self._alike = False
        if self.number > 1 and not self._alike:
            self.check_alike(decisive(), n_tasks)
            self._alike = True

    def compare_again(self) -> None:
        """Compare the ranks again at the next batch."""
        self._alike = False

    def join(self) -> None:
        """Find the other ranks."""
        self.number, self._joined = 1, dist.is_available() and dist.is_initialized()
        self.first = True
        if not self._joined:
            return
        number = dist.get_world_size(self._process_group)
        if number < 1:
            raise RuntimeError(
                f"Rank {dist.get_rank()} is not in the process_group of its TaskGroups: name the "
                "one it is in."
            )
        self.number = number
        self.first = self.is_first()

    def check_alike(self, parts: Mapping[str, object], n_tasks: int) -> None:
        """Raise, on every rank, if the ranks differ in any part. Waits for the other ranks.

        The parts are all that decisions depend on, by name; the same names on every rank.
        """
        assert len(parts) == _PARTS
        self._joins.find()
        # Sums tell whether n numbers are equal: only then is n times the sum of their squares the
        # square of their sum. In float64 that is exact for up to 8,000 ranks.
        checksums = [zlib.crc32(repr(_plain(part)).encode()) >> 12 for part in parts.values()]
        squares = [checksum**2 for checksum in checksums]
        found = self._sum(
            torch.tensor(checksums + squares, dtype=torch.int64, device="cpu"), "alike", 0
        )
        sums, of_squares = found[:_PARTS].tolist(), found[_PARTS : 2 * _PARTS].tolist()
        if differing := [
            name
            for name, total, squared in zip(parts, sums, of_squares, strict=True)
            if self.number * round(squared) != round(total) ** 2
        ]:
            raise RuntimeError(
                f"The ranks differ in the {' and the '.join(differing)} of their TaskGroups: make "
                "it with the same arguments on every rank, and load the same checkpoint on all; if "
                "they train models of their own, name the ranks of each with process_group=."
            )
        self._length = max(2 * n_tasks, 2 * _PARTS)

    def count(self, labelled: Sequence[bool], batch: int) -> list[int]:
        """The number of ranks on which each of the K tasks is labelled. Waits for the other ranks.

        ``labelled`` says which tasks are labelled on this rank.
        """
        found = self._sum(torch.tensor(labelled, dtype=torch.bool, device="cpu"), "count", batch)
        return [round(count) for count in found[: len(labelled)].tolist()]

    def mean(self, losses: Tensor, mask: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The mean of the losses ``[K]`` over the ranks, bitwise the same on each; one all-reduce.

        It is NaN for a task that is NaN on any rank. The second result are the votes for the group,
        from the ``mask`` of each rank, that :meth:`check_votes` takes.
        """
        n_tasks = len(losses)
        values = torch.cat([losses.double(), mask.double()])
        found = self._reduced(values, "mean", batch)
        return (found[:n_tasks] / self.number).to(losses.dtype), found[n_tasks:]

    def check_votes(self, votes: list[float], tasks: tuple[str, ...]) -> None:
        """Raise, on every rank, if the ranks did not step on the same group; here on ``tasks``."""
        self._check_place(votes[-_HEADER:])
        if not {0, self.number}.issuperset(votes[:-_HEADER]):
            raise RuntimeError(
                f"The ranks step on different groups; rank {dist.get_rank()} steps on "
                f"{listed(tasks)}. {_LOOP_ALIKE}"
            )

    def mean_gradients(
        self, gradients: list[list[Tensor | None]], params: Sequence[Tensor]
    ) -> None:
        """Average the gradients of single tasks over the ranks, in place.

        Args:
            gradients: ``[K][T]`` on the parameters; the same tasks on every rank. None counts as
                zero and is replaced, except for frozen parameters.
            params: the T parameters. Sharded ones are skipped: FSDP has averaged their gradients.
        """
        active = [t for t, p in enumerate(params) if p.requires_grad and not is_sharded(p)]
        if not active:
            return
        for own in gradients:  # one task at a time: no second copy of all gradients
            parts = [torch.zeros_like(params[t]) if own[t] is None else own[t] for t in active]
            flat = torch.cat([part.flatten() for part in parts if part is not None])
            flat /= self.number
            self._all_reduce(flat)
            means = flat.split([params[t].numel() for t in active])
            for t, mean in zip(active, means, strict=True):
                own[t] = mean.view(params[t].shape).to(params[t].dtype)

    def _sum(self, values: Tensor, kind: str, batch: int) -> Tensor:
        """The sum over the ranks, on the host if they can communicate there; checked."""
        backends = dist.get_backend_config(self._process_group)  # such as "cpu:gloo,cuda:nccl"
        devices = [backend.partition(":")[0] for backend in backends.split(",")]
        values = values.to("cpu" if "cpu" in devices else devices[0], torch.float64)
        found = self._reduced(values, kind, batch).cpu()
        self._check_place(found[-_HEADER:].tolist())
        return found

    def _reduced(self, values: Tensor, kind: str, batch: int) -> Tensor:
        """The sum over the ranks, padded to the length of all exchanges, with the place at the end.

        The place is the kind of the exchange, one of three, the number of the batch and its square.
        """
        place = [float(kind == other) for other in _KINDS]
        place += [float(batch % _BATCHES), float((batch % _BATCHES) ** 2)]
        end = torch.tensor(place, dtype=torch.float64, device="cpu")
        padding = values.new_zeros(self._length - len(values))
        end = end.to(values.device, non_blocking=True)
        values = torch.cat([values, padding, end])
        self._all_reduce(values)
        return values

    def _all_reduce(self, values: Tensor) -> None:
        """Sum over the ranks, in place.

        Raise if another rank does not take part and the backend notices it, or inside ``join()``,
        where other ranks need not take part.
        """
        self._joins.refuse()
        try:
            dist.all_reduce(values, group=self._process_group)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RuntimeError(
                f"Rank {dist.get_rank()} waited for another rank in vain ({reason}): it has "
                f"ended, has failed or has fewer batches. {_EVEN}"
            ) from error

    def _check_place(self, place: list[float]) -> None:
        *kinds, batch, squared = place
        alike = self.number * round(squared) == round(batch) ** 2
        if not {0, self.number}.issuperset(kinds) or not alike:
            raise RuntimeError(
                f"Rank {dist.get_rank()} is at another place of the loop than the other ranks. "
                f"{_LOOP_ALIKE}"
            )


_KINDS = ("alike", "count", "mean")
_BATCHES = 2**20  # after which their number begins again, so that sums of squares are exact
_HEADER = len(_KINDS) + 2
_LOOP_ALIKE = (
    "Loop over the same TaskGroups on every rank: call iter() or batch() equally often; load a "
    "checkpoint, skip a group or leave a batch early on all ranks or on none."
)
_EVEN = (
    "Give every rank as many batches: take a DistributedSampler, with drop_last=True in it and in "
    "the DataLoader, or leave the loop on all ranks once one of them has no batch left."
)


class _Joins:
    """Notices ``DistributedDataParallel.join()``, for data that end earlier on some ranks.

    A rank without data then repeats the exchanges of DDP, but no others. They would be matched with
    exchanges of :class:`Ranks`, which have another size: gloo aborts the process, and NCCL may hang
    or add up numbers that do not belong together.
    """

    def __init__(self) -> None:
        self._joinables: WeakSet[Any] = WeakSet()
        self._left: list[object] = []  # settings of the contexts that have been left

    def find(self) -> None:
        """Find the models that ``join()`` can be called on, which takes a while."""
        from torch.distributed.algorithms.join import Joinable  # not in every build of torch

        self._joinables.update(_alive(Joinable))

    def refuse(self) -> None:
        """Raise inside ``join()``."""
        for joinable in self._joinables:
            settings = joinable._join_config
            if not settings.enable or any(settings is left for left in self._left):
                continue
            # The settings remain after the context is left; the context itself does not.
            from torch.distributed.algorithms.join import Join

            if any(joinable in context._joinables for context in _alive(Join)):
                raise RuntimeError(
                    "join() cannot work with TaskGroups: a rank that has joined takes part in the "
                    "exchanges of DistributedDataParallel, but not in those of the losses. Leave "
                    f"join() out. {_EVEN}"
                )
            self._left.append(settings)


def _alive(kind: type) -> list[Any]:
    """All objects of a class; torch keeps no list of them."""
    objects = gc.get_objects()
    kinds = {found for found in set(map(type, objects)) if kind in found.__mro__}
    return [found for found in objects if type(found) in kinds]


def settings_of(part: object) -> tuple[str, dict[str, Any]]:
    """The name of an object's class, or of a function, and the plain values it was made with."""
    values = getattr(part, "__dict__", {}).items()
    plain = {name: v for name, v in values if isinstance(v, bool | int | float | str | None)}
    return getattr(part, "__qualname__", type(part).__qualname__), plain


def _plain(part: object) -> object:
    """The part with its tensors as bytes, so that equal parts have an equal ``repr``."""
    if isinstance(part, Tensor):
        return part.numpy(force=True).tobytes()
    if isinstance(part, Mapping):
        return [(key, _plain(part[key])) for key in sorted(part)]
    if isinstance(part, list | tuple):
        return [_plain(item) for item in part]
    return part
