"""The nodes and leaves of the autograd graph behind tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["graph_leaves", "graph_nodes", "is_leaf"]


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of the graph behind tensors that require a gradient, each once.

    Their order depends on the graph alone.
    """
    waiting: list[Any] = [torch.autograd.graph.get_gradient_edge(t).node for t in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(child for child, _ in node.next_functions)
            yield node


def graph_leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of the graph behind tensors that require a gradient, such as parameters."""
    for node in graph_nodes(tensors):
        if is_leaf(node):
            yield node.variable


def is_leaf(node: Any) -> bool:
    """Whether a node stands for a leaf, its ``variable``."""
    return type(node).__name__ == "AccumulateGrad"
