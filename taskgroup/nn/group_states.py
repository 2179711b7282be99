"""Keeps an optimizer's state of the shared parameters apart for every task group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from taskgroup._arguments import listed
from taskgroup.ops._sharded import is_sharded

__all__ = ["GroupStates", "Members", "StatesOfOptimizers"]

Members = tuple[int, ...]  # positions of tasks, ascending
_Entry = dict[str, Any]  # what an optimizer keeps for one parameter

# What an optimizer may keep for a parameter: running means, and a number of steps. Of an average
# with a bias correction, the place of its beta in "betas".
_BETAS = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
_KNOWN = {*_BETAS, "momentum_buffer", "step"}
_KEY = "optimizers"  # of the states in that of the TaskGroups


class _State:
    """The state of one group, without the parameters that have none yet.

    The entries of the group that stepped last are in the optimizer, and missing here.
    """

    def __init__(self, group: Members) -> None:
        self.group = group
        self.entries: dict[Tensor, _Entry] = {}


class GroupStates:
    """The state of the shared parameters in one optimizer, for every task group.

    Each task refers to the state of the group that it last stepped with. A new group starts from
    the mean of the states of its tasks, and a state without a task is freed. So there are at most
    as many states as tasks, and as many as groups once all groups of a partition have stepped.

    Before the first step all tasks refer to the state that the optimizer has, if any.

    Args:
        optimizer: takes the steps. In ``optimizer.state`` is the state of the group that stepped
            last.
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
        self._checked = False  # the names in the state are known

    def use(self, group: Members) -> None:
        """Put the state of a group into the optimizer, in exchange for the one that is there."""
        state = self._of_task[group[0]]
        if state.group != group or any(self._of_task[k] is not state for k in group):
            state = self._begin(group)
        if state is not self._current:
            self._exchange(state)

    def check(self) -> None:
        """Raise if the optimizer has another state than this class can average."""
        if self._checked:
            return
        name = type(self.optimizer).__name__
        stepped = False
        for parameter, _ in self._shared():
            entry = self.optimizer.state.get(parameter, {})
            if unknown := sorted(set(entry) - _KNOWN):
                raise ValueError(
                    f"{name} keeps {listed(unknown)} for a parameter, which attach() with "
                    "shared_state='group' cannot average over tasks; it knows the state of Adam, "
                    "AdamW and SGD. Take one of these, or leave shared_state='all'."
                )
            self._checked = self._checked or bool(entry)
            stepped = stepped or parameter.grad is not None
        if stepped and not self._checked and not isinstance(self.optimizer, SGD):
            raise ValueError(
                f"{name} has stepped and left nothing in its .state, so attach() with "
                "shared_state='group' cannot keep its state apart for every group; take Adam, "
                "AdamW or SGD, or leave shared_state='all'."
            )

    def state_dict(self) -> dict[str, Any]:
        """The states, with the optimizer's own tensors, except for the one in the optimizer."""
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
        """Read what :meth:`state_dict` returned; the result loads it.

        Tensors are copied to where the optimizer keeps its state.
        """
        parameters = list(_parameters(self.optimizer))
        states = [_State(tuple(group)) for group in saved["groups"]]
        of_task = [states[i] for i in saved["of_task"]]
        fits = len(of_task) == len(self._of_task) and len(saved["states"]) == len(states)
        for state, entries in zip(states, saved["states"], strict=False):
            for i, entry in entries.items():
                fits = fits and i < len(parameters) and _fits(entry, parameters[i][0])
                if fits:
                    parameter, options = parameters[i]
                    state.entries[parameter] = {
                        name: _placed(name, value, parameter, options)
                        for name, value in entry.items()
                    }
        if not fits:
            raise ValueError(
                "The state holds the optimizer state of the groups for other parameters than those "
                f"of the {type(self.optimizer).__name__}: attach the same optimizers, of the same "
                "model and in the same order, as when it was saved."
            )

        def load() -> None:
            self._of_task, self._current = of_task, states[saved["current"]]

        return load

    def forget(self) -> None:
        """Forget all states; every group starts from that in the optimizer."""
        self._current = _State(())
        self._of_task = [self._current] * len(self._of_task)

    def groups(self) -> list[list[int]]:
        """For each task, the group whose state it refers to."""
        return [list(state.group) for state in self._of_task]

    def _shared(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The shared parameters, each with the options of its parameter group."""
        heads = self._heads()
        return (pair for pair in _parameters(self.optimizer) if id(pair[0]) not in heads)

    def _entry(self, state: _State, parameter: Tensor) -> _Entry | None:
        where = self.optimizer.state if state is self._current else state.entries
        return where.get(parameter)

    @torch.no_grad()
    def _begin(self, group: Members) -> _State:
        """The state of a new group: the mean over its tasks."""
        before = [self._of_task[k] for k in group]
        state = _State(group)
        for k in group:
            self._of_task[k] = state
        first = before[0]
        if all(one is first for one in before) and first not in self._of_task:
            # The tasks left a larger group, whose others have left it too.
            for k in group:
                self._of_task[k] = first
            first.group = group
            return first
        for parameter, options in self._shared():
            entries = [self._entry(one, parameter) for one in before]
            if known := [entry for entry in entries if entry]:
                state.entries[parameter] = _mean(known, options.get("betas"))
        return state

    def _exchange(self, state: _State) -> None:
        """Exchange the entries in the optimizer for those of another state, without a copy."""
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
    """The group states of all attached optimizers, as a part of what TaskGroups saves.

    A copy has none, since it is attached to no optimizer.
    """

    def __init__(self) -> None:
        self._attached: list[GroupStates] = []
        self._pending: list[Mapping[str, Any]] = []  # loaded, and not attached yet

    def __getstate__(self) -> dict[str, Any]:
        return {"_attached": [], "_pending": []}

    def add(self, states: Sequence[GroupStates]) -> None:
        """Save these states from now on; they take over what was loaded before.

        Raise if an optimizer cannot keep a state for every group.
        """
        for one in states:
            _check_attached(one.optimizer, [*self._attached, *states])
            one.check()
        loads = [one.read(saved) for one, saved in zip(states, self._pending, strict=False)]
        del self._pending[: len(states)]
        for load in loads:
            load()
        self._attached += states

    def remove(self, states: Sequence[GroupStates]) -> None:
        """Forget these states."""
        self._attached = [one for one in self._attached if one not in states]

    def saved_in(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the TaskGroups with those of the optimizers, if there are any."""
        own = [*(one.state_dict() for one in self._attached), *self._pending]
        return {**state, _KEY: own} if own else {**state}

    def parted(self, state: Any) -> tuple[Any, list[Mapping[str, Any]]]:
        """The state of the TaskGroups alone, and those of the optimizers."""
        if not isinstance(state, Mapping):
            return state, []
        return {name: value for name, value in state.items() if name != _KEY}, state.get(_KEY, [])

    def prepare(self, saved: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
        """Read the states of all optimizers; the result loads them.

        Those of optimizers that are not attached yet wait for them.
        """
        loads = [one.read(state) for one, state in zip(self._attached, saved, strict=False)]
        if not saved:  # it was saved with shared_state="all"
            loads = [one.forget for one in self._attached]

        def load() -> None:
            self._pending = list(saved[len(self._attached) :])
            for one in loads:
                one()

        return load

    def check_all_attached(self) -> None:
        """Raise if states were loaded, and not all optimizers are attached again."""
        if self._pending:
            raise RuntimeError(
                f"The state that was loaded holds the optimizer state of the groups for "
                f"{len(self._attached) + len(self._pending)} optimizers, of which "
                f"{len(self._attached)} are attached: call groups.attach(optimizer, ..., "
                "shared_state='group') for all of them, or go on without by leaving out "
                f"{_KEY!r} of the state."
            )

    def groups(self) -> list[list[list[int]]]:
        """For each optimizer and task, the group whose state it refers to."""
        return [one.groups() for one in self._attached]


def _check_attached(optimizer: Optimizer, states: Sequence[GroupStates]) -> None:
    """Raise if an optimizer is attached twice, or holds parameters that are sharded over ranks."""
    name = type(optimizer).__name__
    if sum(one.optimizer is optimizer for one in states) > 1:
        raise ValueError(
            f"The optimizer {name} is attached with shared_state='group' already: call remove() of "
            "what attach() returned before you attach it again."
        )
    for parameter, _ in _parameters(optimizer):
        if is_sharded(parameter):
            raise ValueError(
                f"attach() with shared_state='group' does not support sharded parameters (FSDP2, "
                f"DTensor), and {name} holds one of shape {list(parameter.shape)}: leave "
                "shared_state='all', or train with DistributedDataParallel."
            )


def _parameters(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """All parameters, in the order of the optimizer's state_dict, each with its options."""
    return ((p, group) for group in optimizer.param_groups for p in group["params"])


def _mean(entries: list[_Entry], betas: Sequence[Any] | None) -> _Entry:
    """The mean of what several tasks have for a parameter; a copy."""
    counts: dict[int, int] = {}
    for entry in entries:
        counts[id(entry)] = counts.get(id(entry), 0) + 1
    distinct = {id(entry): entry for entry in entries}
    if len(distinct) == 1:
        return {name: _copy(value) for name, value in entries[0].items()}
    # Adam's moments after t steps from zero are 1 - beta^t times an estimate without bias. The
    # estimates are averaged. The mean is given the mean number of steps, and is multiplied by
    # 1 - beta^t for it, which Adam will divide it by. With equal numbers, as after whole rounds,
    # that is the plain mean of the moments. Averages of other numbers with the mean number alone
    # would be too small. States before their first step (GradScaler may skip it) have no estimate.
    steps = {i: _number(entry["step"]) for i, entry in distinct.items() if "step" in entry}
    weights: dict[int, Any] = {
        i: n * (steps[i] > 0) if i in steps else n for i, n in counts.items()
    }
    mean: _Entry = {}
    step: Any = None
    if steps:
        total = _at_least_one(sum(weights[i] for i in steps))
        step = sum(weights[i] * steps[i] for i in steps) / total
        of = next(entry["step"] for entry in distinct.values() if "step" in entry)
        mean["step"] = _like(step, of)
    for name in dict.fromkeys(name for entry in distinct.values() for name in entry):
        parts = {i: e[name] for i, e in distinct.items() if isinstance(e.get(name), Tensor)}
        if name == "step" or not parts:
            continue
        total = _at_least_one(sum(weights[i] for i in parts))
        value: Any = None
        for i, part in parts.items():
            weight = weights[i] / total
            if betas is not None and name in _BETAS and i in steps:
                beta = betas[_BETAS[name]]
                weight = weight * (1 - beta**step) / _or_one(1 - beta ** steps[i])
            value = part * weight if value is None else value.add_(part * weight)
        mean[name] = value
    return mean


def _fits(entry: Mapping[str, Any], parameter: Tensor) -> bool:
    return all(
        name == "step" or not isinstance(value, Tensor) or value.shape == parameter.shape
        for name, value in entry.items()
    )


def _number(step: Any) -> Any:
    """The number of steps: a float, or a tensor on a GPU, which must not be waited for."""
    return step.item() if isinstance(step, Tensor) and step.device.type == "cpu" else step


def _at_least_one(total: Any) -> Any:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def _or_one(bias: Any) -> Any:
    """The bias, or 1 instead of 0."""
    return bias + (bias == 0)


def _like(step: Any, of: Any) -> Any:
    if isinstance(of, Tensor):
        return step.to(of) if isinstance(step, Tensor) else torch.full_like(of, step)
    return type(of)(round(step))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _placed(name: str, value: Any, parameter: Tensor, options: Mapping[str, Any]) -> Any:
    """A copy of a saved value, with the device and dtype that torch's load_state_dict gives it."""
    if not isinstance(value, Tensor):
        return value
    if name != "step":
        dtype = parameter.dtype if parameter.is_floating_point() else value.dtype
        return value.to(parameter.device, dtype, copy=True)
    if options.get("capturable") or options.get("fused"):
        return value.to(parameter.device, torch.float32, copy=True)
    return value.clone()
