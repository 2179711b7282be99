"""Base classes of the methods that combine the gradients of single tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.amp import GradScaler

from taskgroup._graph import graph_leaves
from taskgroup._losses import Losses
from taskgroup._row_losses import means_of_rows
from taskgroup.gradients.row_tasks import row_task_gradients
from taskgroup.gradients.through_grad import backward_passes, hooks_held
from taskgroup.methods.method import JointMethod, enabled, torch_defaults
from taskgroup.ops.combine import combine
from taskgroup.ops.task_gram import task_gram

__all__ = ["GradientMethod", "Gradients", "GramMethod", "targets"]

Gradients: TypeAlias = list[list[Tensor | None]]  # [K] tasks of [T] parameters


class NoWeightsError(RuntimeError):
    """The solver of a method found no weights for the gradients of a batch."""


class GradientMethod(JointMethod):
    """Base class of the methods that need the gradients of all tasks, one backward pass each.

    The gradients of the heads add up as for the sum of the losses: each head gets exactly the
    gradient of its own loss.
    """

    _requires: ClassVar[tuple[str, ...]] = ("torchjd",)

    def backward(
        self, losses: Losses, scaler: GradScaler | None = None, *, rows: Tensor | None = None
    ) -> Tensor:
        """Add to ``.grad`` as :meth:`JointMethod.backward` does.

        If anything fails, the gradients of the shared parameters do not change; those of the heads
        may have been added to. The weights are ones if all gradients on the shared parameters are
        zero, and NaN if the scaler is going to skip the batch.

        Where each row of the batch belongs to one task (several data sets, domains, partial
        labels), pass the losses of the rows and ``rows``: then two backward passes take the place
        of K (see :func:`taskgroup.row_task_gradients`). The loss of a task is the mean over its
        rows.

        Args:
            losses: as for :meth:`JointMethod.backward`; with ``rows``, one tensor ``[N]``.
            scaler: as for :meth:`JointMethod.backward`.
            rows: ``[N]`` integers, the task of each row by its position; every task has a row. -1
                is a row that does not count.

        Raises:
            ValueError: if a task is unknown or missing, or its loss is not a scalar with a graph;
                with ``rows``, also if rows are mixed, as in BatchNorm.
            FloatingPointError: if the gradient of a task is not finite and there is no scaler to
                skip the batch.
            NoWeightsError: if the solver finds no weights; the batch can be skipped.
            RuntimeError: if the model was compiled so that its backward pass can run only once.
        """
        scaler = enabled(scaler)
        if rows is None:
            scalars = self._read(losses)
        else:
            scalars = self._read(means_of_rows(losses, rows, self._tasks))
        self._tell(scalars)
        # With a stacked tensor every pass reaches all heads, so their hooks have to wait as well.
        stacked = isinstance(losses, Tensor)
        with hooks_held(scalars, self._shared, search=stacked) as run_hooks:
            if rows is None:
                scaled = scalars if scaler is None else list(scaler.scale(scalars))
                found = backward_passes(scaled, self._shared)
            else:
                assert isinstance(losses, Tensor)
                own = losses if scaler is None else scaler.scale(losses)
                found = row_task_gradients(own, rows, self._shared, len(self._tasks))
                total = torch.stack(scalars).sum()
                _backward_to_others(total if scaler is None else scaler.scale(total), self._shared)
        with torch.no_grad():
            columns = [_Column(own) for own in zip(*found, strict=True)]
            gradients = _apart([list(own) for own in zip(*(c.plain for c in columns), strict=True)])
            if any(g is not None for own in gradients for g in own):
                weights = self._merge(gradients, None if scaler is None else scaler.get_scale())
            else:
                weights = _ones(len(scalars))
            # _merge has written the combination to the targets.
            for parameter, column, target in zip(
                self._shared, columns, targets(gradients), strict=True
            ):
                if target is not None:
                    _add(column.restored(target), parameter)
        run_hooks()
        return weights.to(scalars[0].device, non_blocking=True)

    def _merge(self, gradients: Gradients, scale: float | None) -> Tensor:
        """Write the combination to :func:`targets` of the gradients; return the weights ``[K]``.

        The gradients ``[K][T]`` are dense, real, and multiplied by ``scale``; None for no scaler.
        """
        raise NotImplementedError


class GramMethod(GradientMethod):
    """Base class of the methods that need only the inner products of the gradients.

    :func:`taskgroup.task_gram` reads all gradients once, a weighting turns the ``[K, K]`` matrix
    into weights on the host, and :func:`taskgroup.combine` writes over the first gradients.
    """

    _weighting: Callable[[Tensor], Tensor]

    def _merge(self, gradients: Gradients, scale: float | None) -> Tensor:
        gram = task_gram(gradients)
        host = gram.cpu()
        if scale is not None:
            # Some methods give scaled gradients other weights than plain ones.
            host = (host.double() / scale / scale).to(host.dtype)
        finite = host.diagonal().isfinite()
        if finite.all():
            weights = self._checked(host)
        elif scale is not None:
            # The squares may overflow even if the gradients are finite: NaN makes the scaler skip
            # the batch, and the memory of the method does not change.
            weights = torch.full((len(host),), torch.nan, dtype=host.dtype, device="cpu")
        else:
            names = [task for task, good in zip(self._tasks, finite, strict=True) if not good]
            raise FloatingPointError(
                f"The gradient of {', '.join(map(repr, names))} on the shared parameters is not "
                "finite, or its square overflows: skip this batch, and check the loss. With a "
                "GradScaler, call backward(losses, scaler=scaler), so that it skips the batch."
            )
        weights = weights.to(gram.dtype).to(gram.device, non_blocking=True)
        combine(gradients, weights, out=targets(gradients))
        return weights

    def _checked(self, gram: Tensor) -> Tensor:
        """The weights, or an error: never silently equal weights instead."""
        if not gram.any():
            return _ones(len(gram))  # solvers would divide by zero
        name = type(self).__name__
        try:
            with torch_defaults():
                weights = self._weigh(gram)
        except Exception as error:  # each solver raises its own
            raise NoWeightsError(
                f"{name} found no weights for these gradients ({error}): skip this batch, or try "
                "another method."
            ) from error
        if not weights.isfinite().all():
            raise NoWeightsError(
                f"{name} found weights that are not finite, {weights.tolist()}: skip this batch, "
                "or try another method."
            )
        return weights

    def _weigh(self, gram: Tensor) -> Tensor:
        """Compute the weights ``[K]`` from the Gram matrix ``[K, K]`` on the host."""
        return self._weighting(self._prepared(gram))

    @staticmethod
    def _prepared(gram: Tensor) -> Tensor:
        """The matrix that the weighting is called with."""
        return gram.double()


def targets(gradients: Gradients) -> list[Tensor | None]:
    """The tensors that the combination is written to: the first gradient of each parameter."""
    columns = zip(*gradients, strict=True)
    return [next((g for g in column if g is not None), None) for column in columns]


class _Column:
    """Turns the gradients of K tasks on one parameter into dense, real tensors, and back.

    For sparse gradients (COO), the dense tensors hold the entries that any of the tasks has.
    """

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self._complex = False
        self._index: Tensor | None = None
        there = [gradient for gradient in gradients if gradient is not None]
        if any(gradient.layout == torch.sparse_coo for gradient in there):
            if all(gradient.layout == torch.sparse_coo for gradient in there):
                there = self._compact([gradient.coalesce() for gradient in there])
            else:  # the weight is an embedding for one task and a matrix for another
                there = [gradient.to_dense() for gradient in there]
        if any(gradient.is_complex() for gradient in there):
            self._complex = True
            there = [torch.view_as_real(gradient.resolve_conj()) for gradient in there]
        filled = iter(there)
        self.plain: list[Tensor | None] = [
            None if gradient is None else next(filled) for gradient in gradients
        ]

    def _compact(self, gradients: list[Tensor]) -> list[Tensor]:
        self._shape = gradients[0].shape
        sizes = self._shape[: gradients[0].sparse_dim()]
        entries = []  # of each gradient, counted in row-major order
        for gradient in gradients:
            entry = torch.zeros_like(gradient.indices()[0])
            for index, size in zip(gradient.indices(), sizes, strict=True):
                entry = entry * size + index
            entries.append(entry)
        union, where = torch.unique(torch.cat(entries), return_inverse=True)
        self._index = torch.stack(torch.unravel_index(union, sizes))
        compact = []
        for gradient, rows in zip(gradients, where.split([len(e) for e in entries]), strict=True):
            values = gradient.values()
            zeros = values.new_zeros(len(union), *values.shape[1:])
            compact.append(zeros.index_copy_(0, rows, values))
        return compact

    def restored(self, combination: Tensor) -> Tensor:
        """Turn the combination of the plain gradients into the gradient of the parameter."""
        if self._complex:
            combination = torch.view_as_complex(combination)
        if self._index is not None:
            combination = torch.sparse_coo_tensor(
                self._index, combination, self._shape, is_coalesced=True, check_invariants=False
            )
        return combination


def _apart(gradients: Gradients) -> Gradients:
    """Copy each target that shares its memory with another gradient, since it is written over.

    Autograd may return two views of one tensor, as for a and b in a.view(-1) + b.view(-1).
    """
    memory = Counter(
        g.untyped_storage().data_ptr() for own in gradients for g in own if g is not None
    )
    for t, target in enumerate(targets(gradients)):
        if target is not None and memory[target.untyped_storage().data_ptr()] > 1:
            k = next(k for k, own in enumerate(gradients) if own[t] is target)
            gradients[k][t] = target.clone()
    return gradients


def _add(gradient: Tensor, parameter: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        # torch cannot add a dense tensor to a sparse one in place.
        parameter.grad = gradient + parameter.grad
    else:
        parameter.grad += gradient


def _backward_to_others(loss: Tensor, shared: Sequence[Tensor]) -> None:
    """Add to ``.grad`` of all leaves but the shared parameters."""
    known = {id(parameter) for parameter in shared}
    others = [leaf for leaf in graph_leaves([loss]) if id(leaf) not in known]
    if others:
        loss.backward(inputs=others)


def _ones(n_tasks: int) -> Tensor:
    return torch.ones(n_tasks, dtype=torch.float32, device="cpu")
