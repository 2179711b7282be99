"""Where parameters meet the rows of a batch in an autograd graph, and how the rows lie there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from taskgroup.gradients.vectorised import explained

__all__ = ["Layout", "Site", "find_sites", "incoming", "leaves"]

# Views and casts: what they make of a parameter is still the parameter, and has no rows.
_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "T Transpose Permute View UnsafeView Reshape ReshapeAlias Unsqueeze Squeeze Slice Select "
        "Split SplitWithSizes Unbind ToCopy Clone Alias Movedim Flatten Unfold Chunk"
    ).split()
    for number in range(4)
)
# They join a parameter with rows, nearly always: they are not looked through at first.
_CONSUMERS = (
    *("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Embedding", "Native", "Cudnn", "Fused"),
    *("Scaled", "Linear", "Mkldnn", "Thnn", "Miopen"),
)
# They may move rows by the values of a tensor, so a layout that held for one batch may not hold for
# the next one.
_MOVERS = ("Index", "Gather", "Scatter", "Sort", "Masked", "Roll", "Take", "Put")


class Layout(NamedTuple):
    """The rows along one dimension: entry i is of row ``i // inner % n_rows``."""

    dim: int
    inner: int


class Site(NamedTuple):
    """A node of the graph that joins parameters with rows.

    Attributes:
        node: it.
        layout: that of the gradient of its output.
        inputs: the positions of those inputs that are parameters, or are computed from parameters
            alone.
    """

    node: Any
    layout: Layout
    inputs: tuple[int, ...]


class _Plan(NamedTuple):
    sites: tuple[tuple[int, Layout, tuple[int, ...]], ...]  # positions in the order of the nodes


_MOST_PLANS = 16
_plans: dict[Any, _Plan] = {}


def find_sites(losses: Tensor, params: Sequence[Tensor]) -> list[Site]:
    """All sites behind the losses ``[N]`` of the rows, from the losses to the inputs.

    One backward pass on the losses of half of the rows shows where their gradients lie. It is
    repeated only if the graph has changed.

    Raises:
        ValueError: if the gradient of one row depends on other rows, at a parameter.
    """
    nodes = list(_in_order(losses))
    place = {node: at for at, node in enumerate(nodes)}
    leaves = {id(parameter): t for t, parameter in enumerate(params)}
    signature, moving = [], False
    for node in nodes:
        name = node.name()
        _check_passable(name)
        leaf = leaves.get(id(node.variable)) if name.endswith("AccumulateGrad") else None
        shapes = tuple(tuple(m.shape) for m in node._input_metadata)
        children = tuple((place.get(child), nr) for child, nr in node.next_functions)
        settings = tuple(getattr(node, setting) for setting in _settings(type(node)))
        signature.append((name, leaf, shapes, children, settings))
        moving |= name.startswith(_MOVERS)
    key = (len(losses), tuple(signature))
    plan = None if moving else _plans.get(key)
    if plan is None:
        plan = _planned(losses, nodes, place, leaves)
        if not moving:
            if len(_plans) >= _MOST_PLANS:
                _plans.pop(next(iter(_plans)))
            _plans[key] = plan
    return [Site(nodes[at], layout, inputs) for at, layout, inputs in plan.sites]


def incoming(
    losses: Tensor, cotangent: Tensor, nodes: Sequence[Any]
) -> list[Tensor | None]:
    """The gradients that reach the nodes in a backward pass; no parameter gets one."""
    if not nodes:
        return []
    edges = [GradientEdge(node, 0, None) for node in nodes]
    with explained():
        return list(
            torch.autograd.grad(losses, edges, cotangent, retain_graph=True, allow_unused=True)
        )


def leaves(node: Any) -> Iterator[Tensor]:
    """The parameters that a node on parameters alone depends on, once for each way to them."""
    if node.name().endswith("AccumulateGrad"):
        yield node.variable
    else:
        for child, _ in node.next_functions:
            if child is not None:
                yield from leaves(child)


def _in_order(losses: Tensor) -> Iterator[Any]:
    """The nodes of the graph, in an order that depends on nothing but the graph."""
    waiting = [losses.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)


def _check_passable(name: str) -> None:
    """Raise if a node hides parameters, and what is computed with them."""
    if name.startswith("CompiledFunction"):
        raise ValueError(
            "A part of the model is compiled, and what is inside cannot be seen: leave the model "
            "uncompiled, or take the gradients one by one, with task_gradients(losses, params)."
        )
    if name.startswith("CheckpointFunction"):
        raise ValueError(
            "Activation checkpointing with use_reentrant=True hides the parameters inside: "
            "checkpoint with use_reentrant=False."
        )


@cache
def _settings(kind: type) -> tuple[str, ...]:
    """The attributes of a kind of node that hold what it was called with, besides tensors."""
    saved = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple(name for name in saved if not hasattr(kind, f"_raw{name}"))


def _planned(
    losses: Tensor, nodes: Sequence[Any], place: dict[Any, int], leaves: dict[int, int]
) -> _Plan:
    n_rows = len(losses)
    # Fixed, and without a pattern that a layout could repeat.
    generator = torch.Generator().manual_seed(n_rows)
    chosen = torch.randperm(n_rows, generator=generator)[: max(1, n_rows // 2)]
    half = torch.zeros(n_rows, dtype=torch.bool)
    half[chosen] = True
    opened: set[Any] = set()  # consumers that have turned out to see no rows
    while True:
        alone = _of_parameters_alone(nodes, leaves, opened)
        candidates = [
            node
            for node in nodes
            if node.name() not in _VIEWS
            and any(child in alone for child, _ in node.next_functions)
        ]
        if not candidates:
            return _Plan(())
        with torch.no_grad():
            found = incoming(losses, half.to(losses), candidates)
        layouts: dict[Any, Layout | None] = {
            node: None if gradient is None else _layout(gradient, half)
            for node, gradient in zip(candidates, found, strict=True)
        }
        # From the leaves on: a node on parameters alone without rows is looked through.
        sites, more = [], set()
        for node in candidates:
            layout = layouts[node]
            if layout is not None:
                continue
            # Without a graph, an input may hold rows of data.
            if all(child in alone for child, _ in node.next_functions):
                if node not in alone:
                    more.add(node)
            else:
                raise _mixed(node, nodes)
        if more:
            opened |= more
            continue
        through = {
            node for node in alone if node in layouts and layouts[node] is not None
        }  # sites themselves, so nothing behind them is of parameters alone
        if through:
            alone = _of_parameters_alone(nodes, leaves, opened, stop=through)
        for node in candidates:
            layout = layouts[node]
            inputs = tuple(
                at for at, (child, _) in enumerate(node.next_functions) if child in alone
            )
            if layout is not None and inputs:
                sites.append((place[node], layout, inputs))
        return _Plan(tuple(sites))


def _of_parameters_alone(
    nodes: Sequence[Any], leaves: dict[int, int], opened: set[Any], stop: set[Any] = frozenset()  # type: ignore[assignment]
) -> set[Any]:
    """The nodes that, as far as one can tell from the graph, depend on the parameters alone."""
    known: dict[Any, bool] = {}
    for start in nodes:
        waiting = [start]
        while waiting:
            node = waiting[-1]
            if node in known:
                waiting.pop()
                continue
            name = node.name()
            children = [child for child, _ in node.next_functions if child is not None]
            if name.endswith("AccumulateGrad"):
                known[node] = id(node.variable) in leaves
            elif not children or node in stop:
                known[node] = False
            elif name.startswith(_CONSUMERS) and node not in opened:
                known[node] = False
            else:
                unknown = [child for child in children if child not in known]
                if unknown:
                    waiting.extend(unknown)
                    continue
                known[node] = all(known[child] for child in children)
            waiting.pop()
    return {node for node, alone in known.items() if alone}


def _layout(gradient: Tensor, half: Tensor) -> Layout | None:
    """How the rows lie in a gradient that is zero for half of the rows; None if they do not."""
    n_rows = len(half)
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    there = gradient.detach().ne(0)
    for dim, size in enumerate(gradient.shape):
        if size == 0 or size % n_rows:
            continue
        along = there.movedim(dim, 0).reshape(size, -1).any(1).cpu()
        if not along.any():
            return Layout(dim, size // n_rows)  # no row reaches this node: any layout does
        for inner in _divisors(size // n_rows):
            wanted = half[torch.arange(size) // inner % n_rows]
            # The others must be zero, and of the chosen ones most are not.
            if not (along & ~wanted).any():
                return Layout(dim, inner)
    return None


def _divisors(number: int) -> list[int]:
    """From the largest: rows come first nearly always."""
    return [d for d in range(number, 0, -1) if number % d == 0]


def _mixed(node: Any, nodes: Sequence[Any]) -> ValueError:
    for other in nodes:
        if "BatchNorm" in other.name() and getattr(other, "_saved_training", True):
            return ValueError(
                "A BatchNorm layer in training mixes the rows of the batch, so no row has a "
                "gradient of its own: put it in eval mode, replace it by nn.GroupNorm, or take the "
                "gradients one by one, with task_gradients(losses, params)."
            )
    return ValueError(
        f"The gradient at {node.name()} mixes the rows of the batch, so no row has a gradient of "
        "its own: take the gradients one by one, with task_gradients(losses, params)."
    )
