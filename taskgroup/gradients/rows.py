"""The gradients of all tasks from one backward pass, where every row belongs to one task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskgroup._arguments import parameters_of, whole_number
from taskgroup.gradients.row_graph import Site, find_sites, incoming
from taskgroup.gradients.row_rules import Own, Parts, at_site, call
from taskgroup.ops.task_gram import task_gram

__all__ = ["row_task_gradients", "row_task_gram"]


def row_task_gradients(
    losses: Tensor,
    task_of_row: Tensor,
    params: nn.Module | Iterable[Tensor],
    n_tasks: int | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> list[list[Tensor | None]]:
    params, n_tasks, parts, found = _prepared(losses, task_of_row, params, n_tasks, reduction)
    result: list[list[Tensor | None]] = [[None] * len(params) for _ in range(n_tasks)]
    for t, own in found:
        for k, gradient in enumerate(own):
            result[k][t] = gradient
    return result


def row_task_gram(
    losses: Tensor,
    task_of_row: Tensor,
    params: nn.Module | Iterable[Tensor],
    n_tasks: int | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    params, n_tasks, parts, found = _prepared(losses, task_of_row, params, n_tasks, reduction)
    total = torch.zeros(n_tasks, n_tasks, dtype=torch.float64, device=losses.device)
    dtype = torch.float32
    for _, own in found:
        gram = task_gram([[gradient] for gradient in own])
        dtype = torch.promote_types(dtype, gram.dtype)
        total += gram
    return total.to(dtype)


def _prepared(losses, task_of_row, params, n_tasks, reduction):
    params = list(dict.fromkeys(parameters_of("params", params)))
    if n_tasks is None:
        n_tasks = int(task_of_row.max()) + 1
    active = [p for p in params if p.requires_grad]
    parts = Parts(task_of_row, n_tasks)
    weights = torch.ones_like(losses)
    if reduction == "mean":
        each = [0.0 if a == b else 1.0 / (b - a) for a, b in parts.ranges]
        each = torch.tensor([*each, 0.0], dtype=losses.dtype, device=losses.device)
        weights = each[task_of_row]
    else:
        weights = (task_of_row >= 0).to(losses.dtype)
    return params, n_tasks, parts, _gradients(losses, weights, params, active, parts)


def _gradients(losses, weights, params, active, parts) -> Iterator[tuple[int, Own]]:
    """For each parameter that any row reaches, its position and K gradients."""
    sites = find_sites(losses, active)
    place = {id(p): t for t, p in enumerate(params)}
    given = incoming(losses, weights, [site.node for site in sites])
    uses = [0] * len(params)
    for site in sites:
        for at in site.inputs:
            for leaf in _leaves(site.node.next_functions[at][0]):
                uses[place[id(leaf)]] += 1
    kept: dict[int, Own] = {}
    with torch.no_grad():
        for at, site in enumerate(sites):
            gradient, given[at] = given[at], None
            if gradient is None:
                continue
            for position, own in at_site(site, gradient, parts):
                child, output_nr = site.node.next_functions[position]
                for leaf, made in _to_leaves(child, output_nr, own):
                    t = place[id(leaf)]
                    uses[t] -= 1
                    before = kept.pop(t, None)
                    if before is not None:
                        made = [
                            b if a is None else a if b is None else a + b
                            for a, b in zip(before, made, strict=True)
                        ]
                    if uses[t]:
                        kept[t] = made
                    else:
                        yield t, made
        yield from kept.items()


def _leaves(node: Any) -> Iterator[Tensor]:
    if node.name().endswith("AccumulateGrad"):
        yield node.variable
    else:
        for child, _ in node.next_functions:
            if child is not None:
                yield from _leaves(child)


def _to_leaves(node: Any, output_nr: int, own: Own) -> Iterator[tuple[Tensor, Own]]:
    """Take the gradients of the tasks through what was computed from parameters alone."""
    if node.name().endswith("AccumulateGrad"):
        yield node.variable, own
        return
    if node.name() == "TBackward0":
        found = [(None if g is None else g.t(),) for g in own]
    else:
        found = [(None,) * len(node.next_functions) if g is None else call(node, output_nr, g) for g in own]
    for at, (child, nr) in enumerate(node.next_functions):
        if child is not None:
            yield from _to_leaves(child, nr, [f[at] for f in found])
