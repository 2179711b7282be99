"""Methods that look at the gradient of every task: their passes, and what they all share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from taskgroup.methods.method import JointMethod
from taskgroup.ops import combine, task_gram

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

    def backward(self, losses: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Add to the gradients of the shared parameters and the heads, as the method says.

        The gradients of the shared parameters stay as they were if anything fails; the heads' may
        have been added to.

        Args:
            losses: as for every method.

        Returns:
            The weights ``[K]`` of the tasks, without a graph, on the device of the losses; ones if
            all gradients on the shared parameters are zero.

        Raises:
            ValueError: if a task is unknown or missing, or its loss is not a scalar with a graph.
            FloatingPointError: if a task's gradient is not finite.
            NoWeightsError: if a solver finds no weights; the batch can be skipped.
            RuntimeError: if the model was compiled so that its backward pass can run only once.
        """
        scalars = self._read(losses)
        gradients = self._passes(scalars)
        with torch.no_grad():
            reached = any(g is not None for own in gradients for g in own)
            weights = self._merge(gradients) if reached else torch.ones(len(scalars))
            # The combination lies where _merge was told to write it.
            for parameter, found in zip(self._shared, targets(gradients), strict=True):
                if found is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = found
                else:
                    parameter.grad += found
        return weights.to(scalars[0].device)

    def _merge(self, gradients: Gradients) -> Tensor:
        """Write the combination over :func:`targets` of the gradients; the weights ``[K]``."""
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
        return _apart(gradients)


class GramMethod(GradientMethod):
    """A method that needs the gradients' inner products alone, with a weighting of TorchJD's.

    Two passes over the gradients, :func:`taskgroup.task_gram` and :func:`taskgroup.combine`, the
    second into one of them; in between K x K numbers on the host.
    """

    _weighting: Callable[[Tensor], Tensor]

    def _merge(self, gradients: Gradients) -> Tensor:
        gram = task_gram(gradients)
        host = gram.cpu()
        finite = host.diagonal().isfinite()
        if not finite.all():
            names = [task for task, good in zip(self._tasks, finite, strict=True) if not good]
            raise FloatingPointError(
                f"The gradient of {', '.join(map(repr, names))} on the shared parameters is not "
                "finite, or its square overflows: skip this batch, and look at the loss."
            )
        weights = self._checked(host).to(gram.dtype).to(gram.device, non_blocking=True)
        combine(gradients, weights, out=targets(gradients))
        return weights

    def _checked(self, gram: Tensor) -> Tensor:
        """The weights, or an error: never a silent fallback to equal ones."""
        if not gram.any():
            return torch.ones(len(gram))  # nothing to weigh, and solvers divide by zero
        name = type(self).__name__
        try:
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
