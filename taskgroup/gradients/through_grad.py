"""Gradients of single tasks through ``.grad``, as FSDP and the joint methods need them.

This is the only place that runs ``backward()`` once per task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from taskgroup._graph import graph_leaves
from taskgroup.gradients.vectorised import explained


def gradients_through_grad(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Iterable[Tensor] = (),
    *,
    retain_graph: bool = False,
) -> list[list[Tensor | None]]:
    """Do the same as :func:`backward_passes`, but suspend the hooks meanwhile."""
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
    """Take the gradients of K losses on T parameters from ``.grad``, and put the old one back.

    FSDP puts the gradients of sharded parameters there. Call it within :func:`hooks_held`. The
    ``.grad`` of ``others``, more parameters that the losses reach, is put back as well.

    Returns:
        ``[K][T]``, the tensors that autograd has made; None if a task does not reach a parameter.
    """
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
    """Suspend hooks of ``register_post_accumulate_grad_hook`` while gradients are incomplete.

    An optimizer in such a hook would otherwise step on the gradient of every single task. If one of
    the parameters has such hooks, or with ``search``, those of all leaves of the graph of the
    losses are suspended; finding the leaves takes time.

    Yields:
        A function that runs the hooks, once for each tensor that got a gradient within the block.
        Call it after the block, when ``.grad`` is complete.
    """
    leaves = [parameter for parameter in params if _hooks(parameter)]
    if leaves or search:
        leaves += [leaf for leaf in graph_leaves(losses) if _hooks(leaf)]
    # Emptied in place, since the handles that remove hooks refer to the dictionary.
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
