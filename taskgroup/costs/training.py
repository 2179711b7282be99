"""A model, its losses and its optimizers, which take the steps that are measured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from taskgroup._arguments import listed
from taskgroup._losses import (
    Losses,
    check_graph,
    check_losses,
    check_one_device,
    losses_by_task,
)
from taskgroup.affinity.proximal import ProximalAffinity
from taskgroup.loop.batch import Batch
from taskgroup.loop.checks import checked_tasks
from taskgroup.loop.group import Group
from taskgroup.loop.loss_reader import LossReader
from taskgroup.loop.misuse import Misuse
from taskgroup.loop.observer import Observer
from taskgroup.loop.ranks import Ranks
from taskgroup.loop.rounds import Members, Plan
from taskgroup.nn.heads import TaskHeads, detached
from taskgroup.nn.model import MultiTaskModel
from taskgroup.ops._sharded import is_sharded

__all__ = ["Training"]

_RETURNED = "The losses that losses(outputs) returns"


class Training:
    """A model and its losses, which take steps on groups of tasks."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        losses: Callable[[Any], Losses],
        optimizer: Optimizer | Sequence[Optimizer] | None,
    ) -> None:
        self.model = _checked(model)
        self._in_ddp = isinstance(model, DistributedDataParallel)
        self.inner: nn.Module = getattr(self.model, "_orig_mod", self.model)  # if it is compiled
        if not callable(losses):
            raise TypeError(
                "losses takes a function from the outputs of the model to the losses, "
                f"lambda outputs: criterion(outputs, labels); got {type(losses).__name__}."
            )
        self._arguments, self._named = _arguments(inputs)
        self._losses = losses
        self.optimizers = _optimizers(optimizer)
        held = [p for own in self.optimizers for group in own.param_groups for p in group["params"]]
        own = list(self.inner.parameters())
        if self.optimizers and not {id(p) for p in own} & {id(p) for p in held}:
            raise ValueError(
                "The optimizer holds no parameter of the model: pass the one that trains it, or "
                "leave it out."
            )
        self.parameters = list({id(p): p for p in (*own, *held)}.values())
        whole = self.model is self.inner  # the graphs of a compiled model serve all groups
        self.takes_group = whole and (
            isinstance(self.inner, MultiTaskModel)
            or "group" in inspect.signature(self.inner.forward).parameters
        )
        self.tasks: tuple[str, ...] = ()  # known from the first losses
        self._affinity = ProximalAffinity()

    def start(self) -> None:
        """Run the model once, which names the tasks, and check that it can be measured."""
        outputs = self.run(self.model, None)
        losses = self.losses_of(outputs)
        check_losses(losses, None, what=_RETURNED)
        if not isinstance(losses, Tensor):
            self.tasks = checked_tasks(list(losses))
        elif isinstance(outputs, Mapping) and len(outputs) == len(losses):
            self.tasks = checked_tasks(list(outputs))
        else:
            raise ValueError(
                f"{_RETURNED} are a tensor of {len(losses)}, and the outputs do not name as many "
                "tasks: return {task: scalar}."
            )
        if len(self.tasks) == 1:
            raise ValueError(
                f"There is one task, {self.tasks[0]!r}, and so nothing to group: return the losses "
                "of two tasks or more."
            )
        by_task = losses_by_task(losses, self.tasks)
        check_one_device(by_task)
        check_graph(by_task, "no step can be taken on it")
        for task, loss in by_task.items():
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"The loss of task {task!r} is {loss.item():g}: pass inputs and labels of a "
                    "batch with finite losses, such as one without missing labels."
                )
        self._reader = LossReader(self.tasks, None, "sum")
        self._affinity.start(self.tasks)

    def run(self, model: nn.Module, group: Group | None) -> Any:
        """The outputs of the model."""
        torch.clear_autocast_cache()  # which holds copies of the weights, with their graphs
        named = {**self._named, "group": group} if self.takes_group else self._named
        return model(*self._arguments, **named)

    def joint_step(self) -> None:
        """Take a step on all tasks."""
        losses = self.losses_of(self.run(self.model, None))
        check_losses(losses, self.tasks, what=_RETURNED)
        if not isinstance(losses, Tensor):
            losses = torch.stack([losses[task] for task in self.tasks])
        self._step_on(losses.sum())

    def batch(self, partition: Sequence[Members], *, observes: bool) -> None:
        """Take a step on each of some groups, as a loop over :class:`taskgroup.TaskGroups` does.

        These ask the other ranks, if there are any, and this does not. Its observer is new, as
        that of the loop would in time warn that the steps change no loss if there is no optimizer.
        """
        reader, everyone = self._reader, self._reader.everyone
        observer = Observer(reader, self._affinity, None, Ranks(None))
        misuse = Misuse(self.tasks, learns=True)
        batch = Batch(0, everyone)
        misuse.check_batch(everyone)
        observer.open(batch)
        observer.keep_random_state()
        for place, members in enumerate(partition):
            needed = everyone if observes else members
            last = place == len(partition) - 1
            plan = Plan(members, members, needed, (), observes, place, last)
            observer.move_to(plan)
            group = Group(plan, batch, reader, None, observer, misuse)
            self._step_on(group.loss(self.losses_of(self.run(self.model, group), group)))
            group.finish()
        observer.close()

    def losses_of(self, outputs: Any, group: Group | None = None) -> Losses:
        """The losses of all tasks, or of those that the group needs at least."""
        try:
            return self._losses(outputs)
        except KeyError as error:
            missing = error.args[0] if error.args else None
            if group is None or missing not in self.tasks or missing in group.observed:
                raise
            raise ValueError(
                f"losses(outputs) looks for the output of task {missing!r}, and a batch that does "
                f"not observe runs the heads of its group alone, {listed(group.observed)}: compute "
                "the losses of the tasks in outputs, {task: ... for task in outputs}."
            ) from error

    def _step_on(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        if self._in_ddp:
            # A backward pass might find its hooks waiting for gradients to exchange: after a
            # forward pass of the DistributedDataParallel that had no backward pass.
            learned = [p for p in self.parameters if p.requires_grad]
            gradients = torch.autograd.grad(loss, learned, allow_unused=True)
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = gradient
        else:
            loss.backward()
        for optimizer in self.optimizers:
            _step(optimizer)

    def heads_forward(
        self, heads: Mapping[str, nn.Module] | nn.ModuleDict | None
    ) -> Callable[[], object] | None:
        """A function that runs all heads and losses of a model forward, on inputs that were kept.

        None if the heads are not known or not called, or cannot run by themselves.
        """
        if heads is None:
            heads = getattr(self.inner, "heads", None)
        elif not isinstance(heads, Mapping | nn.ModuleDict):
            raise TypeError(f"heads takes {{task: module}}, got {_kind(heads)}.")
        elif missing := [task for task in self.tasks if task not in heads]:
            raise ValueError(
                f"heads has no module of task {missing[0]!r}; it has those of "
                f"{listed(list(heads))}."
            )
        if not isinstance(heads, Mapping | nn.ModuleDict):
            return None
        found = [heads] if isinstance(heads, TaskHeads) else heads.values()
        modules = {head: None for head in found if isinstance(head, nn.Module)}
        calls: list[tuple[nn.Module, Any, Any]] = []

        def keep(head: nn.Module, arguments: Any, named: Any) -> None:
            calls.append((head, detached(arguments), detached(named)))

        hooks = [head.register_forward_pre_hook(keep, with_kwargs=True) for head in modules]
        try:
            # A compiled model would not call the hooks.
            outputs = detached(self.run(self.inner, None))
        finally:
            for hook in hooks:
                hook.remove()

        def run() -> None:
            for head, arguments, named in calls:
                head(*arguments, **named)
            self._losses(outputs)

        try:
            run()
        except RuntimeError:  # as of losses that differentiate outputs with respect to inputs
            return None
        return run if calls else None


def _checked(model: Any) -> nn.Module:
    """The model to measure: the one inside of a DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"step_costs() takes a module, got {_kind(model)}.")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    inside: nn.Module = getattr(model, "_orig_mod", model)
    if isinstance(inside, DistributedDataParallel):
        raise ValueError(
            "The model is a compiled DistributedDataParallel, whose steps would wait for the other "
            "ranks: pass the module inside, torch.compile(ddp.module)."
        )
    if isinstance(inside, DataParallel):
        raise ValueError(
            "nn.DataParallel does not support groups: pass the module inside, model.module."
        )
    flat = any(type(part).__name__ == "FullyShardedDataParallel" for part in inside.modules())
    learned = False
    for name, parameter in inside.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"The parameter {name!r} is not initialized yet: run the model once before."
            )
        if flat or is_sharded(parameter):
            raise ValueError(
                "The model is sharded, so that every step waits for the other ranks: measure it "
                "on one process, before it is sharded."
            )
        learned = learned or parameter.requires_grad
    if not learned:
        raise ValueError(
            "The model has no parameter that requires a gradient, so no step can be taken: pass "
            "the model that is trained."
        )
    measured: nn.Module = model
    return measured


def _arguments(inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """The positional and the keyword arguments that the model is called with."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return inputs, {}
    return (inputs,), {}


def _optimizers(optimizer: object) -> list[Optimizer]:
    """The optimizers, without the wrappers of a trainer."""
    if optimizer is None:
        return []
    if isinstance(optimizer, list | tuple):
        return [one for wrapped in optimizer for one in _optimizers(wrapped)]
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer takes a torch.optim.Optimizer or a list of these, got {_kind(optimizer)}."
        )
    return [optimizer]


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:  # each optimizer raises its own
        if "closure" not in str(error).lower():
            raise
        raise ValueError(
            f"The step of {type(optimizer).__name__} needs a closure, which runs the model several "
            "times: leave the optimizer out to measure the other parts of a step."
        ) from error


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
