"""What a step does to the heads of the tasks outside the group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from taskgroup.sentences import listed

__all__ = ["Heads", "Outside", "head_parameters", "prepare_gradients"]

Heads = Mapping[str, nn.Module | Iterable[nn.Parameter]]
Outside = Literal["hold", "coast"]


def head_parameters(heads: Heads, tasks: tuple[str, ...]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each task alone.

    Raises:
        ValueError: if a task is missing or unknown, or what is given are no parameters.
    """
    if differing := sorted(set(heads) ^ set(tasks)):
        raise ValueError(
            f"heads must name every task once and no other; {listed(differing)} are "
            "missing or unknown. A task without parameters of its own takes an empty list."
        )
    found = {}
    for task in tasks:
        head = heads[task]
        parameters = list(head.parameters() if isinstance(head, nn.Module) else head)
        for parameter in parameters:
            if not isinstance(parameter, torch.Tensor):
                raise ValueError(
                    f"The head of task {task!r} must be a module or parameters, got "
                    f"{type(parameter).__name__} in it."
                )
        found[task] = parameters
    return found


def prepare_gradients(
    parameters: Mapping[str, list[nn.Parameter]], inside: Iterable[str], outside: Outside
) -> None:
    """Give the heads outside the group the gradient their rule asks for.

    Args:
        parameters: of each task, as :func:`head_parameters` gives them.
        inside: the tasks of the group; a parameter that one of them has is left alone.
        outside: ``"hold"``: no gradient, so that no optimizer moves them; ``"coast"``: a gradient
            of zero, so that momentum and weight decay do.
    """
    inside = set(inside)
    kept = {id(parameter) for task in inside for parameter in parameters[task]}
    for task, own in parameters.items():
        if task in inside:
            continue
        for parameter in own:
            if id(parameter) in kept:
                continue
            if outside == "hold":
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)
            elif parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
