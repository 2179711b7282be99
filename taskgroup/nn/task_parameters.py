"""Finds the parameters, and the rows of shared parameters, that belong to each task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taskgroup._arguments import listed
from taskgroup.nn.shared_rows import SharedRows
from taskgroup.ops._sharded import is_sharded

__all__ = ["Heads", "parameters_of_tasks"]

Heads = Mapping[str, nn.Module | Tensor | Iterable[Tensor]] | nn.ModuleDict


def parameters_of_tasks(
    heads: Heads, tasks: tuple[str, ...], optimizers: Sequence[Optimizer], given: bool
) -> tuple[list[tuple[Tensor, int]], list[SharedRows]]:
    """Find the parameters of each task in these optimizers.

    With ``given``, the user has named the heads. Otherwise they are those of the model, and some
    may be in other optimizers.

    Returns:
        The parameters that belong to one task, each with the position of the task, and the
        parameters whose rows belong to several tasks.
    """
    _check_heads(heads, tasks)
    optimized = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    # By the id of a parameter, the positions of the elements that each task claims; None: all.
    claimed: dict[int, tuple[Tensor, str, dict[int, Tensor | None]]] = {}
    for k, task in enumerate(tasks):
        for name, tensor in _named(heads[task], task):
            parameter = tensor if tensor._base is None else tensor._base
            if not parameter.is_leaf:
                raise ValueError(
                    f"The head of task {task!r} has {name} of shape {list(tensor.shape)}, which is "
                    "computed from others: name a parameter, or rows of one by an index, such as "
                    "head.weight[0]."
                )
            if id(parameter) not in optimized:
                frozen = isinstance(parameter, nn.Parameter) and not parameter.requires_grad
                if frozen or not given:
                    continue
                raise ValueError(
                    f"The head of task {task!r} has {name} of shape {list(parameter.shape)}, which "
                    "is not in the optimizer, so attach() cannot hold it: add it to the optimizer "
                    "first, or name all optimizers, groups.attach([one, other], heads)."
                )
            own = claimed.setdefault(id(parameter), (parameter, name, {}))[2]
            if parameter is tensor:
                own[k] = None
            elif own.get(k, tensor) is not None:
                found = _elements(tensor, parameter)
                before = own.get(k)
                own[k] = found if before is None else torch.cat([before, found])
    if not given and not claimed:
        raise ValueError(
            "The optimizer that attach() was given holds none of the heads of the MultiTaskModel: "
            "pass the one that holds them."
        )
    whole: list[tuple[Tensor, int]] = []
    shared: list[SharedRows] = []
    for parameter, name, own in claimed.values():
        if len(own) == 1 and None in own.values():
            whole.append((parameter, next(iter(own))))
            continue
        shared.append(SharedRows(parameter, _owner(parameter, name, own, tasks), len(tasks)))
    return whole, shared


def _owner(
    parameter: Tensor, name: str, own: dict[int, Tensor | None], tasks: tuple[str, ...]
) -> Tensor:
    """The position of the task that each element belongs to; -1 for elements of no task.

    Raise if an element belongs to two tasks.
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
    """The positions of the elements of ``rows``, a view of the parameter, in the parameter."""
    ends = zip(parameter.shape, parameter.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in ends)
    # For every place in the memory of the parameter, the position of the element there.
    position = torch.zeros(extent, dtype=torch.int64, device="cpu")
    everything = torch.arange(parameter.numel(), dtype=torch.int64, device="cpu")
    position.as_strided(parameter.shape, parameter.stride()).copy_(everything.view(parameter.shape))
    offset = int(rows.storage_offset()) - int(parameter.storage_offset())
    return position.as_strided(rows.shape, rows.stride(), offset).flatten()


def _named(head: nn.Module | Tensor | Iterable[Tensor], task: str) -> list[tuple[str, Tensor]]:
    """The parameters of a head, each with a description for messages."""
    if isinstance(head, nn.Module):
        return [(f"the parameter {name!r}", own) for name, own in head.named_parameters()]
    if isinstance(head, Tensor):
        return [("a parameter", head)]
    wanted = f"The head of task {task!r} must be a module or parameters, got"
    if not isinstance(head, Iterable) or isinstance(head, str):
        raise ValueError(f"{wanted} a {type(head).__name__}.")
    found = list(head)
    for parameter in found:
        if not isinstance(parameter, Tensor):
            raise ValueError(f"{wanted} {type(parameter).__name__} in it.")
    return [("a parameter", parameter) for parameter in found]


def _check_heads(heads: object, tasks: tuple[str, ...]) -> None:
    """Raise unless ``heads`` is a mapping that names every task once."""
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
