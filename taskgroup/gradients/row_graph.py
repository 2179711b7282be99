"""Where parameters meet the rows of a batch in an autograd graph, and how the rows lie there."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from taskgroup._graph import graph_nodes, is_leaf
from taskgroup.gradients.vectorised import explained

__all__ = ["Layout", "Site", "find_sites", "incoming", "leaves"]

# Views and casts: what they make of a parameter is still the parameter, and has no rows.
_VIEWS = (
    *("T", "Transpose", "Permute", "Movedim", "View", "UnsafeView", "Reshape", "ReshapeAlias"),
    *("Flatten", "Unsqueeze", "Squeeze", "Slice", "Select", "Split", "SplitWithSizes", "Chunk"),
    *("Unbind", "Unfold", "Alias", "Clone", "ToCopy"),
)
# They join a parameter with rows, nearly always: they are not looked through at first.
_CONSUMERS = (
    *("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Embedding", "Native", "Cudnn", "Fused"),
    *("Scaled", "Linear", "Mkldnn", "Thnn", "Miopen"),
)
# They may move rows by the values of a tensor, so a layout that held for one batch may not hold for
# the next one.
_MOVERS = ("Index", "Gather", "Scatter", "Sort", "Topk", "Masked", "Roll", "Take", "Put")


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
    sites: tuple[tuple[int, Layout, tuple[int, ...]], ...]  # nodes by their place in the order
    sure: bool  # whether no other layout explains what was seen


_MOST_PLANS = 16
_MOST_PASSES = 8  # to find a layout; one is enough unless most gradients are zero
_plans: dict[Any, _Plan] = {}


def find_sites(losses: Tensor, params: Sequence[Tensor]) -> list[Site]:
    """All sites behind the losses ``[N]`` of the rows, from the losses to the inputs.

    One backward pass on the losses of half of the rows shows where their gradients lie. It is
    repeated only if the graph has changed.

    Raises:
        ValueError: if the gradient of one row depends on other rows, at a parameter.
    """
    nodes = list(graph_nodes([losses]))
    place = {node: at for at, node in enumerate(nodes)}
    position = {id(parameter): t for t, parameter in enumerate(params)}
    signature, moves = [], False
    for node in nodes:
        name = node.name()
        _check_passable(name)
        leaf = position.get(id(node.variable)) if is_leaf(node) else None
        shapes = tuple(tuple(m.shape) for m in node._input_metadata)
        children = tuple((place.get(child), nr) for child, nr in node.next_functions)
        kind: Any = type(node)
        settings = tuple(getattr(node, setting) for setting in _settings(kind))
        signature.append((name, leaf, shapes, children, settings))
        moves |= name.startswith(_MOVERS)
    key = (len(losses), tuple(signature))
    plan = None if moves else _plans.get(key)
    if plan is None:
        plan = _planned(losses, nodes, place, frozenset(position))
        if plan.sure and not moves:
            if len(_plans) >= _MOST_PLANS:
                _plans.pop(next(iter(_plans)))
            _plans[key] = plan
    return [Site(nodes[at], layout, inputs) for at, layout, inputs in plan.sites]


def incoming(losses: Tensor, cotangent: Tensor, nodes: Sequence[Any]) -> list[Tensor | None]:
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
    if is_leaf(node):
        yield node.variable
    else:
        for child, _ in node.next_functions:
            if child is not None:
                yield from leaves(child)


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
def _settings(kind: Hashable) -> tuple[str, ...]:
    """The attributes of a kind of node that hold what it was called with, besides tensors."""
    saved = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple(name for name in saved if not hasattr(kind, f"_raw{name}"))


def _planned(
    losses: Tensor, nodes: Sequence[Any], place: dict[Any, int], params: frozenset[int]
) -> _Plan:
    opened: set[Any] = set()  # consumers that have turned out to depend on parameters alone
    while True:
        alone = _of_parameters_alone(nodes, params, opened)
        candidates = [
            node
            for node in nodes
            if any(child in alone for child, _ in node.next_functions) and not _is_view(node)
        ]
        layouts = _layouts(losses, candidates)
        more = set()
        for node in candidates:
            if not layouts[node]:
                # An input without a graph may hold rows of data.
                if not all(child in alone for child, _ in node.next_functions):
                    raise _mixed(node, nodes)
                if node not in alone:
                    more.add(node)
        if not more:
            break
        opened |= more
    # What is behind a node with rows does not depend on parameters alone.
    with_rows = frozenset(node for node in candidates if layouts[node])
    alone = _of_parameters_alone(nodes, params, opened, with_rows)
    sites = []
    sure = True
    for node in candidates:
        children = enumerate(node.next_functions)
        inputs = tuple(at for at, (child, _) in children if child in alone)
        if layouts[node] and inputs:
            sites.append((place[node], layouts[node][0], inputs))
            sure &= len(layouts[node]) == 1
    return _Plan(tuple(sites), sure)


def _is_view(node: Any) -> bool:
    return node.name().partition("Backward")[0] in _VIEWS


def _of_parameters_alone(
    nodes: Sequence[Any],
    params: frozenset[int],
    opened: Collection[Any],
    with_rows: Collection[Any] = (),
) -> set[Any]:
    """The nodes that, as far as one can tell from the graph, depend on the parameters alone."""
    known: dict[Any, bool] = {}
    waiting = list(reversed(nodes))
    while waiting:
        node = waiting[-1]
        name = node.name()
        children = [child for child, _ in node.next_functions if child is not None]
        joins = name.startswith(_CONSUMERS) and node not in opened
        if node in known:
            waiting.pop()
        elif is_leaf(node):
            known[node] = id(node.variable) in params
        elif not children or joins or node in with_rows:
            known[node] = False
        elif unknown := [child for child in children if child not in known]:
            waiting.extend(unknown)
        else:
            known[node] = all(known[child] for child in children)
    return {node for node, alone in known.items() if alone}


def _layouts(losses: Tensor, nodes: Sequence[Any]) -> dict[Any, list[Layout]]:
    """The layouts that explain where the gradients of some rows are not zero; none if no layout.

    The passes go on, each with other rows, until there is at most one.
    """
    n_rows = len(losses)
    generator = torch.Generator("cpu").manual_seed(n_rows)
    found: dict[Any, list[Layout]] = {}
    for _ in range(_MOST_PASSES):
        unsure = [node for node in nodes if len(found.get(node, "unknown")) > 1]
        if not unsure:
            break
        some = torch.zeros(n_rows, dtype=torch.bool, device="cpu")
        order = torch.randperm(n_rows, generator=generator, device="cpu")
        some[order[: (n_rows + 1) // 2]] = True
        with torch.no_grad():
            gradients = incoming(losses, some.to(losses), unsure)
        for node, gradient in zip(unsure, gradients, strict=True):
            if node not in found:
                shape = node._input_metadata[0].shape
                found[node] = list(_possible(tuple(shape), n_rows))
            if gradient is not None:
                found[node] = _consistent(gradient, some, found[node])
        if n_rows == 1:
            return {node: own[:1] for node, own in found.items()}
    return found


def _possible(shape: tuple[int, ...], n_rows: int) -> Iterator[Layout]:
    """All layouts; those in which rows come first are first, as they are the usual ones."""
    for dim, size in enumerate(shape):
        if size % n_rows == 0:
            per_row = size // n_rows
            yield from (
                Layout(dim, inner) for inner in range(per_row, 0, -1) if per_row % inner == 0
            )


def _consistent(gradient: Tensor, some: Tensor, layouts: Sequence[Layout]) -> list[Layout]:
    """Those layouts in which the gradient is zero for all rows but some."""
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    there = gradient.nan_to_num(0.0, 0.0, 0.0).ne(0)  # NaN is 0 * inf, of any row
    kept = []
    for layout in layouts:
        size = gradient.shape[layout.dim]
        along = there.movedim(layout.dim, 0).reshape(size, -1).any(1).cpu()
        row = torch.arange(size, device="cpu") // layout.inner % len(some)
        if not (along & ~some[row]).any():
            kept.append(layout)
    return kept


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
