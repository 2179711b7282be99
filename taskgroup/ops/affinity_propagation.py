"""Clustering by affinity propagation, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskgroup.ops import _backend

Floats = np.ndarray[Any, np.dtype[np.float64]]
Labels = np.ndarray[Any, np.dtype[np.int64]]


def affinity_propagation(
    similarity: Tensor | np.ndarray[Any, Any],
    *,
    preference: float | Sequence[float] | Tensor | np.ndarray[Any, Any] | None = None,
    damping: float = 0.5,
    max_iter: int = 200,
    convergence_iter: int = 50,
) -> Tensor | None:
    r"""Clusters tasks by affinity propagation, without being told the number of clusters.

    Every pair of tasks exchanges two messages: the responsibility :math:`R_{ik}` says how well task
    k would serve as the exemplar of task i, and the availability :math:`A_{ik}` how much the other
    tasks support k as an exemplar. Each message becomes ``damping`` times its old value plus
    ``1 - damping`` times

    .. math::
        R_{ik} \leftarrow S_{ik} - \max_{j \ne k} (A_{ij} + S_{ij})
        \qquad
        A_{ik} \leftarrow \min\Bigl(0,\; R_{kk} +
            \sum_{j \notin \{i, k\}} \max(0, R_{jk})\Bigr)
        \qquad
        A_{kk} \leftarrow \sum_{j \ne k} \max(0, R_{jk})

    until the exemplars, the tasks with :math:`A_{kk} + R_{kk} > 0`, do not change any more (Frey
    and Dueck, "Clustering by Passing Messages Between Data Points", Science 315, 2007). "Selective
    Task Group Updates for Multi-Task Optimization" (ICLR 2025, arXiv:2502.11986) groups its tasks
    in this way.

    The results are those of scikit-learn's ``AffinityPropagation(affinity="precomputed",
    random_state=0)``: the same noise breaks ties, so the labels agree, and no random generator is
    used. If all similarities are equal, and all preferences are, then every task is alone if the
    preference exceeds the similarity; otherwise all tasks are together.

    Args:
        similarity: Similarity :math:`S`, ``[K, K]``, finite, any floating dtype. The diagonal
            counts for the median alone. Not modified. A tensor on a GPU is copied to the host.
        preference: One number, or one for each task: the diagonal of the similarity. The larger the
            preference of a task, the more likely the task is an exemplar. Default: the median of
            ``similarity``.
        damping: The damping factor, in [0.5, 1).
        max_iter: The largest number of iterations; it must exceed ``convergence_iter``, or no
            labels are found.
        convergence_iter: The number of iterations for which the exemplars must not change.

    Returns:
        Labels 0..M-1, an int64 tensor [K] on the CPU, numbered in the order of the exemplars; or
        ``None`` if the messages do not converge.

    Raises:
        ValueError: If ``similarity`` is empty, not square or not finite, or another argument is
            out of range.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.8, -0.3], [0.8, 1.0, -0.4], [-0.3, -0.4, 1.0]])
        >>> affinity_propagation(similarity, preference=0.0)
        tensor([0, 0, 1])
    """
    s = _to_numpy(similarity, "similarity")
    if s.ndim != 2 or s.shape[0] != s.shape[1] or s.shape[0] == 0:
        raise ValueError(f"similarity must have shape [K, K] with K >= 1, got {list(s.shape)}.")
    if not 0.5 <= damping < 1:
        raise ValueError(f"damping must be in [0.5, 1), got {damping}.")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}.")
    if convergence_iter < 1:
        raise ValueError(f"convergence_iter must be at least 1, got {convergence_iter}.")
    p = None if preference is None else _preferences(preference, len(s))
    labels = propagate(s, p, damping, max_iter, convergence_iter)
    return None if labels is None else torch.from_numpy(labels)


def propagate(
    s: Floats, p: Floats | None, damping: float, max_iter: int, convergence_iter: int
) -> Labels | None:
    """:func:`affinity_propagation` of valid arrays, [K, K] and optional preferences [K]."""
    cluster = _backend.choose("cpu", **IMPLEMENTATIONS)
    return cluster(s, p, _noise(len(s)), damping, max_iter, convergence_iter)


def _to_numpy(values: Any, name: str) -> Floats:
    if isinstance(values, Tensor):
        if values.is_complex():
            raise ValueError(f"{name} must be real, got {values.dtype}.")
        values = values.detach().cpu()
        if values.dtype == torch.bfloat16:  # NumPy has no bfloat16
            values = values.float()
        values = values.numpy()
    elif np.iscomplexobj(values):
        raise ValueError(f"{name} must be real, got {np.asarray(values).dtype}.")
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} takes numbers, got {values!r}.") from None


def _preferences(preference: Any, n_tasks: int) -> Floats:
    p = _to_numpy(preference, "preference")
    if p.shape not in ((), (n_tasks,)):
        raise ValueError(
            f"preference must be a number or have shape [{n_tasks}], got {list(p.shape)}."
        )
    if not np.isfinite(p).all():
        raise ValueError("preference must be finite.")
    return np.ascontiguousarray(np.broadcast_to(p, (n_tasks,)))


@lru_cache(maxsize=16)
def _noise(n_tasks: int) -> Floats:
    """The noise that breaks ties; it is constant, so that equal matrices give equal groups."""
    return np.random.RandomState(0).standard_normal((n_tasks, n_tasks))


def _native(*arguments: Any) -> Any:
    return _backend.native.host.affinity_propagation(*arguments)


def _reference(
    s: Floats, p: Floats | None, noise: Floats, damping: float, max_iter: int, convergence_iter: int
) -> Labels | None:
    if not np.isfinite(s).all():
        raise ValueError("similarity must be finite.")
    n_tasks = len(s)
    if p is None:
        p = np.full(n_tasks, np.median(s))
    similarities = s[~np.eye(n_tasks, dtype=bool)]
    if (p == p[0]).all() and (similarities == similarities[:1]).all():
        # The messages would be equal for all tasks: the preference decides.
        alone = p[0] > s[0, -1]
        return np.arange(n_tasks) if alone else np.zeros(n_tasks, dtype=np.int64)

    s = s.copy()
    np.fill_diagonal(s, p)
    limits = np.finfo(np.float64)
    s += (limits.eps * s + 100 * limits.tiny) * noise

    exemplars = _find_exemplars(s, damping, max_iter, convergence_iter)
    if exemplars is None:
        return None
    cluster = _assign(s, exemplars)
    for c in range(len(exemplars)):
        members = np.flatnonzero(cluster == c)
        exemplars[c] = members[s[np.ix_(members, members)].sum(axis=0).argmax()]
    # Labels follow the order of the exemplars, which this refinement may have changed.
    labels: Labels = np.unique(exemplars[_assign(s, exemplars)], return_inverse=True)[1]
    return labels


def _find_exemplars(
    s: Floats, damping: float, max_iter: int, convergence_iter: int
) -> Labels | None:
    r, a = np.zeros_like(s), np.zeros_like(s)
    rows = np.arange(len(s))
    exemplars = np.zeros(len(s), dtype=bool)
    unchanged = 0  # the number of iterations for which the exemplars have been the same
    for iteration in range(max_iter):
        wish = a + s
        favourite = wish.argmax(axis=1)
        rival = np.repeat(wish[rows, favourite][:, None], len(s), axis=1)
        wish[rows, favourite] = -np.inf
        rival[rows, favourite] = wish.max(axis=1)
        r = r * damping + (s - rival) * (1 - damping)

        support = np.maximum(r, 0)
        np.fill_diagonal(support, r.diagonal())
        excess = support - support.sum(axis=0)
        own = excess.diagonal().copy()
        excess = excess.clip(0)
        np.fill_diagonal(excess, own)
        a = a * damping - excess * (1 - damping)

        previous, exemplars = exemplars, a.diagonal() + r.diagonal() > 0
        unchanged = unchanged + 1 if (exemplars == previous).all() else 1
        if min(iteration, unchanged) >= convergence_iter and exemplars.any():
            return np.flatnonzero(exemplars)
    return None


def _assign(s: Floats, exemplars: Labels) -> Labels:
    """The cluster of every task: its most similar exemplar; exemplars are in their own cluster."""
    cluster: Labels = s[:, exemplars].argmax(axis=1)
    cluster[exemplars] = np.arange(len(exemplars))
    return cluster


IMPLEMENTATIONS: dict[str, Callable[..., Labels | None]] = {"cpp": _native, "reference": _reference}
