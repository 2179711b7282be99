"""What a step does to the heads of the tasks outside the group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from taskgroup._undone import steps_are_undone
from taskgroup.nn.group_states import GroupStates, Members, StatesOfOptimizers
from taskgroup.nn.shared_rows import SharedRows, zero_gradient
from taskgroup.nn.task_parameters import Heads, parameters_of_tasks

__all__ = ["Attachment", "Heads", "NextStep", "Outside", "SharedState", "unwrapped"]

Outside = Literal["hold", "coast"]
SharedState = Literal["all", "group"]


class NextStep(NamedTuple):
    """The step that is about to be taken.

    Attributes:
        members: the tasks that it is taken on.
        group: the group of the partition that they belong to.
        heads: the heads of the model that ran for it.
    """

    members: frozenset[int]
    group: Members
    heads: Heads | None


class Attachment:
    """Prepares the steps of optimizers; :meth:`taskgroup.TaskGroups.attach` returns one."""

    # stepping(number) returns the step that is about to be taken, None if it is not that of a
    # group, and its number. The argument is the number that the last call returned, or 0.

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        tasks: tuple[str, ...],
        heads: Heads | None,
        outside: Outside,
        stepping: Callable[[int], tuple[NextStep | None, int]],
        saved: StatesOfOptimizers | None = None,
        learned: Heads | None = None,
    ) -> None:
        # learned are the parameters of each task that belong to no head, such as weights of losses.
        self.tasks = tasks
        self.outside = outside
        self.stepping = stepping
        self.removed = False
        self._given = heads is not None
        self._learned = learned
        self._heads: Heads | None = None
        self.optimizers = list(optimizers)
        self.whole: list[tuple[Tensor, int]] = []
        self.shared: list[SharedRows] = []
        self._of_heads: frozenset[int] = frozenset()
        if heads is not None:
            self._settle_on(heads)
        # With ``saved``, every group has a state of its own, which is saved there.
        self._saved = saved
        self._states: list[GroupStates] = []
        if saved is not None:
            self._states = [
                GroupStates(one, len(tasks), lambda: self._of_heads) for one in optimizers
            ]
            saved.add(self._states)
        of = {id(one.optimizer): one for one in self._states}
        self._steps = [_Steps(self, one, of.get(id(one))) for one in optimizers]

    def remove(self) -> None:
        """Detach from the optimizers: their next steps are not prepared."""
        self.removed = True
        for steps in self._steps:
            steps.remove()
        if self._saved is not None:
            self._saved.remove(self._states)

    def look_at(self, heads: Heads | None) -> None:
        """Use the heads of the model that ran, unless the user has named the heads."""
        if not self._given and heads is not None and heads is not self._heads:
            self._settle_on(heads)
        if self._heads is None:
            raise RuntimeError(
                "attach() does not know the heads: call the MultiTaskModel with group=group, "
                "or write groups.attach(optimizer, {task: head, ...})."
            )

    def _settle_on(self, heads: Heads) -> None:
        self.whole, self.shared = parameters_of_tasks(
            heads, self.tasks, self.optimizers, self._given
        )
        if self._learned is not None:
            whole, shared = parameters_of_tasks(self._learned, self.tasks, self.optimizers, False)
            self.whole += whole
            self.shared += shared
        self._heads = heads
        rows = (one.parameter for one in self.shared)
        self._of_heads |= {id(parameter) for parameter, _ in self.whole} | {id(p) for p in rows}


class _Steps:
    """Prepares the steps of one optimizer, and cleans up after them."""

    def __init__(
        self, attachment: Attachment, optimizer: Optimizer, states: GroupStates | None
    ) -> None:
        self._attachment = attachment
        self._optimizer = optimizer
        self._states = states
        self._number = 0  # of the step that was prepared last
        # What the current step must not see: gradients by parameter, and rows.
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._left_out: list[SharedRows] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._finish),
        )

    def remove(self) -> None:
        self._after_step()  # in case the last step raised an error
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._after_step()  # in case the last step raised an error
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare()
            return None

        # The closure computes the gradients, and some optimizers call it several times.
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
        step, self._number = attachment.stepping(self._number)
        if step is None:
            return
        inside = step.members
        attachment.look_at(step.heads)
        if self._states is not None and not steps_are_undone():
            _eager(self._states.use)(step.group)
        hold = attachment.outside == "hold"
        others = self._of_other_optimizers()
        for parameter, task in attachment.whole:
            if task in inside or id(parameter) in others:
                continue
            if not hold:
                zero_gradient(parameter, self._optimizer)
            elif parameter.grad is not None:
                self._set_aside.append((parameter, parameter.grad))
                parameter.grad = None
        for rows in attachment.shared:
            if id(rows.parameter) in others:
                continue
            if rows.leave_out(inside, self._optimizer, hold):
                self._left_out.append(rows)

    def _of_other_optimizers(self) -> set[int]:
        """The ids of the parameters of the other optimizers."""
        return {
            id(parameter)
            for optimizer in self._attachment.optimizers
            if optimizer is not self._optimizer
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def _after_step(self) -> None:
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient  # the same tensor as before the step
        self._set_aside.clear()
        left_out, self._left_out = self._left_out, []
        for rows in left_out:
            rows.restore(self._optimizer)

    def _finish(self, *_: object) -> None:
        self._after_step()
        if self._states is not None:
            _eager(self._states.check)()


def _eager(function: Callable[..., None]) -> Callable[..., None]:
    """The function, not compiled if the step is: the compiler mistakes one state for another."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def unwrapped(optimizer: object) -> list[Optimizer]:
    """The optimizers that take the steps, in an optimizer, a trainer's wrapper or a list of these.

    Raise for an optimizer that cannot leave single heads out of a step.
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
