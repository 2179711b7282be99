"""Which groups are updated, in what order, on which batch."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from taskgroup._arguments import listed, whole_number
from taskgroup._generator import HostGenerator
from taskgroup._random_state import RandomState
from taskgroup.affinity.base import Affinity, Losses
from taskgroup.affinity.proximal import ProximalAffinity
from taskgroup.grouping.propagation import AffinityPropagation
from taskgroup.loop.group import Batch, Group
from taskgroup.loop.losses import ZERO_LOSS, LossReader
from taskgroup.loop.observer import Observer
from taskgroup.loop.partial_labels import Meetings, Turns
from taskgroup.loop.ranks import Ranks
from taskgroup.loop.rounds import Members, Rounds, union
from taskgroup.loop.trainers import in_signal_handler, refuse_accumulation
from taskgroup.nn.outside import Attachment, Heads, Outside, unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has


__all__ = ["TaskGroups"]

_STATE_VERSION = 2
_SHARES_TOLERANCE = 1e-6  # ten shares of 0.1 add up to 1, up to rounding
_LEFT_EARLY = 20  # batches in a row, after which it is no accident


@dataclass
class _State:
    """What :meth:`TaskGroups.state_dict` saves."""

    partition: list[Members]
    queue: list[Members]
    rounds: int
    batches: int
    turns: list[int]
    unconverged: int
    generator: Tensor
    affinity: dict[str, Tensor]  # those that are in use, not copies
    grouping: dict[str, Any]

    def saved(self, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Copies, of types that load under ``weights_only=True``."""
        return {
            "version": _STATE_VERSION,
            "tasks": list(tasks),
            "partition": [list(members) for members in self.partition],
            "queue": [list(members) for members in self.queue],
            "rounds": self.rounds,
            "batches": self.batches,
            "turns": self.turns,
            "unconverged": self.unconverged,
            "generator": self.generator,
            "affinity": {name: t.to("cpu", copy=True) for name, t in self.affinity.items()},
            "grouping": self.grouping,
        }


class TaskGroups:
    """Deals the tasks of every batch out in groups, and learns the groups while training.

    Iterate over it inside a batch; each :class:`Group` is one forward, backward and optimizer
    step. Model, optimizer and loop stay yours::

        groups = tg.TaskGroups(["depth", "normal", "edges"], warmup=100)

        for images, labels in loader:
            for group in groups:
                losses = criterion(model(images), labels)
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()

    The partition is learned from the affinity, as in "Selective Task Group Updates for Multi-Task
    Optimization" (ICLR 2025, arXiv 2502.11986): for ``warmup`` rounds every task is a group of its
    own, then the affinity is clustered. A round deals the whole partition out once; by default
    every batch is a round. A batch costs its steps, one forward and backward pass per group.

    Leaving a batch early (``break``, an exception) is legal; so is :meth:`Group.skip`. In the loop
    above the heads of the tasks outside the group stay where they are; :meth:`attach` makes sure of
    it for stacked losses and models compiled whole, or chooses otherwise.

    Args:
        tasks: names of the K tasks, in the order of stacked losses.
        weights: of the losses, ``{task: weight}`` or one per task; 1 by default.
        affinity: estimates how each task's step changes every loss; ``ProximalAffinity()`` by
            default.
        grouping: from affinity to partition; ``AffinityPropagation()`` by default. Any callable
            that takes the matrix ``[K, K]`` and returns labels ``[K]``, or None for "keep".
        warmup: rounds that step on every task alone, before the first regrouping.
        regroup_every: rounds from one regrouping to the next, of which the first ends the warm-up.
        groups_per_batch: groups dealt to one batch; None is the whole partition.
        observe_every: batches from one that observes the affinity to the next; where batches have
            labels of some tasks only, every task is observed in every n-th of its own. Between
            them a step needs the losses of its own tasks only, so the other heads need not run.
        reduction: ``"sum"`` or ``"mean"`` over the losses of the group.
        replay_rng: start every forward of a batch from the same random state, so that dropout
            draws the same masks and a change of loss shows the step, not the draw.
        process_group: the ranks that train one model, whose losses are averaged; None is all of
            them, where ``torch.distributed`` runs. Every rank makes the same calls.
        seed: of the order of the groups; the same on every rank.

    Attributes:
        affinity: estimates how each task's step changes every loss. ``groups.affinity.matrix`` is
            ``[K, K]``, ``groups.affinity.observed`` how often each entry was observed.
        unconverged: how often the grouping found no partition and the old one was kept.

    Raises:
        ValueError: for an empty or duplicate task, an unknown, missing or negative weight, or a
            setting out of range; the sentence names it.
        TypeError: for an affinity or grouping that is none.
        RuntimeError: at the first batch, if the ranks' settings or states differ.

    Example:
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
        weights: Mapping[str, float] | Sequence[float] | None = None,
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
        self._tasks = _checked_tasks(tasks)
        self._reader = LossReader(self._tasks, weights, reduction)
        self._warmup = whole_number("warmup", warmup, at_least=0)
        self._regroup_every = whole_number("regroup_every", regroup_every, at_least=1)
        self._groups_per_batch = None
        if groups_per_batch is not None:
            self._groups_per_batch = whole_number("groups_per_batch", groups_per_batch, at_least=1)
        self._observe_every = whole_number("observe_every", observe_every, at_least=1)
        self._replay_rng = replay_rng
        self._ranks = Ranks(process_group)
        self._alike = False  # the ranks have been compared
        self._grouping = AffinityPropagation() if grouping is None else _checked_grouping(grouping)
        # With one task there is nothing to learn.
        self._learns = len(self._tasks) > 1 and getattr(self._grouping, "reads_affinity", True)
        self.affinity = ProximalAffinity() if affinity is None else _checked_affinity(affinity)
        if hasattr(self._grouping, "start"):
            self._grouping.start(self._tasks)
        self.affinity.start(self._tasks)
        self._observer = Observer(self._reader, self.affinity, self._ranks)

        # Saved by state_dict(), with the affinity and the grouping.
        self._generator = HostGenerator(seed)
        self._rounds = Rounds(
            len(self._tasks),
            warmup=self._warmup if self._learns else self._regroup_every,
            regroup_every=self._regroup_every,
            groups_per_batch=self._groups_per_batch,
            random=self._generator,
        )
        self._batches = 0  # begun
        self._turns = Turns(len(self._tasks), self.affinity.every or self._observe_every)
        self.unconverged = 0

        # Of the batch at hand, if any.
        self._batch: Batch | None = None
        self._group: Group | None = None  # handed out last
        self._whole: _State | None = None  # of the last whole batch, while one is open
        self._given: weakref.ref[Tensor] | None = None  # the first loss that this group was given

        # Of tasks that are never labelled in one batch; None where that is not to be told of.
        self._meetings = Meetings(self._tasks) if self._learns else None
        self._left_early = 0  # consecutive batches of several steps that were left before the last
        self._stepping: Group | None = None  # whose loss was asked for last
        self._asked = 0  # how often a loss was asked for
        self._told_of_one_forward = False

        if not self._learns:
            self._rounds.partition = self._regroup() or self._rounds.partition

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of stacked losses and of the affinity matrix."""
        return self._tasks

    @property
    def partition(self) -> list[tuple[str, ...]]:
        """Today's groups, as task names in task order."""
        return [self._reader.names(members) for members in self._rounds.partition]

    def __iter__(self) -> Iterator[Group]:
        """Start a batch in which all tasks are labelled, on every rank."""
        return self._deal(self._reader.everyone, everywhere=True)

    def batch(self, present: Iterable[str]) -> Iterator[Group]:
        """Start a batch in which only some tasks are labelled.

        Over several ranks every one names the tasks labelled in its own part of the batch, and the
        tasks of all are dealt; that takes one exchange among the ranks, which does not wait for a
        GPU where they can talk on the host (a backend such as ``"cpu:gloo,cuda:nccl"``, torch's
        default). A task in :attr:`Group.observed` that has no label on this rank takes a zero with
        a graph, ``output.sum() * 0`` or a masked mean.

        Args:
            present: the labelled tasks. Groups keep only these; groups left empty are dropped.
                Absent tasks are neither stepped nor observed. Without any there is no group.

        Raises:
            ValueError: if a task is unknown.
            TypeError: if ``present`` is a string or a mapping.
        """
        if isinstance(present, str):
            raise TypeError(f"batch() takes a collection of tasks, got {present!r}; put it in [].")
        if isinstance(present, Mapping):
            raise TypeError(
                "batch() takes the names of the labelled tasks, got a mapping, whose values it "
                "would not look at: write groups.batch([task for task, mask in masks.items() if "
                "mask.any()]), or groups.batch(labels.keys()) if every task in it is labelled."
            )
        present = set(present)
        if unknown := sorted(present.difference(self._tasks), key=repr):
            raise ValueError(
                f"batch() got unknown tasks {listed(unknown)}; they are {listed(self._tasks)}."
            )
        here = tuple(k for k, task in enumerate(self._tasks) if task in present)
        return self._deal(here, everywhere=False)

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        heads: Heads | None = None,
        outside: Outside = "hold",
    ) -> Attachment:
        """Decide what a step does to the heads of the tasks outside the group.

        In every ``optimizer.step()`` they have no gradient (``"hold"``: they do not move at all) or
        a gradient of zero (``"coast"``: momentum and weight decay go on moving them, as in the
        published runs), also where the step is given a closure that makes the gradients. Without
        this call they hold, unless the losses are stacked, the model is compiled whole or
        ``zero_grad(set_to_none=False)`` is called: then they coast. After the step the gradients
        that were held back are in their place again.

        One layer for the heads of all tasks, ``nn.Linear(d, K)``, is named by its rows::

            rows = {t: [head.weight[k], head.bias[k]] for k, t in enumerate(tasks)}
            groups.attach(optimizer, rows)

        The rows outside the group are put back after the step, with the optimizer's state of them;
        that costs a copy of the layer a step, and the count of steps in the state (Adam's, for its
        bias correction) stays one for all rows.

        A copy of the groups or of the optimizer is not attached: call this again for it.

        Args:
            optimizer: whose steps are prepared, one or a list of those that hold the heads; what a
                trainer has wrapped will do. Not LBFGS.
            heads: the parameters of each task alone, ``{task: module or parameters}``, an empty
                list for a task without any; for a parameter of several tasks, its rows. Not needed
                where a :class:`MultiTaskModel` is called with ``group=group``.
            outside: ``"hold"`` or ``"coast"``.

        Returns:
            An object whose ``remove()`` takes the call back.

        Raises:
            ValueError: if a task is unknown or missing, a parameter belongs to two tasks or is not
                in the optimizer, the optimizer is LBFGS, or ``outside`` is neither of the two.
            TypeError: if ``optimizer`` is none, or ``heads`` no mapping.
        """
        if outside not in ("hold", "coast"):
            raise ValueError(f"outside must be 'hold' or 'coast', got {outside!r}.")
        return Attachment(unwrapped(optimizer), self._tasks, heads, outside, self._about_to_step)

    def _about_to_step(self, prepared: int) -> tuple[frozenset[int] | None, Heads | None, int]:
        """The members of the group whose step is about to be taken, and its model's heads.

        Args:
            prepared: the number that this gave at the last step.
        """
        group, asked = self._stepping, self._asked
        in_loop = self._batch is not None and group is self._group
        if group is None or (asked == prepared and not in_loop):
            return None, None, prepared  # a step of other losses, after the loop
        heads = None if group.model is None else group.model.heads
        return frozenset(group._members), heads, asked

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs; it loads under ``weights_only=True``.

        In the handler of a signal, where a trainer saves at whatever line the loop is (Lightning
        on SLURM), it is the state of the last whole batch.

        Raises:
            RuntimeError: inside a batch, whose open step would be lost.
        """
        if self._batch is None:
            return self._state().saved(self._tasks)
        if not in_signal_handler():
            raise RuntimeError(
                "state_dict() inside a batch would lose its open step; call it after the loop "
                "over the groups."
            )
        assert self._whole is not None
        return self._whole.saved(self._tasks)

    def _state(self) -> _State:
        grouping = self._grouping
        return _State(
            partition=[*self._rounds.partition],
            queue=[*self._rounds.queue],
            rounds=self._rounds.begun,
            batches=self._batches,
            turns=self._turns.state(),
            unconverged=self.unconverged,
            generator=self._generator.get_state(),
            affinity=self.affinity.tensors(),
            grouping=grouping.state_dict() if hasattr(grouping, "state_dict") else {},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken.

        The settings (warm-up, decay, grouping and so on) stay those of this object.

        Raises:
            ValueError: if the state is of other tasks, of another version or not whole. Nothing has
                changed then.
            RuntimeError: inside a batch.
        """
        if self._batch is not None:
            raise RuntimeError("load_state_dict() inside a batch; call it before the loop.")
        kept = self.state_dict()
        if differing := sorted(set(kept) ^ set(state)):
            raise ValueError(
                f"This is not the state of a TaskGroups: {', '.join(differing)} missing or "
                "unexpected; pass what state_dict() returned."
            )
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"The state has version {state['version']}, this taskgroup reads version "
                f"{_STATE_VERSION}; load it with the taskgroup that wrote it."
            )
        if tuple(state["tasks"]) != self._tasks:
            raise ValueError(
                f"The state is of the tasks {listed(state['tasks'])}, these are "
                f"{listed(self._tasks)}; name the same tasks in the same order."
            )
        partition = [tuple(members) for members in state["partition"]]
        queue = [tuple(members) for members in state["queue"]]
        if sorted(sum(partition, ())) != list(range(len(self._tasks))) or not all(partition):
            raise ValueError("The partition in the state does not hold every task once.")
        if not set(queue) <= set(partition):
            raise ValueError("The state deals out groups that are not in its partition.")
        if len(state["turns"]) != len(self._tasks):
            raise ValueError("The turns in the state are not one number for every task.")
        self.affinity.load_state_dict(state["affinity"])
        try:
            if hasattr(self._grouping, "load_state_dict"):
                self._grouping.load_state_dict(state["grouping"])
            self._generator.set_state(state["generator"].cpu())
        except Exception:
            self.affinity.load_state_dict(kept["affinity"])
            raise
        self._rounds.partition = partition
        self._rounds.queue = queue
        self._rounds.begun = state["rounds"]
        self._batches = state["batches"]
        self._turns.load(state["turns"])
        self.unconverged = state["unconverged"]
        self._stepping = None
        self._alike = False
        self._observer.forget_all()
        self._reader.forget_device()

    def __getstate__(self) -> dict[str, Any]:
        """A copy stands between two batches, and what was on its way to the host is not copied."""
        return {
            **self.__dict__,
            "_batch": None,
            "_group": None,
            "_whole": None,
            "_given": None,
            "_stepping": None,
            "_alike": False,
        }

    def __repr__(self) -> str:
        return f"TaskGroups({len(self._tasks)} tasks in {len(self._rounds.partition)} groups)"

    def _deal(self, here: Members, *, everywhere: bool) -> Iterator[Group]:
        """One batch: its groups one by one, each from the same random state."""
        refuse_accumulation()
        if self._ranks.changed():
            self._ranks.join()
            self._alike = False
        if self._ranks.number > 1 and not self._alike:
            self._ranks.check_alike(self._decisive(), len(self._tasks))
            self._alike = True
        if self._left_early == _LEFT_EARLY:
            self._left_early += 1  # said once in a row
            warnings.warn(
                f"The last {_LEFT_EARLY} batches of several steps were left before their last "
                "group, so that not all groups were stepped on and little was observed. Where a "
                "trainer takes one step per batch, take the steps yourself (in Lightning: "
                "self.automatic_optimization = False), or choose groups_per_batch=1 with "
                "GradientAffinity.",
                stacklevel=2,
            )
        several = self._ranks.number > 1
        batch = self._batch_of_ranks(here) if several and not everywhere else Batch(here)
        if not batch.present:
            return
        self._observer.look()
        if self._meetings is not None:
            self._tell_of_strangers(batch.present)
        whole = self._whole = self._state()
        self._batch = batch
        self._group = self._given = None
        self._observer.forget_step()
        try:
            self._batches += 1
            steps, observes, to_measure = self._plan(batch.present)
            if observes or to_measure:
                whole.affinity = {name: t.clone() for name, t in whole.affinity.items()}
            replay = self._replay_rng and len(steps) > 1
            random_state = RandomState(self._reader.device) if replay else None
            self._left_early += len(steps) > 1
            for place, members in enumerate(steps):
                if random_state is not None and place > 0:
                    random_state.replay()
                # Inside one autocast block for several steps its copies of the weights would stay
                # those from before the first.
                torch.clear_autocast_cache()
                measures = to_measure if place == 0 else ()
                group = self._group = Group(
                    self._reader,
                    self._loss,
                    batch,
                    members,
                    batch.present if observes else union(members, measures),
                    measures,
                    observes=observes,
                    place=place,
                    last=place == len(steps) - 1,
                )
                if group.last and len(steps) > 1:
                    self._left_early = 0
                yield group
                if self._batch is not batch:
                    raise RuntimeError(
                        "Another batch of these TaskGroups has begun; finish one loop over the "
                        "groups before the next."
                    )
                self._close(group)
        finally:
            if self._batch is batch:  # the group outlives it, until the next batch begins
                self._batch = self._whole = None
                self._observer.forget_step()

    def _decisive(self) -> dict[str, object]:
        """What the decisions follow from, by the name a user knows it by."""
        state = self.state_dict()
        generator = state.pop("generator")
        return {
            "tasks": self._tasks,
            "weights": self._reader.weights,
            "settings": (
                self._reader.reduction,
                self._warmup,
                self._regroup_every,
                self._groups_per_batch,
                self._observe_every,
                _settings_of(self.affinity),
                _settings_of(self._grouping),
            ),
            "seed": generator,
            "state": state,
        }

    def _batch_of_ranks(self, here: Members) -> Batch:
        """The batch of all ranks, of which ``here`` are the tasks labelled on this one."""
        mine = set(here)
        counts = self._ranks.count([k in mine for k in self._reader.everyone], self._batches)
        present = tuple(k for k, count in enumerate(counts) if count)
        if all(counts[k] == self._ranks.number for k in present):
            return Batch(present)
        factors = torch.zeros(len(counts), dtype=torch.float64, device="cpu")
        for k in here:
            factors[k] = self._ranks.number / counts[k]
        return Batch(present, frozenset(present) - mine, factors)

    def _tell_of_strangers(self, present: Members) -> None:
        assert self._meetings is not None
        if present != self._reader.everyone:
            told = self._meetings.note(present)
            if told is not None:
                warnings.warn(told, stacklevel=3)
            elif not self._meetings.all_met():
                return
        self._meetings = None

    def _plan(self, present: Members) -> tuple[list[Members], bool, Members]:
        """What to do in one batch.

        Returns:
            The groups, cut down to the present tasks, at least one; whether they are observed; the
            tasks whose gradients to measure in the first step.
        """
        # One task alone has nothing to be compared with.
        due = len(present) > 1 and self.affinity.reads_steps and self._turns.due(present)
        begun = self._rounds.begun
        steps = self._rounds.deal(present, self._regroup, again=due and self._learns)
        observes = due and len(steps) > 1
        to_measure: Members = ()
        if self.affinity.every is not None and self._rounds.begun > begun and len(present) > 1:
            due = self._turns.due(present)
            to_measure = self.affinity.draw(present) if due else ()
        if observes or to_measure:
            self._turns.taken(present)
        return steps, observes, to_measure

    def _regroup(self) -> list[Members] | None:
        """The new partition, or None where the grouping found none."""
        if not self._learns:  # no reason to wait for what is not looked at
            n_tasks = len(self._tasks)
            matrix = torch.full((n_tasks, n_tasks), math.nan, dtype=torch.float32, device="cpu")
        else:
            matrix = self._observer.matrix()
        if not getattr(self._grouping, "takes_nan", False):
            matrix = matrix.nan_to_num(nan=0.0)
        labels = self._grouping(matrix)
        if labels is None:
            self.unconverged += 1
            return None
        if (
            not isinstance(labels, Tensor)
            or labels.shape != (len(self._tasks),)
            or labels.dtype != torch.int64
        ):
            got = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else labels
            raise ValueError(
                f"The grouping must return an int64 tensor of {len(self._tasks)} labels, one per "
                f"task, or None to keep the partition; got {got}."
            )
        members: dict[int, list[int]] = {}
        for k, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(k)
        return [tuple(group) for group in members.values()]

    def _loss(self, group: Group, losses: Losses, share: float, again: bool) -> Tensor:
        """See :meth:`Group.loss`."""
        if group._skipped:
            raise RuntimeError(
                f"The group {listed(group.tasks)} was skipped and takes no loss any more."
            )
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share!r}.")
        again = again and group._shares > 1 - _SHARES_TOLERANCE
        shares = group._shares + (0.0 if again else share)
        if shares > 1 + _SHARES_TOLERANCE:
            raise ValueError(
                f"The shares of the group {listed(group.tasks)} would add up to {shares:g}: call "
                "group.loss(losses) once per step, or with share=1/n in each of n micro-batches. "
                "Where one step takes several passes over its losses, in the second pass of SAM "
                "or the closure of L-BFGS, write group.loss(losses, again=True)."
            )
        batch = group._batch
        needed = group._needed
        if again and isinstance(losses, Mapping):
            needed = group._members
        if batch.absent and isinstance(losses, Mapping):
            self._check_absent(losses, group, needed)
        value, measured = self._reader.read(losses, group._members, needed, batch.factors)
        self._stepping = group
        self._asked += 1
        if again:
            return value * share
        self._tell_of_one_forward(group, losses)
        if group._measures and group._measured is None and group is self._group:
            self._observer.measure_gradients(group, losses, measured, self._batches)
        if share != 1.0:
            value, measured = value * share, measured * share
        if group._measured is not None:
            measured += group._measured
        group._measured = measured
        group._shares = shares
        if shares > 1 - _SHARES_TOLERANCE and group is self._group:
            self._observer.measure(group, measured, self._batches)
        return value

    def _tell_of_one_forward(self, group: Group, losses: Losses) -> None:
        """Warn, once, where a group is given the very losses of the group before it."""
        if group._shares > 0 or self._told_of_one_forward:
            return
        first = losses if isinstance(losses, Tensor) else next(iter(losses.values()))
        if not isinstance(first, Tensor):
            return  # of a task that this step does not need, which may be anything
        if self._given is not None and self._given() is first and first.grad_fn is not None:
            self._told_of_one_forward = True
            warnings.warn(
                "group.loss() was given the same losses as for the group before, so no forward "
                "pass was run in between: move it into the loop over the groups. Otherwise every "
                "step after the first follows gradients from before it, and no affinity can be "
                "observed. This is said once.",
                stacklevel=4,  # the loop's call of group.loss
            )
        self._given = weakref.ref(first)

    def _check_absent(self, losses: Mapping[str, Tensor], group: Group, needed: Members) -> None:
        """The losses of the tasks that other ranks have labels of hang on the outputs."""
        for k in sorted(group._batch.absent.intersection(needed)):
            task = self._tasks[k]
            if task not in losses:
                wrong = "is missing"
            elif k in group._members and getattr(losses[task], "is_leaf", False):
                wrong = "hangs on nothing"
            else:
                continue
            raise ValueError(
                f"The loss of task {task!r} {wrong}: without a label on this rank, it has one on "
                f"another, and all take the same steps. {ZERO_LOSS}"
            )

    def _close(self, group: Group) -> None:
        """The loop asks for the next group: the step on this one must have been taken."""
        if group._skipped:
            if group._shares > 0:  # its losses were seen, but no step followed
                self._observer.forget_step()
        elif group._shares == 0:
            raise RuntimeError(
                f"The group {listed(group.tasks)} got no loss: call group.loss(losses) on every "
                "group, or group.skip() to pass over it."
            )
        elif group._shares < 1 - _SHARES_TOLERANCE:
            raise RuntimeError(
                f"The shares of the group {listed(group.tasks)} add up to {group._shares:g}, not "
                "to 1; pass share=1/n in each of the n micro-batches of a step."
            )


def _settings_of(part: object) -> tuple[str, dict[str, object]]:
    """The name of its class, or of a function, and the plain values it was made with."""
    plain = (bool, int, float, str, type(None))
    return (
        getattr(part, "__qualname__", type(part).__qualname__),
        {
            name: value
            for name, value in getattr(part, "__dict__", {}).items()
            if isinstance(value, plain)
        },
    )


def _checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str):
        raise TypeError(f"tasks takes a list of names, got the string {tasks!r}; put it in [].")
    names = tuple(tasks)
    if not names:
        raise ValueError("tasks is empty; name at least one.")
    seen: set[str] = set()
    for k, task in enumerate(names):
        if not isinstance(task, str) or not task:
            raise ValueError(f"Task {k} must be a non-empty string, got {task!r}.")
        if task in seen:
            raise ValueError(f"Task {task!r} is named twice; give every task a name of its own.")
        seen.add(task)
    # Plain strings, whatever kind they are of: NumPy's would not load under weights_only=True.
    return tuple(str.__str__(task) for task in names)


def _checked_affinity(affinity: object) -> Affinity:
    if isinstance(affinity, type):
        raise TypeError(
            f"affinity takes an object, got the class {affinity.__name__}; call it, as in "
            "tg.ProximalAffinity()."
        )
    if not isinstance(affinity, Affinity):
        raise TypeError(
            "affinity takes an object, such as tg.ProximalAffinity() or "
            f"tg.GradientAffinity(model.encoder), got {affinity!r}."
        )
    return affinity


def _checked_grouping(grouping: object) -> Callable[[Tensor], Tensor | None]:
    if isinstance(grouping, type):
        raise TypeError(
            f"grouping takes an object, got the class {grouping.__name__}; call it, as in "
            "tg.AffinityPropagation() or tg.KMeans(m)."
        )
    if not callable(grouping):
        raise TypeError(
            "grouping takes an object such as tg.AffinityPropagation(), tg.KMeans(m) or "
            "tg.Fixed(partition), or a function from the affinity [K, K] to labels [K]; got "
            f"{grouping!r}."
        )
    return grouping
