"""The parts of a problem's network, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import taskgroup as tg
from taskgroup.lab.problem import Problem
from taskgroup.lab.words import kind_of, listed

__all__ = ["Parts", "find_parts", "in_float32", "run_network"]


class Parts(NamedTuple):
    """The parameters of a network: of each task alone, and the rest.

    Attributes:
        heads: ``{task: module or parameters}`` for the tasks that are trained.
        alone: the parameters of these heads.
        shared: the parameters that are in no head.
    """

    heads: dict[str, nn.Module | Sequence[nn.Parameter]]
    alone: list[nn.Parameter]
    shared: list[nn.Parameter]


def find_parts(problem: Problem, model: nn.Module, tasks: Sequence[str]) -> Parts:
    """The parts of a model that a problem has made for some of its tasks.

    Raises:
        ValueError: if a task has no head, or all parameters are in heads.
    """
    heads = problem.heads(model)
    if missing := [task for task in tasks if task not in heads]:
        raise ValueError(
            f"The network of {type(problem).__name__} has no head of {listed(missing)}; it has "
            f"heads of {listed(heads)}. heads are {{task: module}}, with the names in tasks."
        )
    alone = {id(p) for head in heads.values() for p in _parameters(head)}
    shared = [parameter for parameter in model.parameters() if id(parameter) not in alone]
    if not shared:
        raise ValueError(
            f"The network of {type(problem).__name__} has no shared parameters: all of them are in "
            "heads, which belong to one task each. Leave shared layers out of heads."
        )
    trained = {task: heads[task] for task in tasks}
    of_tasks = {id(p): p for head in trained.values() for p in _parameters(head)}
    return Parts(trained, list(of_tasks.values()), shared)


def run_network(
    model: nn.Module, inputs: Any, tasks: Sequence[str], group: tg.Group | None = None
) -> dict[str, Any]:
    """``{task: output}`` for some tasks; with a group, at least for those that it observes.

    A model whose ``forward`` takes ``group`` gets it, and decides which heads to run. Any other
    runs all of them.
    """
    arguments: Sequence[Any] = (inputs,)
    named: Mapping[str, Any] = {}
    if isinstance(inputs, Mapping):
        arguments, named = (), inputs
    elif isinstance(inputs, tuple | list):
        arguments = inputs
    once: AbstractContextManager[None] = nullcontext()
    if isinstance(model, tg.MultiTaskModel) or "group" in signature(model.forward).parameters:
        named = {**named, "group": group}
    elif group is not None:
        once = tg.statistics_once(model, group)
    with once:
        outputs = model(*arguments, **named)
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"The network {type(model).__name__} must return {{task: output}}, got "
            f"{kind_of(outputs)}."
        )
    return {task: output for task, output in outputs.items() if task in tasks}


def in_float32(output: Any) -> Any:
    """An output with its tensors of fewer bits in float32."""

    def convert(leaf: Any) -> Any:
        is_half = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
        return leaf.float() if is_half else leaf

    return tree_map(convert, output)


def _parameters(head: nn.Module | Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return list(head.parameters()) if isinstance(head, nn.Module) else list(head)
