"""Keeps an optimizer's state of the shared parameters apart for every task group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from taskgroup.nn.mean_state import Entry, check_entry, mean_entry
from taskgroup.ops._sharded import is_sharded

__all__ = ["GroupStates", "Members", "StatesOfOptimizers"]

Members = tuple[int, ...]  # positions of tasks, ascending


class _State:
    """The state of one group, without the parameters that have none yet.

    The entries of the group that stepped last are in the optimizer instead.
    """

    def __init__(self, group: Members) -> None:
        self.group = group
        self.entries: dict[Tensor, Entry] = {}


class GroupStates:
    """The state of the shared parameters in one optimizer, for every task group.

    Each task refers to the state of the group that it last stepped with. A new group starts from
    the mean over its tasks. A state that no task refers to is freed. So there is one state for each
    group once all groups of the partition have stepped, and there are never more than K.

    Before the first step, all tasks refer to the state that the optimizer has, if any.

    Args:
        optimizer: the optimizer. Its ``state`` holds the state of the group that stepped last.
        n_tasks: the number of tasks, K.
        heads: returns the ids of the parameters that are not shared.
    """

    def __init__(
        self, optimizer: Optimizer, n_tasks: int, heads: Callable[[], frozenset[int]]
    ) -> None:
        self.optimizer = optimizer
        self._heads = heads
        self._current = _State(())
        self._of_task = [self._current] * n_tasks
        self._checked = False  # the optimizer has a state that can be averaged

    def use(self, group: Members) -> None:
        """Put the state of this group into the optimizer, in exchange for the one that is there."""
        state = self._of_task[group[0]]
        if state.group != group or any(self._of_task[k] is not state for k in group):
            state = self._begin(group)
        if state is not self._current:
            self._exchange(state)

    def check(self) -> None:
        """Raise if the state that the optimizer has is not one that can be averaged."""
        if self._checked:
            return
        name = type(self.optimizer).__name__
        entries = [self.optimizer.state.get(p) for p, _ in self._shared() if p.grad is not None]
        for entry in filter(None, entries):
            check_entry(entry, name)
            self._checked = True
        # Without momentum, SGD has no state.
        if entries and not self._checked and not isinstance(self.optimizer, SGD | Adam):
            raise ValueError(
                f"{name} has no state after its step where torch's optimizers have theirs, in "
                "optimizer.state, so shared_state='group' of attach() cannot exchange it: take "
                "Adam, AdamW or SGD, or leave shared_state='all'."
            )

    def check_attachable(self) -> None:
        """Raise if the optimizer holds what this class does not support."""
        name = type(self.optimizer).__name__
        for parameter, _ in _parameters(self.optimizer):
            check_entry(self.optimizer.state.get(parameter, {}), name)
            if is_sharded(parameter):
                raise ValueError(
                    f"{name} holds a parameter of shape {list(parameter.shape)} that is sharded "
                    "over ranks (FSDP2, DTensor), which shared_state='group' of attach() does not "
                    "support: leave shared_state='all', or train with DistributedDataParallel."
                )

    def state_dict(self) -> dict[str, Any]:
        """All states except for the one in the optimizer, with the tensors themselves."""
        at = {parameter: i for i, (parameter, _) in enumerate(_parameters(self.optimizer))}
        states = list(dict.fromkeys([*self._of_task, self._current]))
        return {
            "of_task": [states.index(state) for state in self._of_task],
            "current": states.index(self._current),
            "groups": [list(state.group) for state in states],
            "states": [
                {at[p]: dict(entry) for p, entry in state.entries.items() if p in at}
                for state in states
            ],
        }

    def read(self, saved: Mapping[str, Any]) -> Callable[[], None]:
        """Read what :meth:`state_dict` returned; call the result to load it.

        Tensors are copied to the device of their parameter.
        """
        parameters = list(_parameters(self.optimizer))
        try:
            states = [_State(tuple(group)) for group in saved["groups"]]
            for state, entries in zip(states, saved["states"], strict=True):
                for i, entry in entries.items():
                    state.entries[parameters[i][0]] = _placed(entry, *parameters[i])
            current = states[saved["current"]]
            of_task = [states[i] for i in saved["of_task"]]
            if len(of_task) != len(self._of_task):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise ValueError(
                "The state holds optimizer states of groups that do not fit the "
                f"{type(self.optimizer).__name__}: attach optimizers of the same parameters, in "
                "the same order, as those that were attached when it was saved."
            ) from None

        def load() -> None:
            self._of_task, self._current = of_task, current

        return load

    def forget(self) -> None:
        """Let every group start from the state in the optimizer."""
        self._current = _State(())
        self._of_task = [self._current] * len(self._of_task)

    def groups(self) -> list[Members]:
        """For each task, the group that it last stepped with."""
        return [state.group for state in self._of_task]

    def _shared(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The shared parameters, each with the options of its parameter group."""
        heads = self._heads()
        return (pair for pair in _parameters(self.optimizer) if id(pair[0]) not in heads)

    @torch.no_grad()
    def _begin(self, group: Members) -> _State:
        """The state of a new group: the mean over its tasks."""
        counts: dict[_State, int] = {}
        state = _State(group)
        for k in group:
            before = self._of_task[k]
            counts[before] = counts.get(before, 0) + 1
            self._of_task[k] = state
        if len(counts) == 1 and before not in self._of_task:
            # Nobody else needs it: go on with it instead of a copy.
            before.group = group
            self._of_task = [before if one is state else one for one in self._of_task]
            return before
        for parameter, options in self._shared():
            entries = [(self._entry(one, parameter), count) for one, count in counts.items()]
            if known := [(entry, count) for entry, count in entries if entry]:
                state.entries[parameter] = mean_entry(known, options.get("betas"))
        return state

    def _entry(self, state: _State, parameter: Tensor) -> Entry | None:
        entries = self.optimizer.state if state is self._current else state.entries
        return entries.get(parameter)

    def _exchange(self, state: _State) -> None:
        """Exchange the entries in the optimizer for those of another state, without copies."""
        inside, outside = self.optimizer.state, self._current.entries
        for parameter, _ in self._shared():
            before, after = inside.get(parameter), state.entries.pop(parameter, None)
            if after is not None:
                inside[parameter] = after
            elif before is not None:
                del inside[parameter]
            if before is not None:
                outside[parameter] = before
        self._current = state


class StatesOfOptimizers:
    """The group states of all attached optimizers, which are a part of the state of TaskGroups.

    A copy is attached to no optimizer, and has none.
    """

    KEY = "optimizers"  # under which they are saved

    def __init__(self) -> None:
        self._attached: list[GroupStates] = []
        self._pending: list[Mapping[str, Any]] = []  # loaded before the optimizer is attached

    def __getstate__(self) -> dict[str, Any]:
        return {"_attached": [], "_pending": []}

    def add(self, states: Sequence[GroupStates]) -> None:
        """Take in the states of further optimizers, and load what was loaded ahead of them.

        Raise if an optimizer is not supported.
        """
        attached = [one.optimizer for one in self._attached]
        for one in states:
            if any(one.optimizer is other for other in attached):
                raise ValueError(
                    f"The {type(one.optimizer).__name__} is attached with shared_state='group' "
                    "already: call remove() of what attach() returned first."
                )
            attached.append(one.optimizer)
            one.check_attachable()
        for load in [one.read(saved) for one, saved in zip(states, self._pending, strict=False)]:
            load()
        del self._pending[: len(states)]
        self._attached += states

    def remove(self, states: Sequence[GroupStates]) -> None:
        """Forget the states of these optimizers."""
        self._attached = [one for one in self._attached if one not in states]

    def saved_with(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of TaskGroups together with these states, if there are any."""
        own = [*(one.state_dict() for one in self._attached), *self._pending]
        return {**state, self.KEY: own} if own else {**state}

    def prepare(self, saved: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
        """Read what :meth:`saved_with` saved; call the result to load it.

        States of optimizers that are not attached yet wait for them.
        """
        if 0 < len(saved) < len(self._attached):
            raise ValueError(
                f"The state holds optimizer states of groups for {len(saved)} optimizers, and "
                f"{len(self._attached)} are attached with shared_state='group': attach the same "
                "ones, in the same order, as when it was saved."
            )
        loads = [one.read(state) for one, state in zip(self._attached, saved, strict=False)]
        if not saved:  # by a loop with shared_state="all"
            loads = [one.forget for one in self._attached]

        def load() -> None:
            self._pending = list(saved[len(self._attached) :])
            for one in loads:
                one()

        return load

    def check_attached(self) -> None:
        """Raise if states of optimizers that are not attached were loaded."""
        if self._pending:
            raise RuntimeError(
                "The state that was loaded holds optimizer states of groups for "
                f"{len(self._attached) + len(self._pending)} optimizers, and "
                f"{len(self._attached)} are attached: call groups.attach(optimizer, ..., "
                f"shared_state='group'), or del state[{self.KEY!r}] before you load it."
            )

    def groups(self) -> list[list[Members]]:
        """For each optimizer and each task, the group that the task last stepped with."""
        return [one.groups() for one in self._attached]


def _parameters(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """All parameters, in the order of the optimizer's state_dict, each with its options."""
    return ((p, group) for group in optimizer.param_groups for p in group["params"])


def _placed(entry: Entry, parameter: Tensor, options: Mapping[str, Any]) -> Entry:
    """A copy of a saved entry, as the optimizer's load_state_dict would place it."""
    placed = {}
    for name, value in entry.items():
        if not isinstance(value, Tensor):
            placed[name] = value
        elif name == "step":
            on_device = options.get("capturable") or options.get("fused")
            where = parameter.device if on_device else value.device
            placed[name] = value.to(where, torch.float32 if on_device else value.dtype, copy=True)
        elif value.shape != parameter.shape:
            raise ValueError
        else:
            dtype = parameter.dtype if parameter.is_floating_point() else value.dtype
            placed[name] = value.to(parameter.device, dtype, copy=True)
    return placed
