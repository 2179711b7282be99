"""Methods that look at the gradient of every task: their passes, and what they all share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.amp import GradScaler

from taskgroup.gradients.through_grad import hooks_held
from taskgroup.methods.method import JointMethod, enabled, torch_as_it_comes
from taskgroup.ops.combine import combine
from taskgroup.ops.task_gram import task_gram

__all__ = ["GradientMethod", "Gradients", "GramMethod", "targets"]

Gradients: TypeAlias = list[list[Tensor | None]]  # [K] tasks of [T] parameters


class NoWeightsError(RuntimeError):
    """A method's solver found no weights for the gradients of a batch."""


class GradientMethod(JointMethod):
    """A method that needs the gradients of all tasks: base of those in gradient space.

    One backward pass per task. The heads' gradients add up as they would for the sum of the losses:
    a head gets exactly that of its own loss.
    """

    _requires: ClassVar[tuple[str, ...]] = ("torchjd",)

    def backward(
        self, losses: Mapping[str, Tensor] | Tensor, scaler: GradScaler | None = None
    ) -> Tensor:
        """Add to the gradients of the shared parameters and the heads, as the method says.

        The gradients of the shared parameters stay as they were if anything fails; the heads' may
        have been added to.

        Args:
            losses: as for every method.
            scaler: likewise.

        Returns:
            The weights ``[K]`` of the tasks, without a graph, on the device of the losses; ones if
            all gradients on the shared parameters are zero, NaN if a scaler is to skip the batch.

        Raises:
            ValueError: if a task is unknown or missing, or its loss is not a scalar with a graph.
            FloatingPointError: if a task's gradient is not finite and there is no scaler, which
                would skip the batch.
            NoWeightsError: if a solver finds no weights; the batch can be skipped.
            RuntimeError: if the model was compiled so that its backward pass can run only once.
        """
        scaler = enabled(scaler)
        scalars = self._read(losses)
        # Through a stacked tensor every pass comes to all heads: their hooks are to wait as well.
        with hooks_held(scalars, self._shared, search=isinstance(losses, Tensor)) as run_hooks:
            scaled = scalars if scaler is None else list(scaler.scale(scalars))
            found = self._passes(scaled)
        with torch.no_grad():
            columns = [_Column(own) for own in zip(*found, strict=True)]
            gradients = _apart([list(own) for own in zip(*(c.plain for c in columns), strict=True)])
            if any(g is not None for own in gradients for g in own):
                weights = self._merge(gradients, None if scaler is None else scaler.get_scale())
            else:
                weights = _ones(len(scalars))
            # The combination lies where _merge was told to write it.
            for parameter, column, target in zip(
                self._shared, columns, targets(gradients), strict=True
            ):
                if target is not None:
                    _add(column.restored(target), parameter)
        run_hooks()
        return weights.to(scalars[0].device, non_blocking=True)

    def _merge(self, gradients: Gradients, scale: float | None) -> Tensor:
        """Write the combination over :func:`targets` of the gradients; the weights ``[K]``.

        Args:
            gradients: ``[K][T]``, dense and real.
            scale: what they are multiplied by; None without a scaler.
        """
        raise NotImplementedError

    def _passes(self, scalars: Sequence[Tensor]) -> Gradients:
        """The gradients ``[K][T]`` on the shared parameters, whose ``.grad`` stays as it was.

        Each is the very tensor that autograd made, taken away from the parameter.
        """
        before = [parameter.grad for parameter in self._shared]
        gradients: Gradients = []
        try:
            for k, loss in enumerate(scalars):
                for parameter in self._shared:
                    parameter.grad = None
                loss.backward(retain_graph=k < len(scalars) - 1)
                gradients.append([parameter.grad for parameter in self._shared])
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise RuntimeError(
                    "The compiled model frees its buffers in its first backward pass, and "
                    f"{type(self).__name__} takes one per task: set "
                    "torch._functorch.config.donated_buffer = False before the model is compiled."
                ) from error
            raise
        finally:
            for parameter, gradient in zip(self._shared, before, strict=True):
                parameter.grad = gradient
        return gradients


class GramMethod(GradientMethod):
    """A method that needs the gradients' inner products alone, with a weighting of TorchJD's.

    Two passes over the gradients, :func:`taskgroup.task_gram` and :func:`taskgroup.combine`, the
    second into one of them; in between K x K numbers on the host.
    """

    _weighting: Callable[[Tensor], Tensor]

    def _merge(self, gradients: Gradients, scale: float | None) -> Tensor:
        gram = task_gram(gradients)
        host = gram.cpu()
        if scale is not None:
            # Not every method weighs scaled gradients as it does plain ones.
            host = (host.double() / scale / scale).to(host.dtype)
        finite = host.diagonal().isfinite()
        if finite.all():
            weights = self._checked(host)
        elif scale is not None:
            # The squares may overflow where the gradients do not: NaN is seen by the scaler, and
            # what a method remembers is left alone.
            weights = torch.full((len(host),), torch.nan, dtype=host.dtype, device="cpu")
        else:
            names = [task for task, good in zip(self._tasks, finite, strict=True) if not good]
            raise FloatingPointError(
                f"The gradient of {', '.join(map(repr, names))} on the shared parameters is not "
                "finite, or its square overflows: skip this batch, and look at the loss. With a "
                "GradScaler call backward(losses, scaler=scaler), which lets it skip the batch."
            )
        weights = weights.to(gram.dtype).to(gram.device, non_blocking=True)
        combine(gradients, weights, out=targets(gradients))
        return weights

    def _checked(self, gram: Tensor) -> Tensor:
        """The weights, or an error: never a silent fallback to equal ones."""
        if not gram.any():
            return _ones(len(gram))  # nothing to weigh, and solvers divide by zero
        name = type(self).__name__
        try:
            with torch_as_it_comes():
                weights = self._weigh(gram)
        except Exception as error:  # each solver has its own
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
        """From the Gram matrix ``[K, K]`` on the host to the weights ``[K]``."""
        return self._weighting(gram.double())


def targets(gradients: Gradients) -> list[Tensor | None]:
    """Where the combination is written: over the first gradient of each parameter."""
    columns = zip(*gradients, strict=True)
    return [next((g for g in column if g is not None), None) for column in columns]


class _Column:
    """The gradients of K tasks on one parameter as dense, real tensors, and the way back.

    Of sparse gradients (COO) the plain ones hold the entries that any of the tasks has.
    """

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self._complex = False
        self._index: Tensor | None = None
        there = [gradient for gradient in gradients if gradient is not None]
        if any(gradient.layout == torch.sparse_coo for gradient in there):
            if all(gradient.layout == torch.sparse_coo for gradient in there):
                there = self._compact([gradient.coalesce() for gradient in there])
            else:  # a weight that is an embedding for one task and a matrix for another
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
        """The combination of the plain gradients as the parameter's gradient."""
        if self._complex:
            combination = torch.view_as_complex(combination)
        if self._index is not None:
            combination = torch.sparse_coo_tensor(
                self._index, combination, self._shape, is_coalesced=True, check_invariants=False
            )
        return combination


def _apart(gradients: Gradients) -> Gradients:
    """The same gradients, of which those to be written over share their memory with no other.

    Autograd may hand out two views of one tensor: for a and b in a.view(-1) + b.view(-1), say.
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
        parameter.grad = gradient + parameter.grad  # torch adds no dense tensor to a sparse one
    else:
        parameter.grad += gradient


def _ones(n_tasks: int) -> Tensor:
    return torch.ones(n_tasks, dtype=torch.float32, device="cpu")
