r"""Groupings that are learned: from what the tasks do to each other to who shares a step.

All of them look at the affinity alike. A task whose self-affinity :math:`A_{kk}` is not positive
keeps a group of its own. For the others the affinity is made comparable over tasks and symmetric,

.. math::
    X_{ik} = A_{ik} / A_{kk}, \qquad X \leftarrow (X + X^\top) / 2

so that 1 is a task's effect on itself. A pair of which neither entry is finite was never observed
(:class:`TaskGroups` passes NaN for such entries) and is no reason to share a group: it counts as
the least of the known similarities, or as -1 if that is lower, and a task without any known pair
keeps a group of its own. Where one entry of a pair is finite, the other counts as 0.

What the classes differ in is what they make of :math:`X`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taskgroup.arguments import whole_number
from taskgroup.grouping import Grouping
from taskgroup.ops.affinity_propagation import propagate
from taskgroup.ops.normalised_affinity import normalised_affinity

__all__ = [
    "AffinityPropagation",
    "Exhaustive",
    "GraphColoring",
    "Heterogeneous",
    "KMeans",
    "Spectral",
]

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.intp]
_Mask = npt.NDArray[np.bool_]


class _Clustering(Grouping):
    """Sets the tasks apart of which nothing is known, and clusters the others."""

    takes_nan = True

    def __call__(self, matrix: Tensor) -> Tensor | None:
        """Labels 0 to M-1, int64 ``[K]``, for an affinity ``[K, K]``; None keeps the partition."""
        affinity = matrix.detach().cpu().contiguous()
        if affinity.dtype not in (torch.float32, torch.float64):
            affinity = affinity.double()  # of bfloat16, say, which NumPy does not have
        tasks, similarity = normalised_affinity(affinity.numpy())
        finite, known = np.isfinite(affinity.numpy()), None
        if not finite.all():
            finite = finite[np.ix_(tasks, tasks)]
            known = finite | finite.T
            connected = known.sum(1) > 1  # with another task than itself
            tasks, known = tasks[connected], known[np.ix_(connected, connected)]
            similarity = similarity[np.ix_(connected, connected)]
            if known.all():
                known = None
            else:
                similarity = np.where(known, similarity, min(-1.0, similarity[known].min()))
        if len(tasks) < 2:
            return torch.arange(len(affinity), dtype=torch.int64, device="cpu")
        clusters = self._cluster(similarity, known)
        if clusters is None or len(tasks) == len(affinity):
            return None if clusters is None else torch.from_numpy(clusters)
        labels = np.arange(len(affinity))
        labels[tasks] = len(labels) + clusters  # apart from the labels of the rest
        return torch.from_numpy(np.unique(labels, return_inverse=True)[1])

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any] | None:
        """Labels 0 to M-1, int64 ``[n]``, of n > 1 tasks; None keeps the partition.

        Args:
            similarity: ``[n, n]``, the normalised affinity.
            known: ``[n, n]``, symmetric: the pairs that were observed, and the diagonal; None where
                all were.
        """
        raise NotImplementedError


class AffinityPropagation(_Clustering):
    r"""Clusters the tasks by affinity propagation; the paper's choice and the default.

    Tasks whose self-affinity :math:`A_{kk}` is not positive keep a group of their own. For the
    others the affinity is made comparable over tasks and symmetric,
    :math:`X_{ik} = A_{ik} / A_{kk}`, :math:`X \leftarrow (X + X^\top) / 2`, and clustered (Frey &
    Dueck, Science 2007) with the median of :math:`X` as preference. Up to three tasks, where the
    median says nothing, the preference is 0: tasks join where their affinity is positive. Where it
    does not converge the partition is kept.

    Tasks that were never observed together, as in data sets that have no task in common, are
    clustered apart: of the parts that no known pair connects, each for itself.

    Args:
        preference: self-similarity of every task; more gives more groups. None is the rule above.
        damping: in [0.5, 1), the weight of the old messages.
        max_iter: iterations after which the partition is kept as it was.
        convergence_iter: iterations without a change of exemplars that count as converged.

    Raises:
        ValueError: if ``damping``, ``max_iter`` or ``convergence_iter`` is out of its range.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> AffinityPropagation()(matrix)
        tensor([0, 0, 1])
    """

    def __init__(
        self,
        preference: float | None = None,
        damping: float = 0.5,
        max_iter: int = 200,
        convergence_iter: int = 50,
    ) -> None:
        if preference is not None and not math.isfinite(preference):
            raise ValueError(f"preference must be finite, got {preference!r}.")
        if not 0.5 <= damping < 1.0:
            raise ValueError(f"damping must be in [0.5, 1), got {damping!r}.")
        self.preference = preference
        self.damping = damping
        self.max_iter = whole_number("max_iter", max_iter, at_least=1)
        self.convergence_iter = whole_number("convergence_iter", convergence_iter, at_least=1)

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any] | None:
        if known is None:
            return self._propagate(similarity, known)
        labels = np.zeros(len(similarity), dtype=np.int64)
        for part in _parts(known):
            found = self._propagate(similarity[np.ix_(part, part)], known[np.ix_(part, part)])
            if found is None:
                return None
            labels[part] = found + (labels.max() + 1)
        return np.unique(labels, return_inverse=True)[1]

    def _propagate(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any] | None:
        """Labels 0 to M-1 for tasks that known pairs connect."""
        n, preference = len(similarity), self.preference
        if preference is None and n <= 3:
            # The least number above 0: an affinity of exactly 0 is no reason to join.
            preference = np.finfo(np.float64).tiny
        elif preference is None and known is not None:
            preference = float(np.median(similarity[known]))
        preferences = None if preference is None else np.full(n, preference)
        return propagate(
            similarity, preferences, self.damping, self.max_iter, self.convergence_iter
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(preference={self.preference}, damping={self.damping})"


def _parts(known: _Mask) -> list[_Integers]:
    """The connected parts of the graph whose edges are the known pairs, as positions."""
    part = np.arange(len(known))
    for _ in range(len(known)):  # each takes the lowest number among its neighbours
        lowest = np.where(known, part, len(known)).min(1)
        if np.array_equal(lowest, part):
            break
        part = lowest
    return [np.flatnonzero(part == number) for number in np.unique(part)]


class Heterogeneous(AffinityPropagation):
    """Groups of tasks that conflict; a control for :class:`AffinityPropagation`.

    Finds the same clusters, and deals the members of each out over the groups, so that tasks that
    serve each other are kept apart. There are as many groups as clusters: a batch costs the same.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Heterogeneous()(matrix)      # tasks 0 and 1 agree
        tensor([0, 1, 0])
    """

    def _propagate(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any] | None:
        clusters = super()._propagate(similarity, known)
        if clusters is None:
            return None
        groups = np.empty_like(clusters)
        groups[clusters.argsort(kind="stable")] = np.arange(len(clusters)) % (clusters.max() + 1)
        return groups


class GraphColoring(_Clustering):
    r"""Keeps apart the pairs that conflict, and no others: colours the graph of the conflicts.

    Tasks i and k conflict where their normalised affinity :math:`X_{ik}` is below ``threshold``.
    The colouring is greedy (Welsh & Powell, The Computer Journal 10, 1967): tasks in the order of
    their number of conflicts, most first, ties by position, each in the first group that holds
    none of its conflicts. A pair that was never observed conflicts, so that it is kept apart.

    SON-GOKU steps on such a colouring of averaged gradients, one colour a batch. That schedule is
    a :class:`GradientAffinity`, whose affinity has the signs of the cosines between gradients, and
    ``groups_per_batch=1`` (with a :class:`ProximalAffinity` the batches that observe take two).

    Args:
        threshold: the normalised affinity below which a pair conflicts; 1 is a task's effect on
            itself. Less gives fewer groups.

    Raises:
        ValueError: if ``threshold`` is not a finite number.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> GraphColoring()(matrix)
        tensor([1, 1, 0])

        One colour a batch:

        >>> import taskgroup as tg
        >>> x = torch.zeros(1, requires_grad=True)
        >>> groups = tg.TaskGroups(
        ...     ["left", "right"], warmup=1, groups_per_batch=1, grouping=GraphColoring(),
        ...     affinity=tg.GradientAffinity([x], decay=0.1),
        ... )
        >>> for batch in range(6):
        ...     for group in groups:
        ...         loss = group.loss(torch.stack([(x + 2).square().sum(), (x - 1).square().sum()]))
        ...         loss.backward()
        ...     assert group.first and group.last
        >>> groups.partition        # they pull apart
        [('left',), ('right',)]
    """

    def __init__(self, threshold: float = 0.0) -> None:
        if not np.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold!r}.")
        self.threshold = threshold

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any]:
        conflict = similarity < self.threshold
        if known is not None:
            conflict |= ~known
        colours = np.full(len(conflict), -1)
        for task in np.argsort(-conflict.sum(1), kind="stable"):
            taken = set(colours[conflict[task]].tolist())
            colours[task] = next(colour for colour in itertools.count() if colour not in taken)
        return colours

    def __repr__(self) -> str:
        return f"GraphColoring(threshold={self.threshold})"


class Exhaustive(_Clustering):
    r"""The best of all partitions into at most so many groups, for up to 14 tasks.

    A group serves each of its tasks by the mean affinity of the others onto it; the partition is
    the one that serves all tasks best together,

    .. math::
        \max_{\mathcal P,\ |\mathcal P| \le M} \; \sum_{S \in \mathcal P,\ |S| > 1} \;
        \sum_{k \in S} \frac{1}{|S| - 1} \sum_{i \in S,\ i \ne k} \frac{A_{ik}}{A_{kk}}

    as in TAG (Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning",
    NeurIPS 2021). A task alone gains nothing and scores 0. The search is exact: dynamic programming
    over the :math:`3^K / 2` pairs of a set of tasks and a group that holds its first task. Of
    partitions that serve equally well, that with fewest groups is taken, then that whose first
    group, then second and so on, is the lowest as a binary number (task k is bit k).

    It is M that makes the groups large. A group of n tasks scores n times its mean affinity, and so
    do, on average, its random splits: of four tasks or more, some split into pairs and triples
    serves them no worse. With more groups than there are clusters, clusters are split by noise.

    Args:
        max_groups: M; groups for the tasks that have a self-affinity, the others come besides.

    Raises:
        ValueError: if ``max_groups`` is below 1 or, once the tasks are known, there are more than
            14.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Exhaustive(max_groups=3)(matrix)
        tensor([0, 0, 1])
    """

    _most_tasks = 14  # 2.4 million pairs

    def __init__(self, max_groups: int) -> None:
        self.max_groups = whole_number("max_groups of Exhaustive", max_groups, at_least=1)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Check that the tasks are not too many to try all partitions."""
        self._check(len(tasks))

    def _check(self, n_tasks: int) -> None:
        if n_tasks > self._most_tasks:
            raise ValueError(
                f"Exhaustive tries all partitions of up to {self._most_tasks} tasks, got "
                f"{n_tasks}; take AffinityPropagation() or another clustering for so many."
            )

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any]:
        n_tasks = len(similarity)
        self._check(n_tasks)
        subsets = _subsets(n_tasks)
        # Summed over a group, the affinities and their symmetric part are the same.
        effect = similarity - np.diag(similarity.diagonal())
        others = np.maximum(subsets.members.sum(1) - 1, 1)
        score = ((subsets.members @ effect) * subsets.members).sum(1) / others
        gain = score[subsets.group]
        best = [np.full(len(score), -np.inf)]  # best[m][tasks]: in at most m groups
        best[0][0] = 0.0
        while len(best) <= self.max_groups:
            following = np.zeros(len(score))
            np.maximum.reduceat(gain + best[-1][subsets.rest], subsets.start, out=following[1:])
            if np.array_equal(following, best[-1]):
                break
            best.append(following)
        # Fewest groups first: sums in another order may differ by rounding.
        most = best[-1][-1] - 1e-12 * n_tasks * np.abs(effect).max()
        groups = next(m for m in range(1, len(best)) if best[m][-1] >= most)

        labels = np.zeros(n_tasks, dtype=np.int64)
        tasks = len(score) - 1
        for m in range(groups, 0, -1):
            if tasks == 0:
                break
            begin = subsets.start[tasks - 1]
            end = subsets.start[tasks] if tasks < len(subsets.start) else None
            chosen = (gain[begin:end] + best[m - 1][subsets.rest[begin:end]]).argmax()
            labels[subsets.members[subsets.group[begin + chosen]] > 0] = groups - m
            tasks = subsets.rest[begin + chosen]
        return labels

    def __repr__(self) -> str:
        return f"Exhaustive(max_groups={self.max_groups})"


class _Subsets(NamedTuple):
    """The sets of n tasks as binary numbers, and every group to take out of each."""

    members: _Floats  # [2^n, n]: 1 where the set holds the task
    # [P], set by set, the groups ascending: those that hold the first task of the set.
    group: _Integers
    rest: _Integers  # [P], the set without the group
    start: _Integers  # [2^n - 1], where each set begins; the empty one has no group


@lru_cache(maxsize=2)
def _subsets(n_tasks: int) -> _Subsets:
    sets = np.arange(2**n_tasks)
    groups = [np.empty(0, dtype=np.intp)]
    for tasks in range(1, len(sets)):
        last = 1 << (tasks.bit_length() - 1)
        without = groups[tasks ^ last]
        joined = np.concatenate([without, without | last])
        groups.append(joined if len(joined) else np.array([last]))
    sizes = np.array([len(group) for group in groups])
    group = np.concatenate(groups)
    return _Subsets(
        members=(sets[:, None] >> np.arange(n_tasks) & 1).astype(np.float64),
        group=group,
        rest=np.repeat(sets, sizes) ^ group,
        start=np.cumsum(sizes)[:-1],
    )


class _ScikitLearn(_Clustering):
    """A clustering of scikit-learn's into a given number of groups."""

    def __init__(self, m: int, seed: int = 0) -> None:
        name = type(self).__name__
        self.m = whole_number(f"m of {name}", m, at_least=1)
        try:  # here, where the user is told at once; not kept, since modules cannot be pickled
            import sklearn.cluster  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{name} needs scikit-learn; install it with: pip install 'taskgroup[compare]'"
            ) from error
        self.seed = seed

    def _cluster(self, similarity: _Floats, known: _Mask | None) -> npt.NDArray[Any]:
        if self.m >= len(similarity):
            return np.arange(len(similarity))
        with warnings.catch_warnings():
            # Of tasks that cannot be told apart or are not connected: they are grouped all the
            # same, and a training run is not the place to hear of it in every batch.
            warnings.simplefilter("ignore")
            labels = self._fit(similarity)
        return np.unique(labels, return_inverse=True)[1]

    def _fit(self, similarity: _Floats) -> npt.NDArray[Any]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(m={self.m}, seed={self.seed})"


class KMeans(_ScikitLearn):
    """Clusters the tasks by k-means on the rows of their normalised affinity.

    Tasks share a group where they have like effects on all tasks. By scikit-learn's ``KMeans``
    (extra ``compare``), the best of ten starts; as many groups as asked for, also where the
    affinity shows none.

    Args:
        m: groups for the tasks that have a self-affinity, the others come besides; as many as
            there are such tasks where these are fewer.
        seed: of the starts, the same at every call: equal matrices give equal groups.

    Raises:
        ValueError: if ``m`` is below 1.
        ImportError: without scikit-learn.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> KMeans(2)(matrix).unique(return_counts=True)[1].sort().values
        tensor([1, 2])
    """

    def _fit(self, similarity: _Floats) -> npt.NDArray[Any]:
        from sklearn.cluster import KMeans as Model

        model = Model(self.m, n_init=10, random_state=self.seed)
        labels: npt.NDArray[Any] = model.fit_predict(similarity)
        return labels


class Spectral(_ScikitLearn):
    r"""Clusters the tasks by the spectrum of the graph that their affinity spans.

    The edges weigh :math:`(\operatorname{clamp}(X_{ik}, -1, 1) + 1) / 2`: 1 between tasks that
    serve each other as themselves, 0 in full conflict. By scikit-learn's ``SpectralClustering``
    (extra ``compare``; Shi & Malik, "Normalized Cuts and Image Segmentation", PAMI 2000); as many
    groups as asked for, also where the affinity shows none.

    Args:
        m: groups for the tasks that have a self-affinity, the others come besides; as many as
            there are such tasks where these are fewer.
        seed: of the starts, the same at every call: equal matrices give equal groups.

    Raises:
        ValueError: if ``m`` is below 1.
        ImportError: without scikit-learn.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Spectral(2)(matrix).unique(return_counts=True)[1].sort().values
        tensor([1, 2])
    """

    def _fit(self, similarity: _Floats) -> npt.NDArray[Any]:
        from sklearn.cluster import SpectralClustering

        model = SpectralClustering(
            self.m, affinity="precomputed", n_init=10, random_state=self.seed
        )
        labels: npt.NDArray[Any] = model.fit_predict((similarity.clip(-1, 1) + 1) / 2)
        return labels
