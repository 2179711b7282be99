"""One step of a batch: the tasks to step on, and what the groups of a batch have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from taskgroup._arguments import listed
from taskgroup.affinity.base import Losses
from taskgroup.loop.losses import LossReader
from taskgroup.loop.rounds import Members, union

if TYPE_CHECKING:
    from taskgroup.nn.model import MultiTaskModel

__all__ = ["Batch", "Group"]


class Batch:
    """What the groups of one batch have in common.

    Args:
        present: the tasks to deal, labelled on any rank.
        absent: those of them without a label on this rank.
        factors: float64 ``[K]`` on the host, of the losses on this rank, whose mean over all ranks
            is then the mean over those with a label; None where all have one.
    """

    def __init__(
        self,
        present: Members,
        absent: frozenset[int] = frozenset(),
        factors: Tensor | None = None,
    ) -> None:
        self.present = present
        self.absent = absent
        self.factors = factors
        self.ran: dict[int, int] = {}  # by the id of the module, the place of its first group

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ran": {}}  # the modules of a copy have ids of their own


class Group:
    """One step of a batch: the tasks to step on, and whose losses it needs.

    :class:`TaskGroups` makes these; the loop calls :meth:`loss`, or :meth:`skip`, on each.

    Attributes:
        first: True for the first group of the batch.
        last: True for the last one.
        observes: True where the batch observes the affinity.
        model: the :class:`MultiTaskModel` that ran for this group.
    """

    def __init__(
        self,
        reader: LossReader,
        take: Callable[[Group, Losses, float, bool], Tensor],
        batch: Batch,
        members: Members,
        needed: Members,
        measures: Members,
        *,
        observes: bool,
        place: int,
        last: bool,
    ) -> None:
        self.first = place == 0
        self.last = last
        self.observes = observes
        self.model: MultiTaskModel | None = None
        self._reader = reader
        self._take = take
        self._batch = batch
        self._place = place  # in the batch
        self._members = members
        self._needed = needed
        self._measures = measures  # whose gradients are taken
        self._shares = 0.0  # of the step, so far
        self._measured: Tensor | None = None  # share-weighted losses of the needed tasks, so far
        self._skipped = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the group, in task order."""
        return self._reader.names(self._members)

    @property
    def observed(self) -> tuple[str, ...]:
        """The tasks whose losses this step needs, its own and those it observes or measures."""
        return self._reader.names(self._needed)

    @property
    def graph(self) -> tuple[str, ...]:
        """The tasks whose losses must carry a graph, the group's own and those it measures."""
        return self._reader.names(union(self._members, self._measures))

    @property
    def mask(self) -> Tensor:
        """Bool ``[K]``, True for the tasks of the group; a copy on the device of the losses."""
        return self._reader.group(self._members).mask.clone()

    def loss(self, losses: Losses, share: float = 1.0, again: bool = False) -> Tensor:
        """The loss to step on: the weighted sum (or mean) over the tasks of the group.

        Also hands the losses to the affinity, without a synchronisation. Over several ranks, whose
        gradients are averaged, the loss of a task that only some have labels of counts for more on
        these, so that the gradient is the mean over them.

        Args:
            losses: ``{task: scalar}`` with at least the tasks in :attr:`observed`, or one tensor in
                task order, of these tasks or of all K. Those of the group's own carry a graph.
            share: the part of the step that this micro-batch is, for gradient accumulation; the
                shares of a step add up to 1.
            again: True where a step takes several passes over its losses, in the second pass of
                SAM and the closure of L-BFGS: once the shares add up to 1, further losses are not
                observed. Those of the tasks of the group alone will do then.

        Returns:
            ``share`` times the loss, a scalar with a graph.

        Raises:
            ValueError: if a loss is unknown, missing, not scalar, on another device or without a
                graph, or if the shares exceed 1. Nothing has changed then.
            RuntimeError: if the group was skipped, or the ranks step on different groups.
        """
        return self._take(self, losses, share, again)

    def skip(self) -> None:
        """Pass over this group: no step is taken on it in this batch."""
        self._skipped = True

    def ran(self, model: MultiTaskModel) -> None:
        """Say which model runs for this group."""
        self.model = model

    def runs_first(self, module: nn.Module) -> bool:
        """Whether no group before this one, in its batch, has run the module; now it has."""
        return self._batch.ran.setdefault(id(module), self._place) == self._place

    def __repr__(self) -> str:
        return f"Group({listed(self.tasks)})"
