"""One step of a batch: the tasks to step on, and the losses it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from taskgroup._arguments import listed
from taskgroup._row_losses import means_of_rows
from taskgroup.affinity.base import Losses
from taskgroup.loop.batch import Batch
from taskgroup.loop.checks import check_share
from taskgroup.loop.loss_reader import LossReader
from taskgroup.loop.misuse import Misuse
from taskgroup.loop.observer import Observer
from taskgroup.loop.rounds import Members, Plan, union
from taskgroup.nn.model import MultiTaskModel

if TYPE_CHECKING:  # it imports all methods
    from taskgroup.loop.weighting import Weighting

__all__ = ["Group"]

_WHOLE = 1 - 1e-6  # ten shares of 0.1 add up to 1, up to rounding
_TOO_MUCH = 1 + 1e-6


class Group:
    """One step of a batch: the tasks to step on, and the losses it needs.

    :class:`TaskGroups` makes the groups; the loop calls :meth:`loss` or :meth:`skip` on each.

    Attributes:
        first: True for the first group of the batch.
        last: True for the last group of the batch.
        observes: True if the batch observes the affinity.
        model: the :class:`MultiTaskModel` that ran for this group.

    Example:
        A batch that observes and one that does not. The first needs the losses of all tasks in
        every step, to see what the step before did to them; the second only those of its group.
        In both, only the group's own losses are differentiated:

        >>> import taskgroup as tg
        >>> groups = tg.TaskGroups(["a", "b", "c"], groups_per_batch=1, observe_every=2)
        >>> for batch in range(2):
        ...     for group in groups:
        ...         print(f"{group.tasks=} {group.graph=} {group.observed=}")
        ...         group.skip()
        ...     print()
        group.tasks=('c',) group.graph=('c',) group.observed=('a', 'b', 'c')
        group.tasks=('a',) group.graph=('a',) group.observed=('a', 'b', 'c')
        <BLANKLINE>
        group.tasks=('b',) group.graph=('b',) group.observed=('b',)
        <BLANKLINE>
    """

    def __init__(
        self,
        plan: Plan,
        batch: Batch,
        reader: LossReader,
        weighting: Weighting | None,
        observer: Observer,
        misuse: Misuse,
    ) -> None:
        self.first = plan.place == 0
        self.last = plan.last
        self.observes = plan.observes
        self.model: MultiTaskModel | None = None
        self._plan = plan
        self._batch = batch
        self._reader = reader
        self._weighting = weighting
        self._observer = observer
        self._misuse = misuse
        self._shares = 0.0  # of the step, so far
        self._measured: Tensor | None = None  # share-weighted losses of the needed tasks, so far
        self._skipped = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the group, in task order."""
        return self._reader.names(self._plan.members)

    @property
    def observed(self) -> tuple[str, ...]:
        """The tasks whose losses to pass to :meth:`loss`.

        In a batch that observes the affinity these are all its labelled tasks; in other batches the
        tasks of the group, and those in :attr:`graph`. The losses of tasks that are not in
        :attr:`graph` are only read: compute them under :class:`torch.no_grad` to save time. The
        losses of all other tasks need not be computed at all. See the example above.
        """
        return self._reader.names(self._plan.needed)

    @property
    def graph(self) -> tuple[str, ...]:
        """The tasks whose losses must carry an autograd graph; all of them are in :attr:`observed`.

        These are the tasks of the group, whether or not the batch observes. In a step in which
        :class:`GradientAffinity` measures gradients, the tasks that it measures are added.
        """
        return self._reader.names(union(self._plan.members, self._plan.measures))

    @property
    def mask(self) -> Tensor:
        """Bool ``[K]``, True for the tasks of the group; a copy on the device of the losses."""
        return self._reader.group(self._plan.members).mask.clone()

    def loss(
        self,
        losses: Losses,
        share: float = 1.0,
        again: bool = False,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The loss to step on: the weighted sum (or mean) over the tasks of the group.

        If the groups have a method as ``weights``, it is what the method makes of these losses.

        The losses are also handed to the affinity, without a synchronisation. With several ranks,
        whose gradients are averaged, the loss of a task that only some ranks have labels of is
        scaled up on these ranks, so that the gradient is the mean over them.

        Args:
            losses: ``{task: scalar}`` with at least the tasks in :attr:`observed`, or one tensor in
                task order, of these tasks or of all K. The losses of the tasks in :attr:`graph`
                carry a graph.
            share: the part of the step that this micro-batch is, for gradient accumulation. The
                shares of a step add up to 1.
            again: True if a step takes several passes over its losses, as in the second pass of
                SAM and the closure of L-BFGS. Once the shares add up to 1, further losses are not
                observed; they may then be those of the tasks of the group alone.
            rows: ``[N]`` integers where each row of the batch belongs to one task: the position of
                that task, -1 for a row that does not count. ``losses`` are then those of the rows,
                ``[N]``, and the loss of a task is the mean over its rows. They are read on the
                host: pass them on the CPU, since the host would wait for a GPU.
                :class:`GradientAffinity` measures all tasks in one backward pass then.

        Returns:
            ``share`` times the loss, a scalar with a graph.

        Raises:
            ValueError: if a loss is unknown, missing, not scalar, on another device or without a
                graph, or if the shares exceed 1. Nothing has changed then. Also if the method that
                weighs the losses cannot take one; on a GPU this is noticed after the step.
            RuntimeError: if the group was skipped, the ranks step on different groups, or the
                parameters of the method that weighs the losses are in no attached optimizer.
        """
        self._observer.begin_loss()
        if self._skipped:
            raise RuntimeError(
                f"The group {listed(self.tasks)} was skipped, so it takes no more losses."
            )
        check_share(share)
        again = again and self._shares > _WHOLE
        shares = self._shares + (0.0 if again else share)
        if shares > _TOO_MUCH:
            raise ValueError(
                f"The shares of the group {listed(self.tasks)} would add up to {shares:g}: call "
                "group.loss(losses) once per step, or with share=1/n in each of n micro-batches. "
                "If one step takes several passes over its losses, as in the second pass of SAM "
                "or the closure of L-BFGS, write group.loss(losses, again=True)."
            )
        plan, batch = self._plan, self._batch
        needed = plan.needed
        of_rows = None
        if rows is not None:
            wanted = plan.members if again else needed
            by_task = means_of_rows(losses, rows, self._reader.tasks, wanted, batch.absent)
            assert isinstance(losses, Tensor)
            of_rows, losses = (losses, rows.to(losses.device).long()), by_task
        if isinstance(losses, Mapping):
            if again:
                needed = plan.members
            if batch.absent:
                batch.check_absent(losses, plan, needed, self._reader.tasks)
        own, measured = self._reader.read(losses, plan.members, needed)
        if self._weighting is not None:
            self._weighting.check_attached()
            self._observer.check_weighed(own.detach(), plan.members)
        self._observer.ask(plan, self.model)
        if again:
            value = self._total(own, needed, measured, None)
            self._observer.end_loss()
            return value * share
        if self._measured is None:
            self._misuse.check_losses(losses)
            if plan.measures:
                self._observer.measure_gradients(plan, batch, losses, measured, self.model, of_rows)
        whole = measured if share == 1.0 else measured * share
        if self._measured is not None:
            whole += self._measured
        self._measured, self._shares = whole, shares
        means = None
        if shares > _WHOLE:
            means = self._observer.measure(plan, batch, whole)
        value = self._total(own, needed, measured, means if whole is measured else None)
        self._observer.end_loss()
        return value if share == 1.0 else value * share

    def _total(
        self, own: Tensor, needed: Members, measured: Tensor, means: Tensor | None
    ) -> Tensor:
        """The loss to step on. ``means`` are the losses ``[K]`` over all ranks, if known."""
        plan, batch = self._plan, self._batch
        if self._weighting is None:
            return self._reader.total(own, plan.members, batch.factors)
        if means is None:
            means = self._observer.means(plan, batch, needed, measured)
        if means is not None:
            means = self._reader.select(means, self._reader.everyone, plan.members)
        return self._weighting.total(own, means, plan.members, batch.factors)

    def skip(self) -> None:
        """Pass over this group: no step is taken on it in this batch."""
        self._skipped = True

    def finish(self) -> None:
        """Check that the group was stepped on or skipped; the loop does it before the next group.

        Raises:
            RuntimeError: if the group got no loss, or only a part of one.
        """
        if self._skipped:
            if self._shares > 0:  # its losses were seen, but no step followed
                self._observer.forget_step()
        elif self._shares == 0:
            raise RuntimeError(
                f"The group {listed(self.tasks)} got no loss: call group.loss(losses) on every "
                "group, or group.skip() to pass over it."
            )
        elif self._shares < _WHOLE:
            raise RuntimeError(
                f"The shares of the group {listed(self.tasks)} add up to {self._shares:g}, not "
                "to 1; pass share=1/n in each of the n micro-batches of a step."
            )

    def ran(self, model: MultiTaskModel) -> None:
        """Note which model runs for this group."""
        self.model = model

    def runs_first(self, module: nn.Module) -> bool:
        """Whether no group before this one, in its batch, has run the module; now one has."""
        return self._batch.runs_first(module, self._plan.place)

    def __repr__(self) -> str:
        return f"Group({listed(self.tasks)})"
