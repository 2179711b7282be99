"""What a step does to the heads of the tasks outside the group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from taskgroup._arguments import listed
from taskgroup.ops._sharded import is_sharded

__all__ = ["Attachment", "Heads", "Outside", "unwrapped"]

Heads = Mapping[str, nn.Module | Tensor | Iterable[Tensor]] | nn.ModuleDict
Outside = Literal["hold", "coast"]


class Attachment:
    """Prepares the steps of optimizers; what :meth:`taskgroup.TaskGroups.attach` returns."""

    # stepping(number) gives the members of the group whose step is about to be taken and the heads
    # of the model that ran for it, both None where no step of a group is. Its argument is the
    # number that it gave at the last step, 0 at first; it gives the present one as well.

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        tasks: tuple[str, ...],
        heads: Heads | None,
        outside: Outside,
        stepping: Callable[[int], tuple[frozenset[int] | None, Heads | None, int]],
    ) -> None:
        self.tasks = tasks
        self.outside = outside
        self.stepping = stepping
        self._given = heads is not None
        self._heads: Heads | None = None
        self.optimizers = list(optimizers)
        self.whole: list[tuple[Tensor, int]] = []
        self.shared: list[_SharedRows] = []
        if heads is not None:
            self._settle_on(heads)
        self._steps = [_Steps(self, optimizer) for optimizer in optimizers]

    def remove(self) -> None:
        """Prepare no further steps."""
        for steps in self._steps:
            steps.remove()

    def look_at(self, heads: Heads | None) -> None:
        """Take the heads of the model that ran, where none were given.

        Raises:
            RuntimeError: if there are none.
        """
        if not self._given and heads is not None and heads is not self._heads:
            self._settle_on(heads)
        if self._heads is None:
            raise RuntimeError(
                "attach() does not know the heads: call the MultiTaskModel with group=group, "
                "or write groups.attach(optimizer, {task: head, ...})."
            )

    def _settle_on(self, heads: Heads) -> None:
        self.whole, self.shared = _parts(heads, self.tasks, self.optimizers, self._given)
        self._heads = heads


class _Steps:
    """Those of one optimizer."""

    def __init__(self, attachment: Attachment, optimizer: Optimizer) -> None:
        self._attachment = attachment
        self._optimizer = optimizer
        self._number = 0  # of the step that was prepared last
        # What is kept out of the step that is being taken.
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._left_out: list[_SharedRows] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        self._after_step()  # of a step that raised
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._after_step()  # of a step that raised
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare()
            return None

        # The closure makes the gradients, and some optimizers call it several times.
        def prepared() -> Any:
            self._after_step()
            loss = closure()
            self._prepare()
            return loss

        if len(args) > 1:
            return (args[0], prepared, *args[2:]), kwargs
        return args, {**kwargs, "closure": prepared}

    @torch.no_grad()
    def _prepare(self) -> None:
        attachment = self._attachment
        inside, heads, self._number = attachment.stepping(self._number)
        if inside is None:
            return
        attachment.look_at(heads)
        hold = attachment.outside == "hold"
        others = self._of_other_optimizers()
        for parameter, task in attachment.whole:
            if task in inside or id(parameter) in others:
                continue
            if not hold:
                _zero_gradient(parameter)
            elif parameter.grad is not None:
                self._set_aside.append((parameter, parameter.grad))
                parameter.grad = None
        for rows in attachment.shared:
            if id(rows.parameter) in others:
                continue
            if rows.leave_out(inside, self._optimizer, hold):
                self._left_out.append(rows)

    def _of_other_optimizers(self) -> set[int]:
        """The ids of the parameters that are named for other optimizers."""
        return {
            id(parameter)
            for optimizer in self._attachment.optimizers
            if optimizer is not self._optimizer
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient  # the very tensor that was there
        self._set_aside.clear()
        left_out, self._left_out = self._left_out, []
        for rows in left_out:
            rows.restore(self._optimizer)


class _SharedRows:
    """A parameter whose elements belong to several tasks, such as one linear layer for all heads.

    No optimizer can hold a part of a parameter, so what belongs to the tasks outside the group is
    zero during the step, values and gradients alike, and is put back after it, together with the
    optimizer's state. That holds where the state is as large as the parameter and element k of a
    step depends on element k alone, as with SGD, Adam and most others.

    Args:
        parameter: in the optimizer.
        owner: int64 of the parameter's shape, the position of the task that each element belongs
            to; -1 where it belongs to none.
        n_tasks: K.
    """

    def __init__(self, parameter: Tensor, owner: Tensor, n_tasks: int) -> None:
        self.parameter = parameter
        self._owner = owner
        self._n_tasks = n_tasks
        self._kept: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    def leave_out(self, inside: frozenset[int], optimizer: Optimizer, hold: bool) -> bool:
        """Keep what is not ``inside`` out of the step; True where it must be restored after."""
        parameter = self.parameter
        if not parameter.requires_grad:
            return False
        if parameter.grad is None:
            if not hold:
                _zero_gradient(parameter)
            return False
        if parameter.grad.is_sparse:
            raise RuntimeError(
                f"The parameter of shape {list(parameter.shape)}, whose rows belong to several "
                "tasks, has a sparse gradient: make the layer with sparse=False."
            )
        self._owner = self._owner.to(parameter.device, non_blocking=True)
        moves = torch.zeros(self._n_tasks + 1, dtype=torch.bool, device="cpu")
        moves[[*inside, -1]] = True  # and what belongs to no task
        outside = ~moves.to(parameter.device, non_blocking=True)[self._owner]
        parameter.grad.masked_fill_(outside, 0)
        if not hold:
            return False
        state = {
            name: value.clone()
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        self._kept = outside, parameter.detach().clone(), state
        parameter.masked_fill_(outside, 0)  # or weight decay would move a new momentum
        return True

    def restore(self, optimizer: Optimizer) -> None:
        """Put back what :meth:`leave_out` has kept."""
        assert self._kept is not None
        (outside, values, state), self._kept = self._kept, None
        parameter = self.parameter
        parameter.copy_(torch.where(outside, values, parameter))
        for name, value in optimizer.state.get(parameter, {}).items():
            if name in state:
                value.copy_(torch.where(outside, state[name], value))
            elif isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise RuntimeError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {list(value.shape)} for "
                    f"the parameter of shape {list(parameter.shape)}, whose rows belong to several "
                    "tasks, so the rows cannot be held apart: give every task a head of its own, "
                    "or take an optimizer that works element by element, such as Adam or SGD."
                )


def _check_heads(heads: object, tasks: tuple[str, ...]) -> None:
    """Raise unless ``heads`` is a mapping that names every task once.

    Raises:
        TypeError: if it is no mapping.
        ValueError: if a task is missing or unknown.
    """
    if not isinstance(heads, Mapping | nn.ModuleDict):
        raise TypeError(
            "heads takes {task: module or parameters}, with tasks named by strings, got a "
            f"{type(heads).__name__}; write dict(zip(groups.tasks, heads)) if they stand in task "
            "order."
        )
    if differing := sorted(set(heads) ^ set(tasks), key=repr):
        raise ValueError(
            f"heads must name every task once and no other; {listed(differing)} are "
            "missing or unknown. A task without parameters of its own takes an empty list."
        )


def unwrapped(optimizer: object) -> list[Optimizer]:
    """The optimizers that take the steps, from within what a trainer has wrapped around them.

    Raises:
        TypeError: if there is none in it.
        ValueError: if it is one that heads cannot be held apart under.
    """
    if isinstance(optimizer, list | tuple) and optimizer:
        return [one for wrapped in optimizer for one in unwrapped(wrapped)]
    found = optimizer
    while True:
        # Accelerate and Lightning call it "optimizer", SAM's implementations "base_optimizer".
        inner = (getattr(found, name, None) for name in ("optimizer", "base_optimizer"))
        following = next((one for one in inner if isinstance(one, Optimizer)), None)
        if following is None or following is found:
            break
        found = following
    if not isinstance(found, Optimizer):
        raise TypeError(
            "attach() takes a torch.optim.Optimizer, a wrapper whose .optimizer is one, or a list "
            f"of these, got a {type(found).__name__}; pass the optimizer that takes the steps."
        )
    if isinstance(found, LBFGS):
        raise ValueError(
            "attach() cannot hold heads under LBFGS, which moves all of its parameters along one "
            "direction that remembers the steps of other groups: take another optimizer for the "
            "heads, and LBFGS for the encoder at most."
        )
    return [found]


def _parts(
    heads: Heads, tasks: tuple[str, ...], optimizers: Sequence[Optimizer], given: bool
) -> tuple[list[tuple[Tensor, int]], list[_SharedRows]]:
    """The parameters that belong to one task, with its position, and those of several.

    Args:
        heads: parameters, or rows of some, by task.
        tasks: the K task names.
        optimizers: that hold them.
        given: whether the user has named the heads for these. Otherwise the model has, and other
            optimizers may hold some.
    """
    _check_heads(heads, tasks)
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    # By the id of a parameter, which of its elements belong to which task; None is all of them.
    claims: dict[int, tuple[Tensor, str, dict[int, Tensor | None]]] = {}
    for k, task in enumerate(tasks):
        for name, tensor in _named(heads[task], task):
            parameter = tensor if tensor._base is None else tensor._base
            if not parameter.is_leaf:
                raise ValueError(
                    f"The head of task {task!r} has {name} of shape {list(tensor.shape)}, which is "
                    "computed from others: name a parameter, or rows of one by an index, such as "
                    "head.weight[0]."
                )
            if id(parameter) not in held:
                frozen = isinstance(parameter, nn.Parameter) and not parameter.requires_grad
                if frozen or not given:
                    continue
                raise ValueError(
                    f"The head of task {task!r} has {name} of shape {list(parameter.shape)}, which "
                    "is not in the optimizer, so attach() cannot hold it: add it to the optimizer "
                    "first, or name all optimizers, groups.attach([one, other], heads)."
                )
            own = claims.setdefault(id(parameter), (parameter, name, {}))[2]
            if parameter is tensor:
                own[k] = None
            elif own.get(k, tensor) is not None:
                found = _elements(tensor, parameter)
                before = own.get(k)
                own[k] = found if before is None else torch.cat([before, found])
    if not given and not claims:
        raise ValueError(
            "The optimizer that attach() was given holds none of the heads of the MultiTaskModel: "
            "pass the one that holds them."
        )
    whole: list[tuple[Tensor, int]] = []
    shared: list[_SharedRows] = []
    for parameter, name, own in claims.values():
        if len(own) == 1 and None in own.values():
            whole.append((parameter, next(iter(own))))
            continue
        shared.append(_SharedRows(parameter, _owner(parameter, name, own, tasks), len(tasks)))
    return whole, shared


def _owner(
    parameter: Tensor, name: str, own: dict[int, Tensor | None], tasks: tuple[str, ...]
) -> Tensor:
    """The position of the task that each element belongs to; -1 where it belongs to none.

    Raises:
        ValueError: if one belongs to two tasks.
    """
    owner = torch.full((parameter.numel(),), -1, dtype=torch.int64, device="cpu")
    for k, elements in own.items():
        at = slice(None) if elements is None else elements
        if len(taken := owner[at][owner[at] >= 0]):
            raise ValueError(
                f"The tasks {tasks[int(taken[0])]!r} and {tasks[k]!r} share {name} of shape "
                f"{list(parameter.shape)}, so a step on one would move the head of the other. "
                "Where its rows or elements belong to one task each, name these, {task: "
                "[head.weight[k], head.bias[k]], ...}; otherwise leave it out, as a part of the "
                "encoder."
            )
        owner[at] = k
    if is_sharded(parameter):
        raise ValueError(
            f"{name} of shape {list(parameter.shape)} is sharded, so its rows cannot be told "
            "apart: give every task a head of its own."
        )
    return owner.view(parameter.shape)


def _elements(rows: Tensor, parameter: Tensor) -> Tensor:
    """The positions of the rows among the elements of the parameter, of which they are a view."""
    ends = zip(parameter.shape, parameter.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in ends)
    # By the place in memory, the position of the element that lies there.
    position = torch.zeros(extent, dtype=torch.int64, device="cpu")
    everything = torch.arange(parameter.numel(), dtype=torch.int64, device="cpu")
    position.as_strided(parameter.shape, parameter.stride()).copy_(everything.view(parameter.shape))
    offset = int(rows.storage_offset()) - int(parameter.storage_offset())
    return position.as_strided(rows.shape, rows.stride(), offset).flatten()


def _named(head: nn.Module | Tensor | Iterable[Tensor], task: str) -> list[tuple[str, Tensor]]:
    """The parameters of a head, with what to call them in messages."""
    if isinstance(head, nn.Module):
        return [(f"the parameter {name!r}", own) for name, own in head.named_parameters()]
    if isinstance(head, Tensor):
        return [("a parameter", head)]
    if not isinstance(head, Iterable) or isinstance(head, str):
        raise ValueError(
            f"The head of task {task!r} must be a module or parameters, got a "
            f"{type(head).__name__}."
        )
    found = []
    for parameter in head:
        if not isinstance(parameter, Tensor):
            raise ValueError(
                f"The head of task {task!r} must be a module or parameters, got "
                f"{type(parameter).__name__} in it."
            )
        found.append(("a parameter", parameter))
    return found


def _zero_gradient(parameter: Tensor) -> None:
    """A gradient of zero, in the tensor that is there if one is."""
    if parameter.grad is not None:
        if parameter.grad.grad_fn is not None:
            parameter.grad.detach_()  # as zero_grad() does; refused for DDP's views of its buckets
        parameter.grad.requires_grad_(False).zero_()
    elif parameter.requires_grad:
        parameter.grad = torch.zeros_like(parameter)
