"""The gradients of all tasks from one backward pass, where every row belongs to one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from taskgroup._arguments import parameters_of, whole_number
from taskgroup._row_losses import check_row_losses, check_row_tasks
from taskgroup.gradients.per_task import laid_out
from taskgroup.gradients.row_graph import Site, find_sites, incoming, leaves
from taskgroup.gradients.row_rules import (
    Own,
    Parts,
    at_site,
    cheaper,
    gram_of_matrix,
    matrix_input,
    to_leaves,
)
from taskgroup.ops._gradient_list import check_number_of_tasks
from taskgroup.ops._sharded import any_sharded
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
    r"""Compute the gradients of all tasks in one backward pass, where each row has one task.

    With several data sets, domains or partial labels, each row n of a batch has a loss
    :math:`\ell_n` of one task. The loss of task k is the mean (or sum) over its rows
    :math:`R_k`, and for a linear layer with inputs :math:`A` and gradients :math:`B` of its outputs

    .. math::
        g_k = \frac{1}{|R_k|} \sum_{n \in R_k} B_n^\top A_n,

    so the backward pass that gives the gradient of the sum of all losses holds those of every task.
    This takes one backward pass through the activations, and from the rows of each task their
    gradients on the parameters: together about the work of one backward pass, where
    :func:`task_gradients` takes K of them.

    Matrix products (``nn.Linear``, attention), convolutions, embeddings, layer and group norms, and
    parameters that are added to rows or multiplied with them have rules. For every other operation
    its own backward pass runs once for each task. Parameters may be used several times, tied, or
    computed from other parameters (weight norm, LoRA). ``.grad`` is neither read nor written.

    In the first call for a graph, a second backward pass on half of the rows finds how the rows lie
    in every tensor, and checks that no operation mixes them. The gradients of the outputs of all
    layers are held at once, which takes about the memory of the activations. Activation
    checkpointing saves little then: a block is run again for each of its layers.

    Args:
        losses: ``[N]``, the losses of the rows, with a graph in which rows do not affect each
            other. It is kept, as with ``retain_graph``.
        task_of_row: ``[N]`` integers, the task of each row from 0 to K - 1; -1 for a row that does
            not count.
        params: a module, or T different parameters. Frozen ones are skipped.
        n_tasks: K; None is one more than the largest task of the batch, which is read on the host.
        reduction: whether the loss of a task is the ``"mean"`` or the ``"sum"`` over its rows.

    Returns:
        ``[K][T]`` gradients; None if a task has no rows or reaches no parameter, or if the
        parameter is frozen.

    Raises:
        ValueError: if an argument has another shape or value, parameters are sharded or have hooks
            (``register_hook``), or an operation mixes rows, such as BatchNorm in training; the
            message names it.
        TypeError: if ``losses`` is not a tensor.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
        >>> row_task_gradients(layer(x).squeeze(1), torch.tensor([0, 0, 1]), layer)
        [[tensor([[2., 0.]])], [tensor([[0., 1.]])]]
    """
    rows = _Rows(losses, task_of_row, params, n_tasks, reduction)
    result: list[list[Tensor | None]] = [[None] * len(rows.params) for _ in range(rows.n_tasks)]
    for t, own in rows.gradients():
        for k, gradient in enumerate(own):
            result[k][t] = laid_out(gradient, rows.params[t])
    return result


def row_task_gram(
    losses: Tensor,
    task_of_row: Tensor,
    params: nn.Module | Iterable[Tensor],
    n_tasks: int | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""Compute the Gram matrix of the gradients of tasks, where each row has one task.

    The same as ``task_gram(row_task_gradients(...))``, but the gradients of one parameter at a time
    are held. Where it is cheaper (many tasks, few rows), those of a linear layer are not formed at
    all; their inner products follow from those of the rows,

    .. math::
        \langle g_i, g_j \rangle = \sum_{n \in R_i} \sum_{m \in R_j}
        \langle A_n, A_m \rangle \langle B_n, B_m \rangle.

    Args:
        losses: as for :func:`row_task_gradients`.
        task_of_row: as for :func:`row_task_gradients`.
        params: as for :func:`row_task_gradients`.
        n_tasks: as for :func:`row_task_gradients`.
        reduction: as for :func:`row_task_gradients`.

    Returns:
        ``[K, K]``, symmetric; zero for tasks without rows. Of complex gradients it is the real
        part. The dtype is that of :func:`taskgroup.task_gram`.

    Raises:
        ValueError: as :func:`row_task_gradients`, and if no row reaches a parameter.
        TypeError: as :func:`row_task_gradients`.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0]])
        >>> row_task_gram(layer(x).squeeze(1), torch.tensor([0, 0, 1]), layer)
        tensor([[4., 2.],
                [2., 2.]])
    """
    rows = _Rows(losses, task_of_row, params, n_tasks, reduction)
    check_number_of_tasks(rows.n_tasks)
    total: Tensor | None = None
    dtype = torch.float32
    for gram in rows.grams():
        dtype = torch.promote_types(dtype, gram.dtype)
        total = gram.double() if total is None else total + gram
    if total is None:
        raise ValueError("No row reaches any of the parameters: name those the tasks share.")
    return total.to(dtype)


class _Rows:
    """The checked arguments, and what is computed from them."""

    def __init__(
        self,
        losses: Tensor,
        task_of_row: Tensor,
        params: nn.Module | Iterable[Tensor],
        n_tasks: int | None,
        reduction: str,
    ) -> None:
        self._losses, host = check_row_losses(losses, task_of_row)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.params = parameters_of("params", params)
        self._place = {id(parameter): t for t, parameter in enumerate(self.params)}
        if not self.params or len(self._place) < len(self.params):
            raise ValueError(
                "params must name at least one parameter, and each once: pass "
                "list(dict.fromkeys(params))."
            )
        for t, parameter in enumerate(self.params):
            if parameter._backward_hooks:
                raise ValueError(
                    f"Entry {t} of params, of shape {list(parameter.shape)}, has a hook "
                    "(register_hook), which does not run here: remove it, or take the gradients "
                    "one by one, with task_gradients(losses, params)."
                )
        if any_sharded(self.params):
            raise ValueError(
                "Sharded parameters are not in the graph of the losses: take the gradients one by "
                "one, with task_gradients(losses, params)."
            )
        if n_tasks is None:
            n_tasks = max(int(host.max()) + 1, 1)
        self.n_tasks = whole_number("n_tasks", n_tasks, at_least=1)
        check_row_tasks(host, self.n_tasks)
        self._parts = Parts(host, self.n_tasks, losses.device)
        weights = [1.0 if reduction == "sum" or a == b else 1 / (b - a) for a, b in self._parts]
        of_task = torch.tensor([*weights, 0.0], dtype=losses.dtype, device=losses.device)
        self._cotangent = of_task[self._parts.task_of_row]  # -1 is the last one

    def gradients(self) -> Iterator[tuple[int, Own]]:
        """The position of each parameter that any row reaches, and its K gradients."""
        yield from self._found(lambda site, incoming: ())

    def grams(self) -> Iterator[Tensor]:
        """``[K, K]`` matrices whose sum is the Gram matrix."""
        found: list[Tensor] = []

        def direct(site: Site, incoming: Tensor) -> Sequence[int]:
            at = matrix_input(site)
            if at is None or not cheaper(site, at, incoming, self._parts):
                return ()
            (leaf,) = leaves(site.node.next_functions[at][0])  # cheaper() has made sure
            if self._uses[self._place[id(leaf)]] > 1:
                return ()  # the gradients of its uses have to be added first
            found.append(gram_of_matrix(site, incoming, self._parts))
            return (at,)

        for _, own in self._found(direct):
            yield task_gram([[_real(gradient)] for gradient in own])
            yield from found
            found.clear()
        yield from found

    def _found(self, direct: Callable[[Site, Tensor], Sequence[int]]) -> Iterator[tuple[int, Own]]:
        """As ``gradients``, less the inputs of sites that ``direct`` has dealt with."""
        sites = find_sites(self._losses, [p for p in self.params if p.requires_grad])
        given = incoming(self._losses, self._cotangent, [site.node for site in sites])
        self._uses = [0] * len(self.params)
        for site in sites:
            for at in site.inputs:
                for leaf in leaves(site.node.next_functions[at][0]):
                    self._uses[self._place[id(leaf)]] += 1
        left = list(self._uses)
        kept: dict[int, Own] = {}
        for number, site in enumerate(sites):
            gradient, given[number] = given[number], None
            if gradient is None:
                continue
            with torch.no_grad():
                done = direct(site, gradient)
                site = site._replace(inputs=tuple(at for at in site.inputs if at not in done))
                made = list(self._at_leaves(site, gradient))
            del gradient
            for t, own in made:
                left[t] -= 1
                if t in kept:
                    own = _sum(kept.pop(t), own)
                if left[t]:
                    kept[t] = own
                else:
                    yield t, own
            del made
        yield from kept.items()

    def _at_leaves(self, site: Site, gradient: Tensor) -> Iterator[tuple[int, Own]]:
        for at, own in at_site(site, gradient, self._parts):
            child, output_nr = site.node.next_functions[at]
            for leaf, reached in to_leaves(child, output_nr, own):
                yield self._place[id(leaf)], reached


def _real(gradient: Tensor | None) -> Tensor | None:
    """The real and imaginary parts of a complex gradient count as two numbers."""
    if gradient is None or not gradient.is_complex():
        return gradient
    return torch.view_as_real(gradient.resolve_conj())


def _sum(one: Own, other: Own) -> Own:
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]
