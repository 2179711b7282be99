"""Gradients taken through .grad, for shards that autograd.grad does not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taskgroup.gradients.vectorised import explained


def gradients_through_grad(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Iterable[Tensor] = (),
    *,
    retain_graph: bool = False,
) -> list[list[Tensor | None]]:
    """The gradient of every loss on the parameters, by way of ``.grad``, which is put back.

    FSDP puts the gradients of sharded parameters there. Hooks of
    ``register_post_accumulate_grad_hook``, such as an optimizer's step, do not run.

    Args:
        losses: K scalars.
        params: T parameters.
        others: more parameters that the losses reach; their ``.grad`` is put back as well.
        retain_graph: keep the graph for a later backward pass.

    Returns:
        ``[K][T]`` gradients; None where a task does not reach a parameter.
    """
    others = list(others)
    with hooks_held(losses, [*params, *others]):
        return backward_passes(losses, params, others, retain_graph=retain_graph)


def backward_passes(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    *,
    retain_graph: bool = False,
) -> list[list[Tensor | None]]:
    """The same, for use within :func:`hooks_held`."""
    kept = [(parameter, parameter.grad) for parameter in (*params, *others)]
    found: list[list[Tensor | None]] = []
    try:
        for k, loss in enumerate(losses):
            for parameter, _ in kept:
                parameter.grad = None
            with explained():
                loss.backward(retain_graph=retain_graph or k < len(losses) - 1)
            found.append([parameter.grad for parameter in params])
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    return found


@contextmanager
def hooks_held(
    losses: Iterable[Tensor], params: Iterable[Tensor], *, search: bool = False
) -> Iterator[Callable[[], None]]:
    """Holds the hooks of ``register_post_accumulate_grad_hook`` while gradients are incomplete.

    An optimizer in such a hook would step on the gradient of every single task.

    Args:
        losses: with a graph. Where a parameter has such hooks, those of all leaves of the graph are
            held: it takes a search, which takes time.
        params: whose hooks are held.
        search: search the graph in any case.

    Yields:
        What runs the hooks, once each, for the tensors that a gradient came to within the block;
        to be called after it, when ``.grad`` is complete.
    """
    leaves = [parameter for parameter in params if _hooks(parameter)]
    if leaves or search:
        found = (n.variable for n in graph_nodes(losses) if type(n).__name__ == "AccumulateGrad")
        leaves += [leaf for leaf in found if _hooks(leaf)]
    # Emptied in place, for the handles that remove hooks know the dictionary.
    live = {leaf: _hooks(leaf) for leaf in leaves}
    held = {leaf: dict(hooks) for leaf, hooks in live.items()}
    reached: dict[Tensor, None] = {}

    def run() -> None:
        for leaf in reached:
            for hook in held[leaf].values():
                hook(leaf)

    try:
        for hooks in live.values():
            hooks.clear()
            hooks["held"] = reached.setdefault
        yield run
    finally:
        for leaf, hooks in live.items():
            hooks.clear()
            hooks.update(held[leaf])


def _hooks(tensor: Tensor) -> dict[Any, Callable[[Tensor], Any]]:
    # FSDP reads the same attribute (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py).
    return getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of a graph, each once."""
    waiting: list[Any] = [torch.autograd.graph.get_gradient_edge(t).node for t in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(child for child, _ in node.next_functions)
            yield node
