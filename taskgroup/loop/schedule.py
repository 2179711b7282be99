"""The schedule: iterate over the groups of a batch, attach optimizers, save and load the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from taskgroup._arguments import flag, whole_number
from taskgroup._generator import HostGenerator
from taskgroup._listeners import Listener
from taskgroup.affinity.base import Affinity
from taskgroup.affinity.proximal import ProximalAffinity
from taskgroup.grouping.fixed import Together
from taskgroup.grouping.propagation import AffinityPropagation
from taskgroup.loop.batch import Batch
from taskgroup.loop.checks import check_part, check_state, checked_present, checked_tasks
from taskgroup.loop.group import Group
from taskgroup.loop.loss_reader import LossReader
from taskgroup.loop.misuse import Misuse, refuse_accumulation
from taskgroup.loop.observer import Observer
from taskgroup.loop.partitioner import Partitioner
from taskgroup.loop.ranks import Ranks, settings_of
from taskgroup.loop.rounds import Members, Rounds
from taskgroup.loop.signals import in_signal_handler
from taskgroup.nn.group_states import StatesOfOptimizers
from taskgroup.nn.outside import Attachment, Heads, Outside, SharedState, unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

    from taskgroup.loop.weighting import Weighting
    from taskgroup.methods.loss_space import WeighingMethod


__all__ = ["TaskGroups"]

_STATE_VERSION = 2


class TaskGroups:
    """Splits the tasks of every batch into groups, and learns the groups while training.

    Iterate over it inside a batch; each :class:`Group` is one forward pass, backward pass and
    optimizer step. Model, optimizer and loop stay yours::

        groups = tg.TaskGroups(["depth", "normal", "edges"], warmup=100)

        for images, labels in loader:
            for group in groups:
                losses = criterion(model(images), labels)
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()

    The partition is learned from the affinity, as in "Selective Task Group Updates for Multi-Task
    Optimization" (ICLR 2025, arXiv 2502.11986): for ``warmup`` rounds every task is a group of its
    own, then the affinity is clustered. In a round every group of the partition is stepped on
    once; by default every batch is a round. A batch costs one forward and backward pass per group.

    Leaving a batch early (``break``, an exception) is legal; so is :meth:`Group.skip`. In the loop
    above, the heads of the tasks outside the group do not move. :meth:`attach` ensures this for
    stacked losses and models compiled whole as well, or lets them coast.

    Args:
        tasks: names of the K tasks, in the order of stacked losses.
        weights: factors of the losses, ``{task: weight}`` or one per task; 1 by default. Or a
            :class:`~taskgroup.methods.WeighingMethod` of the same tasks, such as
            ``tg.methods.UW(model.encoder, tasks)``: the loss of a step is then what the method
            makes of the losses of its group. The affinity and the listeners see the losses
            unweighted. If the method learns parameters, pass ``method.parameters()`` to the
            optimizer, and call :meth:`attach`.
        affinity: estimates how each task's step changes every loss; ``ProximalAffinity()`` by
            default.
        grouping: turns the affinity into a partition; ``AffinityPropagation()`` by default. Any
            callable that takes the matrix ``[K, K]`` and returns labels ``[K]``, or None to keep
            the partition.
        warmup: number of rounds that step on every task alone, before the first regrouping.
        regroup_every: number of rounds from one regrouping to the next.
        groups_per_batch: number of groups stepped on in one batch; None for the whole partition.
        observe_every: number of batches from one that observes the affinity to the next. If batches
            have labels of some tasks only, every task is observed in every n-th of its own batches.
            In other batches a step needs the losses of its own tasks only.
        reduction: ``"sum"`` or ``"mean"`` over the losses of the group.
        replay_rng: whether every forward pass of a batch starts from the same random state. Dropout
            then draws the same masks, so that a change of the losses is due to the step alone.
        process_group: the ranks that train one model; their losses are averaged. None for all ranks
            of ``torch.distributed``, if it is initialised. Every rank makes the same calls.
        seed: seed of the order of the groups; the same on every rank.

    Attributes:
        affinity: estimates how each task's step changes every loss. ``groups.affinity.matrix`` is
            ``[K, K]``, ``groups.affinity.observed`` how often each entry was observed.
        unconverged: how often the grouping found no partition, so that the old one was kept.

    Raises:
        ValueError: for an empty or duplicate task, an unknown, missing or negative weight, a
            setting out of range, a method of other tasks, or FAMO where no batch would show it the
            effect of a step.
        TypeError: if the affinity is not an :class:`Affinity`, the grouping is not callable, or the
            method cannot weigh the losses of a group.
        RuntimeError: at the first batch, if the ranks' settings or states differ.

    Example:
        >>> import torch
        >>> groups = TaskGroups(["a", "b"], warmup=1)
        >>> x = torch.zeros(2, requires_grad=True)
        >>> for batch in range(3):
        ...     for group in groups:
        ...         losses = {"a": (x - 3).square().sum(), "b": (x - 4).square().sum()}
        ...         (gradient,) = torch.autograd.grad(group.loss(losses), x)
        ...         _ = x.data.sub_(0.01 * gradient)
        >>> groups.partition        # both pull the same way
        [('a', 'b')]
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        weights: Mapping[str, float] | Sequence[float] | WeighingMethod | None = None,
        affinity: Affinity | None = None,
        grouping: Callable[[Tensor], Tensor | None] | None = None,
        warmup: int = 100,
        regroup_every: int = 1,
        groups_per_batch: int | None = None,
        observe_every: int = 1,
        reduction: Literal["sum", "mean"] = "sum",
        replay_rng: bool = True,
        process_group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        self._tasks = checked_tasks(tasks)
        method: object = None
        if weights is not None:
            # Not at the top of the file: this imports all methods, and most loops do without.
            from taskgroup.methods.method import JointMethod

            if isinstance(weights, JointMethod | type):
                method, weights = weights, None
        self._reader = LossReader(self._tasks, weights, reduction)
        self._weighting: Weighting | None = None
        if method is not None:
            from taskgroup.loop.weighting import Weighting

            self._weighting = Weighting(method, self._reader)
        if groups_per_batch is not None:
            groups_per_batch = whole_number("groups_per_batch", groups_per_batch, at_least=1)
        self._settings: dict[str, Any] = {
            "warmup": whole_number("warmup", warmup, at_least=0),
            "regroup_every": whole_number("regroup_every", regroup_every, at_least=1),
            "observe_every": whole_number("observe_every", observe_every, at_least=1),
            "groups_per_batch": groups_per_batch,
        }
        self._replay_rng = flag("replay_rng", replay_rng)
        self._ranks = Ranks(process_group)
        grouping = AffinityPropagation() if grouping is None else grouping
        self._partitioner = Partitioner(grouping, self._tasks)
        self.affinity = ProximalAffinity() if affinity is None else affinity
        examples = "tg.ProximalAffinity() or tg.GradientAffinity(model.encoder)"
        check_part("affinity", self.affinity, isinstance(self.affinity, Affinity), examples)
        self.affinity.start(self._tasks)
        self._observer = Observer(self._reader, self.affinity, self._weighting, self._ranks)
        learns = self._partitioner.learns
        self._misuse = Misuse(self._tasks, learns)

        # Saved by state_dict(), with the affinity and the grouping.
        self._generator = HostGenerator(seed)
        self._rounds = Rounds(
            len(self._tasks), self.affinity, self._generator, learns=learns, **self._settings
        )
        self._batches = 0  # begun
        self.unconverged = 0
        self._states = StatesOfOptimizers()
        self._whole: dict[str, Any] = {}  # the state before the open batch
        self._named: tuple[list[Members], list[tuple[str, ...]]] = [], []  # a partition, by names
        if not learns:
            self._rounds.regroup(self._regroup())
        if self._weighting is not None:
            self._weighting.check_observed(self.affinity, self._rounds.takes_one_step)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of stacked losses and of the affinity matrix."""
        return self._tasks

    @property
    def partition(self) -> list[tuple[str, ...]]:
        """The current groups, as task names in task order."""
        members, names = self._named
        if members is not self._rounds.partition:
            names = [self._reader.names(group) for group in self._rounds.partition]
            self._named = self._rounds.partition, names
        return list(names)

    @property
    def warming_up(self) -> bool:
        """Whether the round at hand belongs to the warm-up, and steps on every task alone."""
        return self._rounds.warming_up

    @property
    def first_rank(self) -> bool:
        """Whether this process is the first of the ranks, which alone writes files."""
        return self._ranks.is_first()

    @property
    def settings(self) -> dict[str, Any]:
        """What this object was made with, in numbers and words, to log or to tell runs apart."""
        grouping = self._partitioner.grouping
        return {
            "method": "joint" if isinstance(grouping, Together) else "selective",
            "grouping": settings_of(grouping)[0],
            "affinity": type(self.affinity).__name__,
            "decay": self.affinity.decay,
            **({} if self._weighting is None else {"group_weights": self._weighting.name}),
            **self._settings,
        }

    def __iter__(self) -> Iterator[Group]:
        """Start a batch in which all tasks are labelled, on every rank."""
        return self._deal(self._reader.everyone, everywhere=True)

    def batch(self, present: Iterable[str]) -> Iterator[Group]:
        """Start a batch in which only some tasks are labelled.

        With several ranks, each names the tasks labelled in its own part of the batch, and the
        groups cover the tasks of all ranks. That takes one exchange, which does not wait for a GPU
        if the ranks can communicate on the host (torch's default backend, ``"cpu:gloo,cuda:nccl"``,
        can). For a task in :attr:`Group.observed` without a label on this rank, pass a loss of zero
        that has a graph: ``output.sum() * 0`` or a masked mean.

        Args:
            present: the labelled tasks. Groups keep only these, and empty groups are dropped.
                Absent tasks are neither stepped on nor observed. If it is empty, so is the batch.

        Raises:
            ValueError: if a task is unknown.
            TypeError: if ``present`` is a string or a mapping.
        """
        return self._deal(checked_present(present, self._tasks), everywhere=False)

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        heads: Heads | None = None,
        outside: Outside = "hold",
        shared_state: SharedState = "all",
    ) -> Attachment:
        """Decide what a step does to the heads of the tasks outside the group.

        In every ``optimizer.step()``, with or without a closure, they have no gradient (``"hold"``:
        they do not move at all) or a gradient of zero (``"coast"``: momentum and weight decay still
        move them, as in the published runs). Without this call they hold, unless their gradients
        are zero instead of None: with stacked losses of a model that runs all heads, a model that
        is compiled whole, :class:`BatchedHeads` that run without ``group=``, and
        ``zero_grad(set_to_none=False)``. After the step, all gradients are restored.

        If one layer holds the heads of all tasks, as in ``nn.Linear(d, K)``, name its rows::

            rows = {t: [head.weight[k], head.bias[k]] for k, t in enumerate(tasks)}
            groups.attach(optimizer, rows)

        The rows outside the group are restored after the step, together with the optimizer's state
        of them. This copies the layer in every step, and the number of steps in the state (Adam's,
        for its bias correction) is the same for all rows.

        The parameters that a method learns, as ``weights`` of the losses, are treated like heads:
        each of their elements belongs to one task. They need not be named.

        With ``shared_state="group"``, every group has an optimizer state of its own for the shared
        parameters, those that belong to no head: moments and number of steps of Adam and AdamW,
        momentum of SGD. With ``"all"``, a step of one group also follows the momentum of the
        others. Each task remembers the state of the group it last stepped with, and a new group
        starts from the mean of the states of its tasks. ``optimizer.state`` holds the state of the
        group that stepped last, and :meth:`state_dict` the others, so save and load both. In
        memory, there is one state of the shared parameters for every group: K of them during the
        warm-up, and never more, except for one while a mean is computed. Sharded parameters
        (FSDP2) and optimizers with another state are not supported.

        A copy of the groups or of the optimizer is not attached; call this method again for it.

        Args:
            optimizer: the optimizer, or a list of the optimizers, that holds the heads. It may be
                wrapped by a trainer. LBFGS is not supported.
            heads: the parameters of each task alone, ``{task: module or parameters}``, with an
                empty list for a task without any, and rows for a parameter of several tasks. Not
                needed if a :class:`MultiTaskModel` is called with ``group=group``.
            outside: ``"hold"`` or ``"coast"``.
            shared_state: ``"all"``, one state of the shared parameters for all groups, or
                ``"group"``, one for each.

        Returns:
            An object whose ``remove()`` undoes the call.

        Raises:
            ValueError: if a task is unknown or missing, a parameter belongs to two tasks or is not
                in the optimizer, the optimizer is LBFGS or does not support ``shared_state``, or
                ``outside`` or ``shared_state`` is neither of the two.
            TypeError: if ``optimizer`` is not an optimizer, or ``heads`` not a mapping.
        """
        if outside not in ("hold", "coast"):
            raise ValueError(f"outside must be 'hold' or 'coast', got {outside!r}.")
        if shared_state not in ("all", "group"):
            raise ValueError(f"shared_state must be 'all' or 'group', got {shared_state!r}.")
        optimizers = unwrapped(optimizer)
        weighting = self._weighting
        learned = None if weighting is None else weighting.learned_in(optimizers)
        attachment = Attachment(
            optimizers,
            self._tasks,
            heads,
            outside,
            self._observer.about_to_step,
            self._states if shared_state == "group" else None,
            learned,
        )
        if weighting is not None and learned is not None:
            weighting.attachment = attachment
        return attachment

    def listen(self, listener: Listener) -> None:
        """Let an object hear of the batches, on the first rank alone; a :class:`Recorder` does."""
        self._observer.listeners.append(listener)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume exactly; it loads under ``weights_only=True``.

        In a signal handler, from which a trainer may save at any line of the loop (Lightning on
        SLURM), this is the state before the open batch.

        The optimizer states of the groups (``shared_state="group"`` of :meth:`attach`) are the
        tensors themselves, as in the ``state_dict()`` of an optimizer. All else is a copy.

        Raises:
            RuntimeError: inside a batch, because its open step would be lost.
        """
        if self._observer.batch is None:
            return self._states.saved_with(_saved(self._state()))
        if not in_signal_handler():
            raise RuntimeError(
                "state_dict() inside a batch would lose its open step; call it after the loop "
                "over the groups."
            )
        # As model and optimizer, the states of the groups are those of this moment.
        return self._states.saved_with(_saved(self._whole))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken.

        The settings (warm-up, decay, grouping and so on) of this object do not change. Optimizer
        states of groups may be loaded before :meth:`attach` is called, and before or after the
        optimizer. If the state has none, every group starts from the state of the optimizer.

        Raises:
            ValueError: if the state is of other tasks or other optimizers, of another version or
                incomplete. Nothing has changed then.
            RuntimeError: inside a batch.
        """
        if self._observer.batch is not None:
            raise RuntimeError("load_state_dict() inside a batch; call it before the loop.")
        kept = self._state()  # its tensors are replaced below, not written to
        check_state(state, kept, optional=StatesOfOptimizers.KEY)
        load_states = self._states.prepare(state.get(StatesOfOptimizers.KEY, []))
        try:
            self._load(state)
        except Exception:
            self._load(kept)
            raise
        load_states()
        self._ranks.compare_again()
        self._observer.forget_all()
        self._reader.forget_device()

    def __repr__(self) -> str:
        return f"TaskGroups({len(self._tasks)} tasks in {len(self._rounds.partition)} groups)"

    def _state(self) -> dict[str, Any]:
        """What :meth:`state_dict` saves, with the tensors themselves instead of copies."""
        learned = {} if self._weighting is None else {"weights": self._weighting.method.memory()}
        return {
            "version": _STATE_VERSION,
            "tasks": list(self._tasks),
            **learned,
            **self._rounds.state(),
            "batches": self._batches,
            "unconverged": self.unconverged,
            "generator": self._generator.get_state(),
            "affinity": self.affinity.tensors(),
            "grouping": self._partitioner.state_dict(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._rounds.load(state)
        self.affinity.load_state_dict(state["affinity"])
        self._partitioner.load_state_dict(state["grouping"])
        if self._weighting is not None:
            self._weighting.method.load_state_dict(state["weights"])  # last: it cannot be undone
        self._generator.set_state(state["generator"].cpu())
        self._batches = state["batches"]
        self.unconverged = state["unconverged"]

    def _deal(self, here: Members, *, everywhere: bool) -> Iterator[Group]:
        """One batch: its groups one by one, each from the same random state."""
        refuse_accumulation()
        self._ranks.meet(self._decisive, len(self._tasks))
        if everywhere or self._ranks.number == 1:
            batch = Batch(self._batches, here)
        else:
            batch = Batch.over_ranks(self._ranks, self._batches, here, self._reader.everyone)
        if not batch.present:
            return
        self._observer.look()
        self._misuse.check_batch(batch.present)
        self._states.check_attached()
        whole = self._whole = self._state()  # first: a signal handler may save at any line
        self._observer.open(batch)
        try:
            self._batches += 1
            plans = self._rounds.plan(batch.present, self._regroup)
            if self._weighting is not None:
                self._weighting.begin_batch()
            if plans[0].observes or plans[0].measures:  # the affinity will be written to
                whole["affinity"] = {name: t.clone() for name, t in whole["affinity"].items()}
            if self._replay_rng and len(plans) > 1:
                self._observer.keep_random_state()
            for plan in plans:
                self._observer.move_to(plan)
                self._misuse.check_step(plan)
                group = Group(
                    plan, batch, self._reader, self._weighting, self._observer, self._misuse
                )
                yield group
                if self._observer.batch is not batch:
                    raise RuntimeError(
                        "Another batch of these TaskGroups has begun; finish one loop over the "
                        "groups before the next."
                    )
                group.finish()
        finally:
            if self._observer.batch is batch:
                self._observer.close()
                self._whole = {}

    def _decisive(self) -> dict[str, object]:
        """What all decisions follow from, under the names that a user knows."""
        state = {**_saved(self._state()), "shared_state": self._states.groups()}
        weighting = self._weighting
        parts = settings_of(self.affinity), settings_of(self._partitioner.grouping)
        return {
            "tasks": self._tasks,
            "weights": self._reader.weights if weighting is None else settings_of(weighting.method),
            "settings": (self._reader.reduction, self._settings, *parts),
            "seed": state.pop("generator"),
            "state": state,
        }

    def _regroup(self) -> list[Members] | None:
        """The new partition, or None if the grouping found none."""
        partition = self._partitioner.partition(self._observer.matrix)
        self.unconverged += partition is None
        return partition


def _saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with copies of the tensors of the affinity and of the weights, and of the groups."""

    def copied(part: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in part.items()}

    return {
        **state,
        **{name: [list(members) for members in state[name]] for name in ("partition", "queue")},
        **{name: copied(state[name]) for name in ("affinity", "weights") if name in state},
    }
