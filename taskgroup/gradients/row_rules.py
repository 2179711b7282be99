"""The gradients of tasks at a node of the graph, from the rows of what the node was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from taskgroup._graph import is_leaf
from taskgroup.gradients.row_graph import Layout, Site

__all__ = ["Own", "Parts", "at_site", "cheaper", "gram_of_matrix", "matrix_input", "to_leaves"]

Own: TypeAlias = list[Tensor | None]  # [K] gradients, None for a task without rows
_Found: TypeAlias = Iterator[tuple[int, Own]]  # the position of an input, and its K gradients

_MOST_ROWS = 8192  # whose products with each other are formed: 256 MB in float32


class Parts:
    """The rows of each task, as a range of the rows in the order of the tasks.

    Args:
        task_of_row: ``[N]`` int64 on the host; -1 is a row of no task.
        n_tasks: K.
        device: where the rows are.
    """

    def __init__(self, task_of_row: Tensor, n_tasks: int, device: torch.device) -> None:
        self.task_of_row = task_of_row.to(device)
        self.n_rows, self.n_tasks = len(task_of_row), n_tasks
        counts = torch.bincount(task_of_row[task_of_row >= 0], minlength=n_tasks).tolist()
        start = self.n_rows - sum(counts)  # rows of no task come first
        self._ranges: list[tuple[int, int]] = []
        for count in counts:
            self._ranges.append((start, start + count))
            start += count
        in_order = bool((task_of_row[1:] >= task_of_row[:-1]).all())
        self._order = None if in_order else torch.argsort(task_of_row, stable=True).to(device)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The first row of each task and the one after its last, in the order of the tasks."""
        return iter(self._ranges)

    def rows(self, tensor: Tensor, layout: Layout) -> Tensor:
        """``[N, ..., before, after, ...]``: the tensor with its rows first, by task.

        The dimension that holds the rows becomes two, what came before the row and what came after
        it; all others keep their order.
        """
        split = tensor.unflatten(layout.dim, (-1, self.n_rows, layout.inner))
        first: Tensor = split.movedim(layout.dim + 1, 0)
        return first if self._order is None else first.index_select(0, self._order)


def at_site(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    """The gradients of the tasks on those inputs of a site that are parameters.

    Args:
        site: the node; its ``inputs`` are those that are wanted.
        incoming: the gradient on its output.
        parts: the rows of the tasks.
    """
    left = set(site.inputs)
    rule = None if incoming.is_complex() else _RULES.get(site.node.name())
    if rule is not None and left:
        for at, own in rule(site, incoming, parts):
            left.discard(at)
            yield at, own
    if left:
        yield from _by_masks(site, incoming, parts, sorted(left))


def to_leaves(node: Any, output_nr: int, own: Own) -> Iterator[tuple[Tensor, Own]]:
    """Take the gradients of the tasks through a node that depends on parameters alone."""
    if is_leaf(node):
        yield node.variable, own
        return
    nothing = (None,) * len(node.next_functions)
    found = [nothing if g is None else _backward(node, output_nr, g) for g in own]
    for at, (child, nr) in enumerate(node.next_functions):
        if child is not None:
            yield from to_leaves(child, nr, [gradients[at] for gradients in found])


def matrix_input(site: Site) -> int | None:
    """The position of the matrix that a site multiplies its rows with; None if there is none."""
    node, name = site.node, site.node.name()
    if name == "AddmmBackward0" and node._saved_alpha == 1:
        at, inputs = 2, node._saved_mat1
    elif name == "MmBackward0":
        at, inputs = 1, node._saved_self
    else:
        return None
    return at if site.layout.dim == 0 and at in site.inputs and inputs is not None else None


def cheaper(site: Site, at: int, incoming: Tensor, parts: Parts) -> bool:
    """Whether a Gram matrix costs less by :func:`gram_of_matrix` than from the gradients.

    It needs a matrix, at this position, that is a parameter or the transpose of one.
    """
    child, _ = site.node.next_functions[at]
    if child.name() == "TBackward0":
        ((child, _),) = child.next_functions
    if not is_leaf(child) or incoming.is_complex():
        return False
    if incoming.dtype not in (torch.float32, torch.float64):
        return False  # the inner products would be rounded
    rows, b = incoming.shape
    a = _inputs(site).shape[1]
    by_rows = rows * rows * (a + b)
    by_gradients = 2 * rows * a * b + parts.n_tasks**2 * a * b
    return rows <= _MOST_ROWS and by_rows < by_gradients


def gram_of_matrix(site: Site, incoming: Tensor, parts: Parts) -> Tensor:
    """``[K, K]``: the inner products of the tasks' gradients on a matrix, from those of rows."""
    rows, inputs = parts.rows(incoming, site.layout), parts.rows(_inputs(site), site.layout)
    per_row = rows[0].numel() // rows.shape[-1]
    rows, inputs = rows.flatten(0, -2), inputs.flatten(0, -2)
    products = torch.mm(rows, rows.t()).mul_(torch.mm(inputs, inputs.t()))
    # Sum over the rows of one task along one side, then along the other.
    for _ in range(2):
        wide = products.new_zeros(parts.n_tasks, products.shape[1], dtype=torch.float64)
        for k, (start, end) in enumerate(parts):
            if start < end:
                here = products[start * per_row : end * per_row]
                torch.sum(here, 0, dtype=torch.float64, out=wide[k])
        products = wide.t()
    return products.to(incoming.dtype)


def _inputs(site: Site) -> Tensor:
    """The rows that a site multiplies with a matrix."""
    node = site.node
    found: Tensor = node._saved_self if node.name() == "MmBackward0" else node._saved_mat1
    return found


def _backward(node: Any, output_nr: int, gradient: Tensor) -> Sequence[Tensor | None]:
    """The gradients on all inputs of a node, from that on one of its outputs."""
    given = [
        gradient
        if at == output_nr
        else torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        for at, meta in enumerate(node._input_metadata)
    ]
    # A torch.autograd.Function of the user's own is called by another name.
    found = node.apply(*given) if isinstance(node, BackwardCFunction) else node(*given)
    fitting = []
    for made, (child, nr) in zip(
        found if isinstance(found, tuple) else (found,), node.next_functions, strict=True
    ):
        # As the engine does: a node may leave it to the engine to sum over what was broadcast.
        if made is not None and child is not None and made.shape != (shape := _shape(child, nr)):
            made = made.sum_to_size(shape)
        fitting.append(made)
    return fitting


def _by_masks(site: Site, incoming: Tensor, parts: Parts, inputs: Sequence[int]) -> _Found:
    """For any node: its own backward pass for each task, with zeros for the rows of the others."""
    dim, inner = site.layout
    size = incoming.shape[dim]
    row = torch.arange(size, device=incoming.device) // inner % parts.n_rows
    shape = [size if d == dim else 1 for d in range(incoming.dim())]
    task = parts.task_of_row[row].view(shape)
    found: dict[int, Own] = {at: [] for at in inputs}
    for k, (start, end) in enumerate(parts):
        gradients: Any = [None] * len(site.node.next_functions)
        if start < end:
            gradients = _backward(site.node, 0, torch.where(task == k, incoming, 0))
        for at, own in found.items():
            own.append(gradients[at])
    yield from found.items()


def _each(rows: Tensor, parts: Parts, of_task: Callable[[Tensor], Tensor]) -> Own:
    """A function of the rows of each task."""
    return [None if start == end else of_task(rows[start:end]) for start, end in parts]


def _sums(rows: Tensor, parts: Parts, n_kept: int) -> Own:
    """The sums of each task over all but the last dimensions."""
    dims = tuple(range(rows.dim() - n_kept))
    return _each(rows, parts, lambda own: own.sum(dims))


def _shape(node: Any, output_nr: int) -> tuple[int, ...]:
    """The shape of what a node has computed, or of a leaf."""
    if is_leaf(node):
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[output_nr].shape)


def _matrix(site: Site, rows: Tensor, parts: Parts) -> Own:
    """The gradients on a matrix ``[a, b]``, laid out as its transpose, which nn.Linear holds."""
    inputs = parts.rows(_inputs(site), site.layout)
    a, b = inputs.shape[-1], rows.shape[-1]
    made = rows.new_empty(parts.n_tasks, b, a)
    own: Own = []
    for k, (start, end) in enumerate(parts):
        if start == end:
            own.append(None)
        else:
            left, right = rows[start:end].reshape(-1, b), inputs[start:end].reshape(-1, a)
            own.append(torch.mm(left.t(), right, out=made[k]).t())
    return own


def _addmm(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    node = site.node
    if site.layout.dim != 0:
        return
    rows = parts.rows(incoming, site.layout)
    if matrix_input(site) == 2:
        yield 2, _matrix(site, rows, parts)
    is_vector = _shape(*node.next_functions[0]) == incoming.shape[1:] if 0 in site.inputs else False
    if is_vector and node._saved_beta == 1:
        yield 0, _sums(rows, parts, 1)


def _mm(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    if matrix_input(site) == 1:
        yield 1, _matrix(site, parts.rows(incoming, site.layout), parts)


def _convolution(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    node, layout = site.node, site.layout
    if layout.dim != 0:
        return
    rows = parts.rows(incoming, layout)
    inputs = parts.rows(node._saved_input, layout)
    wanted = [False, 1 in site.inputs, 2 in site.inputs]
    found: dict[int, Own] = {at: [] for at in site.inputs}
    for start, end in parts:
        gradients: Any = (None, None, None)
        if start < end:
            gradients = torch.ops.aten.convolution_backward(
                rows[start:end].flatten(0, 2),
                inputs[start:end].flatten(0, 2),
                node._saved_weight,
                [incoming.shape[1]] if wanted[2] else None,
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


def _embedding(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    node = site.node
    indices = node._saved_indices
    if node._saved_scale_grad_by_freq or node._saved_sparse or site.layout.dim >= indices.dim():
        return
    padding = node._saved_padding_idx
    padding -= 2**64 if padding >= 2**63 else 0  # torch shows -1, which is none, as unsigned
    rows, indices = parts.rows(incoming, site.layout), parts.rows(indices, site.layout)
    own: Own = []
    for start, end in parts:
        if start == end:
            own.append(None)
            continue
        own.append(
            torch.ops.aten.embedding_dense_backward(
                rows[start:end].flatten(0, -2),
                indices[start:end].flatten(),
                node._saved_weight_sym_argsize_0,
                padding,
                False,
            )
        )
    yield 0, own


def _layer_norm(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    node, layout = site.node, site.layout
    n_normalised = len(node._saved_normalized_shape)
    if layout.dim >= incoming.dim() - n_normalised:
        return
    if 1 in site.inputs:
        normal = (node._saved_input - node._saved_result1) * node._saved_result2
        yield 1, _sums(parts.rows(incoming * normal, layout), parts, n_normalised)
    if 2 in site.inputs:
        yield 2, _sums(parts.rows(incoming, layout), parts, n_normalised)


def _group_norm(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    node, layout = site.node, site.layout
    if layout.dim != 0:
        return
    n, channels = incoming.shape[:2]
    of_group = (n, node._saved_group, -1)
    flat = incoming.reshape(n, channels, -1)
    if 1 in site.inputs:
        mean, scale = node._saved_result1.view(of_group), node._saved_result2.view(of_group)
        normal = (node._saved_input.reshape(of_group) - mean) * scale
        product = (flat * normal.reshape(flat.shape)).sum(2)
        yield 1, _sums(parts.rows(product, layout), parts, 1)
    if 2 in site.inputs:
        yield 2, _sums(parts.rows(flat.sum(2), layout), parts, 1)


def _broadcast(site: Site, product: Tensor, parts: Parts, at: int) -> _Found:
    """The gradients on a parameter that is the same for all rows, from those on each row."""
    shape = _shape(*site.node.next_functions[at])
    dim = site.layout.dim
    own_dim = dim - (product.dim() - len(shape))  # where the parameter would have its rows
    if own_dim < 0 or shape[own_dim] == 1:
        rows = parts.rows(product, site.layout).sum((dim + 1, dim + 2)).unsqueeze(dim + 1)
        yield at, _each(rows, parts, lambda own: own.sum(0).sum_to_size(shape))


def _add(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    for at in site.inputs:
        if at == 0 or site.node._saved_alpha == 1:
            yield from _broadcast(site, incoming, parts, at)


def _mul(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    if len(site.inputs) > 1:
        return
    (at,) = site.inputs
    factor = site.node._saved_other if at == 0 else site.node._saved_self
    if isinstance(factor, Tensor):
        yield from _broadcast(site, incoming * factor, parts, at)


def _expand(site: Site, incoming: Tensor, parts: Parts) -> _Found:
    yield from _broadcast(site, incoming, parts, 0)


_RULES: dict[str, Callable[[Site, Tensor, Parts], _Found]] = {
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
