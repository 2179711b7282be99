"""The gradients of tasks at a node of the graph, from the rows of what the node was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taskgroup.gradients.row_graph import Layout, Site

__all__ = ["Parts", "at_site"]

Own = list[Tensor | None]  # [K] gradients


class Parts:
    """The rows of each task, as a range of the rows in the order of the tasks."""

    def __init__(self, task_of_row: Tensor, n_tasks: int) -> None:
        self.task_of_row = task_of_row
        self.order = torch.argsort(task_of_row, stable=True)
        host = task_of_row.cpu()
        counts = torch.bincount(host[host >= 0], minlength=n_tasks).tolist()
        self.n_rows = len(host)
        start = self.n_rows - sum(counts)  # rows of no task come first
        self.ranges: list[tuple[int, int]] = []
        for count in counts:
            self.ranges.append((start, start + count))
            start += count
        self.sorted = bool((host[1:] >= host[:-1]).all())

    def rows(self, tensor: Tensor, layout: Layout) -> Tensor:
        """``[N, ...]``: the tensor with its rows first, in the order of the tasks.

        The other dimensions keep their order, and the part of ``layout.dim`` before and after the
        row become dimensions of their own.
        """
        dim, inner = layout
        split = tensor.unflatten(dim, (-1, self.n_rows, inner))
        first = split.movedim(dim + 1, 0)
        return first if self.sorted else first.index_select(0, self.order)


def at_site(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    """The gradients of the tasks on those inputs of a node that are parameters.

    Yields:
        The position of the input, and its K gradients; None for a task without rows.
    """
    rule = _RULES.get(site.node.name())
    left = set(site.inputs)
    if rule is not None:
        for at, own in rule(site, incoming, parts):
            left.discard(at)
            yield at, own
    if left:
        yield from _by_masks(site, incoming, parts, sorted(left))


def call(node: Any, output_nr: int, gradient: Tensor) -> Sequence[Tensor | None]:
    """The gradients on the inputs of a node, for that of one of its outputs."""
    given = []
    for at, meta in enumerate(node._input_metadata):
        if at == output_nr:
            given.append(gradient)
        else:
            given.append(torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device))
    found = node(*given)
    return found if isinstance(found, tuple) else (found,)


def _by_masks(
    site: Site, incoming: Tensor, parts: Parts, inputs: Sequence[int]
) -> Iterator[tuple[int, Own]]:
    """For any node: its own backward pass for each task, with zeros for the rows of the others."""
    dim, inner = site.layout
    size = incoming.shape[dim]
    task = parts.task_of_row[torch.arange(size, device=incoming.device) // inner % parts.n_rows]
    shape = [size if d == dim else 1 for d in range(incoming.dim())]
    found: dict[int, Own] = {at: [] for at in inputs}
    for k, (start, end) in enumerate(parts.ranges):
        if start == end:
            for own in found.values():
                own.append(None)
            continue
        masked = torch.where((task == k).view(shape), incoming, 0)
        gradients = call(site.node, 0, masked)
        for at, own in found.items():
            own.append(gradients[at])
    yield from found.items()


def _summed(rows: Tensor, parts: Parts) -> Own:
    """The sums over the rows of each task, ``[...]`` without the rows."""
    return [
        None if start == end else rows[start:end].sum(0) for start, end in parts.ranges
    ]


def _matrix(left: Tensor, right: Tensor, parts: Parts) -> Own:
    """``left^T right`` over the rows of each task, of ``[N, ..., a]`` and ``[N, ..., b]``."""
    a, b = left.shape[-1], right.shape[-1]
    per_row = left[0].numel() // a
    left, right = left.reshape(-1, a), right.reshape(-1, b)
    made = left.new_empty(len(parts.ranges), a, b)
    own: Own = []
    for k, (start, end) in enumerate(parts.ranges):
        if start == end:
            own.append(None)
            continue
        here = slice(start * per_row, end * per_row)
        own.append(torch.mm(left[here].t(), right[here], out=made[k]))
    return own


def _addmm(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    node, layout = site.node, site.layout
    if layout.dim != 0:
        return
    rows = parts.rows(incoming, layout)
    if 2 in site.inputs and node._saved_alpha == 1 and node._saved_mat1 is not None:
        yield 2, _product(parts.rows(node._saved_mat1, layout), rows, parts)
    bias = node.next_functions[0][0]
    if 0 in site.inputs and node._saved_beta == 1 and _is_vector(bias, incoming.shape[1]):
        yield 0, _summed(rows.flatten(1, -2), parts) if rows.dim() == 3 else [
            None if own is None else own for own in _summed(rows.flatten(1, -2).sum(1), parts)
        ]


def _mm(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    node, layout = site.node, site.layout
    if layout.dim == 0 and 1 in site.inputs and node._saved_self is not None:
        rows = parts.rows(incoming, layout)
        yield 1, _product(parts.rows(node._saved_self, layout), rows, parts)


def _product(inputs: Tensor, rows: Tensor, parts: Parts) -> Own:
    """The gradients on a matrix ``[a, b]``, laid out as its transpose, which nn.Linear holds."""
    return [None if own is None else own.t() for own in _matrix(rows, inputs, parts)]


def _is_vector(node: Any, size: int) -> bool:
    if node is None:
        return False
    if node.name().endswith("AccumulateGrad"):
        return tuple(node.variable.shape) == (size,)
    return tuple(node._input_metadata[0].shape) == (size,)


def _convolution(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    node, layout = site.node, site.layout
    if layout.dim != 0:
        return
    rows = parts.rows(incoming, layout).flatten(0, 2)
    inputs = parts.rows(node._saved_input, layout).flatten(0, 2)
    per_row = len(rows) // parts.n_rows
    wanted = [False, 1 in site.inputs, 2 in site.inputs]
    sizes = [incoming.shape[1]] if wanted[2] else None
    found: dict[int, Own] = {at: [] for at in site.inputs}
    for start, end in parts.ranges:
        if start == end:
            for own in found.values():
                own.append(None)
            continue
        here = slice(start * per_row, end * per_row)
        gradients = torch.ops.aten.convolution_backward(
            rows[here],
            inputs[here],
            node._saved_weight,
            sizes,
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            node._saved_transposed,
            node._saved_output_padding,
            node._saved_groups,
            wanted,
        )
        for at, own in found.items():
            own.append(gradients[at])
    yield from found.items()


def _embedding(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    node, layout = site.node, site.layout
    if node._saved_scale_grad_by_freq or node._saved_sparse:
        return
    indices = node._saved_indices
    if layout.dim >= indices.dim():
        return
    n_entries = node._saved_weight_sym_argsize_0
    padding = node._saved_padding_idx
    padding -= 2**64 if padding >= 2**63 else 0  # torch shows -1, no padding, as unsigned
    rows = parts.rows(incoming, layout)
    indices = parts.rows(indices, layout)
    own: Own = []
    for start, end in parts.ranges:
        if start == end:
            own.append(None)
            continue
        here, at = rows[start:end].flatten(0, -2), indices[start:end].flatten()
        own.append(
            torch.ops.aten.embedding_dense_backward(
                here, at, n_entries, padding, False
            )
        )
    yield 0, own


def _layer_norm(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    node, layout = site.node, site.layout
    n_normalised = len(node._saved_normalized_shape)
    if layout.dim >= incoming.dim() - n_normalised:
        return
    if 1 in site.inputs:
        normal = (node._saved_input - node._saved_result1) * node._saved_result2
        rows = parts.rows((incoming * normal), layout)
        yield 1, _summed_to(rows, n_normalised, parts)
    if 2 in site.inputs:
        yield 2, _summed_to(parts.rows(incoming, layout), n_normalised, parts)


def _summed_to(rows: Tensor, n_kept: int, parts: Parts) -> Own:
    """The sums of each task over all but the last dimensions."""
    kept = rows.shape[rows.dim() - n_kept :]
    flat = rows.reshape(parts.n_rows, -1, *kept).sum(1)
    return _summed(flat, parts)


def _group_norm(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    node, layout = site.node, site.layout
    if layout.dim != 0:
        return
    n, channels = incoming.shape[:2]
    groups = node._saved_group
    given = node._saved_input.reshape(n, groups, -1)
    normal = (given - node._saved_result1.view(n, groups, 1)) * node._saved_result2.view(
        n, groups, 1
    )
    flat = incoming.reshape(n, channels, -1)
    if 1 in site.inputs:
        product = (flat * normal.reshape(n, channels, -1)).sum(2)
        yield 1, _summed_to(parts.rows(product, layout), 1, parts)
    if 2 in site.inputs:
        yield 2, _summed_to(parts.rows(flat.sum(2), layout), 1, parts)


def _broadcast(site: Site, incoming: Tensor, parts: Parts, factor: Tensor | None, at: int) -> Any:
    """The gradients on a parameter that is added to rows, or multiplied with them."""
    child, output_nr = site.node.next_functions[at]
    leaf = child.name().endswith("AccumulateGrad")
    shape = tuple(child.variable.shape if leaf else child._input_metadata[output_nr].shape)
    dim = site.layout.dim
    own = dim - (incoming.dim() - len(shape))  # that dimension of the parameter
    if own >= 0 and shape[own] != 1:
        return None  # it has rows itself
    product = incoming if factor is None else incoming * factor.conj()
    if product.dim() != incoming.dim():
        return None
    rows = parts.rows(product, site.layout)  # [N, ..., outer, inner, ...]
    rows = rows.sum((dim + 1, dim + 2))  # the parameter is the same along them
    rows = rows.unsqueeze(dim + 1)
    summed = _summed(rows, parts)
    return [None if g is None else g.sum_to_size(shape) for g in summed]


def _add(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    alpha = getattr(site.node, "_saved_alpha", 1)
    for at in site.inputs:
        if at == 0 or alpha == 1:
            own = _broadcast(site, incoming, parts, None, at)
            if own is not None:
                yield at, own


def _mul(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    if len(site.inputs) > 1:
        return
    (at,) = site.inputs
    factor = site.node._saved_other if at == 0 else site.node._saved_self
    if isinstance(factor, Tensor):
        own = _broadcast(site, incoming, parts, factor, at)
        if own is not None:
            yield at, own


def _expand(site: Site, incoming: Tensor, parts: Parts) -> Iterator[tuple[int, Own]]:
    own = _broadcast(site, incoming, parts, None, 0)
    if own is not None:
        yield 0, own


_RULES: dict[str, Callable[[Site, Tensor, Parts], Iterator[tuple[int, Own]]]] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeGroupNormBackward0": _group_norm,
    "AddBackward0": _add,
    "MulBackward0": _mul,
    "ExpandBackward0": _expand,
}
