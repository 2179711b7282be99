"""Analysis of the Gram matrix of gradients: conflicts and Pareto stationarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["conflicts", "pareto_stationarity"]


# The tolerance of pareto_stationarity, relative to the squared length of the longest gradient.
_TOLERANCE = 1e-12


def conflicts(gram: Tensor) -> Tensor:
    r"""Cosines between the gradients of tasks; two tasks conflict if theirs is negative.

    .. math::
        C_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}

    Args:
        gram: ``[K, K]``, as :func:`taskgroup.task_gram` returns it.

    Returns:
        ``[K, K]`` in [-1, 1], with the dtype and device of ``gram``. The diagonal is 1; the cosine
        of a gradient that is zero with any other is 0.

    Raises:
        ValueError: if ``gram`` is not square.

    Example:
        >>> conflicts(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])
    """
    _check_square(gram)
    norm = gram.diagonal().sqrt()
    # Divided twice, since the product of two norms may overflow or underflow even if they do not.
    cosines = (gram / norm[:, None] / norm).clamp(-1, 1)
    cosines = torch.where((norm[:, None] == 0) | (norm == 0), 0.0, cosines)
    return cosines.fill_diagonal_(1.0)


def pareto_stationarity(gram: Tensor) -> Tensor:
    r"""How far the shared parameters are from a Pareto-stationary point.

    .. math::
        \min_{w \ge 0,\ \sum_k w_k = 1} w^\top G\, w
        = \min_w \Bigl\lVert \sum_k w_k g_k \Bigr\rVert^2

    It is zero if some convex combination of the gradients is zero: then no step improves all tasks
    at once. The sequence of group updates converges to such points (Theorem 4 of "Selective Task
    Group Updates for Multi-Task Optimization", ICLR 2025, arXiv 2502.11986). Wolfe's algorithm
    ("Finding the nearest point in a polytope", Mathematical Programming 11, 1976) solves the
    problem exactly, in float64 on the host, which waits for the device.

    Args:
        gram: ``[K, K]``, as :func:`taskgroup.task_gram` returns it.

    Returns:
        A nonnegative scalar with the dtype and device of ``gram``; NaN if ``gram`` is not finite.

    Raises:
        ValueError: if ``gram`` is not square or empty.

    Example:
        >>> pareto_stationarity(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
        tensor(2.)
        >>> pareto_stationarity(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).round(decimals=6)
        tensor(0.)
    """
    _check_square(gram)
    if len(gram) == 0:
        raise ValueError("gram is empty: it needs at least one task.")
    host = gram.detach().double().cpu().numpy()
    if not np.isfinite(host).all():
        return gram.new_full((), torch.nan)
    weights = _least_norm_weights((host + host.T) / 2)
    return gram.new_tensor(max(0.0, float(weights @ host @ weights)))


def _least_norm_weights(gram: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """The weights on the simplex that minimise ``w @ gram @ w``: Wolfe's algorithm."""
    n_tasks = len(gram)
    scale = float(gram.diagonal().max())
    weights = np.zeros(n_tasks)
    weights[gram.diagonal().argmin()] = 1.0
    corral = weights > 0  # the gradients in the combination
    for _ in range(100 * n_tasks):  # it ends by itself, unless rounding makes it cycle
        product = gram @ weights
        entering = int(product.argmin())
        if product[entering] >= weights @ product - _TOLERANCE * scale or corral[entering]:
            break
        corral[entering] = True
        while True:
            # The point of least norm in the affine hull of the corral.
            inside = np.flatnonzero(corral)
            system = np.ones((len(inside) + 1, len(inside) + 1))
            system[0, 0] = 0.0
            system[1:, 1:] = gram[np.ix_(inside, inside)]
            right = np.zeros(len(inside) + 1)
            right[0] = 1.0
            target = np.linalg.lstsq(system, right, rcond=None)[0][1:]
            if (target > 0).all():
                weights[inside] = target
                break
            # Outside the simplex: go as far as possible, and drop the weights that reach zero.
            old = weights[inside]
            shrinking = target <= 0
            ratio = np.full(len(inside), np.inf)
            ratio[shrinking] = old[shrinking] / (old[shrinking] - target[shrinking] + 1e-300)
            step = min(1.0, float(ratio.min()))
            moved = (1 - step) * old + step * target
            moved[ratio.argmin()] = 0.0
            moved[moved < 0] = 0.0
            weights[inside] = moved / moved.sum()
            corral = weights > 0
    return weights


def _check_square(gram: Tensor) -> None:
    if not isinstance(gram, Tensor):
        raise TypeError(
            f"gram takes the tensor [K, K] that task_gram() returns, got a {type(gram).__name__}."
        )
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must have shape [K, K], got {list(gram.shape)}.")
