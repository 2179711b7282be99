"""Other ways to compute with the gradients of K tasks, ``[K][T]``: the peers of our ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Gradients = Sequence[Sequence[Tensor]]


def ready_rows(gradients: Gradients) -> Tensor:
    """The rows of :func:`concatenated`, without any memory besides them."""
    n_elements = sum(gradient.numel() for gradient in gradients[0])
    rows = gradients[0][0].new_empty(len(gradients), n_elements)
    for row, own in zip(rows, gradients, strict=True):
        torch.cat([gradient.flatten() for gradient in own], out=row)
    return rows


def concatenated(gradients: Gradients) -> Tensor:
    """One row per task, ``[K, P]``."""
    return torch.stack([torch.cat([gradient.flatten() for gradient in own]) for own in gradients])


def pairwise_gram(gradients: Gradients) -> Tensor:
    """The Gram matrix ``[K, K]``, pair by pair and parameter by parameter."""
    n_tasks = len(gradients)
    gram = gradients[0][0].new_zeros(n_tasks, n_tasks)
    for i in range(n_tasks):
        for j in range(i, n_tasks):
            pairs = zip(gradients[i], gradients[j], strict=True)
            gram[i, j] = gram[j, i] = sum((a * b).sum() for a, b in pairs)
    return gram


def row_gram(rows: Tensor) -> Tensor:
    """The Gram matrix ``[K, K]`` of a ready matrix ``[K, P]``."""
    return rows @ rows.t()


def summed(gradients: Gradients, weights: Tensor) -> list[Tensor]:
    """The weighted sum of the gradients, parameter by parameter and task by task."""
    return [
        sum(weight * own for weight, own in zip(weights, of_tasks, strict=True))
        for of_tasks in zip(*gradients, strict=True)
    ]


def row_combination(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """The weighted sum ``[P]`` of the rows of a ready matrix ``[K, P]``."""
    return torch.mv(rows.t(), weights.to(rows.dtype), out=out)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector ``[P]`` in the shapes of the parameters."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def updated_affinity(matrix: Tensor, gram: Tensor, losses: Tensor, decay: float) -> Tensor:
    """Update the affinity in place from a Gram matrix, to first order and for a step of size 1."""
    return matrix.lerp_(gram.float() / losses, decay)


TORCHJD = {"TorchJD, concatenating": False, "TorchJD, per parameter": True}  # the value is lean


def torchjd_sides(
    gradients: Gradients, weights: Tensor, combines: bool, room: float
) -> dict[str, Callable[[], object] | str]:
    """TorchJD's two ways to the Gram matrix (and the combination), or why they are not run.

    Args:
        gradients: ``[K][T]``.
        weights: ``[K]``, the weights of the combination.
        combines: whether to compute the combination as well.
        room: the bytes that may be used, including the gradients and a copy of them.
    """
    n_bytes = sum(gradient.nbytes for own in gradients for gradient in own)
    if 5 * n_bytes > room:
        return dict.fromkeys(TORCHJD, "no room")
    try:
        torchjd = TorchJD(gradients, weights)
    except ImportError:
        return dict.fromkeys(TORCHJD, "not installed")
    run = torchjd.gram_and_combination if combines else torchjd.gram
    return {name: partial(run, lean=lean) for name, lean in TORCHJD.items()}


class TorchJD:
    """TorchJD's way from the Jacobian to the gradient, through its public functions.

    It keeps the gradients stacked per parameter, in ``parameter.jac``; the time to stack them is
    not counted. ``jac_to_grad`` then concatenates them into one matrix or, if ``lean``, computes a
    Gram matrix for every parameter.

    Args:
        gradients: ``[K][T]``; copied.
        weights: ``[K]``, returned for any Gram matrix.

    Raises:
        ImportError: if TorchJD is not installed.
    """

    def __init__(self, gradients: Gradients, weights: Tensor) -> None:
        from torchjd.aggregation import GramianWeightedAggregator, Weighting
        from torchjd.autojac import jac_to_grad

        class Given(Weighting):
            def forward(self, gram: Tensor, /) -> Tensor:
                return weights.to(gram.dtype)

        class Stop(Weighting):
            def forward(self, gram: Tensor, /) -> Tensor:
                raise _GramReady(gram)

        self._jac_to_grad = jac_to_grad
        self._given = GramianWeightedAggregator(Given())
        self._stop = GramianWeightedAggregator(Stop())
        self._parameters = []
        for of_tasks in zip(*gradients, strict=True):
            parameter = torch.empty_like(of_tasks[0]).requires_grad_()
            parameter.jac = torch.stack(of_tasks)
            self._parameters.append(parameter)

    def gram(self, lean: bool) -> Tensor:
        """The Gram matrix; the computation stops there."""
        try:
            self._run(self._stop, lean)
        except _GramReady as ready:
            return ready.gram
        raise AssertionError("TorchJD did not ask for weights")

    def gram_and_combination(self, lean: bool) -> list[Tensor]:
        """The Gram matrix, and the combination of the gradients with the given weights."""
        for parameter in self._parameters:
            parameter.grad = None
        self._run(self._given, lean)
        return [parameter.grad for parameter in self._parameters]

    def _run(self, aggregator: object, lean: bool) -> None:
        self._jac_to_grad(
            self._parameters, aggregator, retain_jac=True, optimize_gramian_computation=lean
        )


class _GramReady(Exception):  # noqa: N818 (not an error)
    def __init__(self, gram: Tensor) -> None:
        super().__init__()
        self.gram = gram
