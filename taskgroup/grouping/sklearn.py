"""Groupings that use the clustering algorithms of scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgroup._arguments import whole_number
from taskgroup.grouping.clustering import Clustering, Floats, Mask

__all__ = ["KMeans", "Spectral"]


class _ScikitLearn(Clustering):
    """A clustering by scikit-learn into a given number of groups."""

    def __init__(self, m: int, seed: int = 0) -> None:
        name = type(self).__name__
        self.m = whole_number(f"m of {name}", m, at_least=1)
        try:  # so that the user sees the error at once; not kept, as modules cannot be pickled
            import sklearn.cluster  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{name} needs scikit-learn; install it with: pip install 'taskgroup[compare]'"
            ) from error
        self.seed = whole_number("seed", seed, at_least=0)

    def _cluster(self, similarity: Floats, known: Mask | None) -> npt.NDArray[Any]:
        if self.m >= len(similarity):
            return np.arange(len(similarity))
        with warnings.catch_warnings():
            # scikit-learn warns about tasks that are equal or not connected. They are grouped all
            # the same, and a training run should not repeat the warning in every batch.
            warnings.simplefilter("ignore")
            labels = self._fit(similarity)
        return np.unique(labels, return_inverse=True)[1]

    def _fit(self, similarity: Floats) -> Any:
        """Return labels of the tasks, numbered in any way."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(m={self.m}, seed={self.seed})"


class KMeans(_ScikitLearn):
    """Clusters the tasks by k-means on the rows of their normalised affinity.

    Tasks with similar effects on all tasks share a group. Uses scikit-learn's ``KMeans`` (extra
    ``compare``) and takes the best of ten starts. There are always ``m`` groups, even if the
    affinity shows no clusters.

    Args:
        m: the number of groups for the tasks that have a self-affinity, at most the number of these
            tasks. Other tasks get groups of their own in addition.
        seed: the seed of the starts. It is the same in every call, so equal matrices give equal
            groups.

    Raises:
        ValueError: if ``m`` is below 1.
        ImportError: if scikit-learn is not installed.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> KMeans(2)(matrix).unique(return_counts=True)[1].sort().values
        tensor([1, 2])
    """

    def _fit(self, similarity: Floats) -> Any:
        from sklearn.cluster import KMeans as Model

        return Model(self.m, n_init=10, random_state=self.seed).fit_predict(similarity)


class Spectral(_ScikitLearn):
    r"""Clusters the tasks by the spectrum of the graph of their affinity.

    The weight of an edge is :math:`(\operatorname{clamp}(X_{ik}, -1, 1) + 1) / 2`: 1 between tasks
    that help each other as much as themselves, 0 between tasks in full conflict. Uses
    scikit-learn's ``SpectralClustering`` (extra ``compare``; Shi & Malik, "Normalized Cuts and
    Image Segmentation", PAMI 2000). There are always ``m`` groups, even if the affinity shows no
    clusters.

    Args:
        m: the number of groups for the tasks that have a self-affinity, at most the number of these
            tasks. Other tasks get groups of their own in addition.
        seed: the seed of the starts. It is the same in every call, so equal matrices give equal
            groups.

    Raises:
        ValueError: if ``m`` is below 1.
        ImportError: if scikit-learn is not installed.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
        >>> Spectral(2)(matrix).unique(return_counts=True)[1].sort().values
        tensor([1, 2])
    """

    def _fit(self, similarity: Floats) -> Any:
        from sklearn.cluster import SpectralClustering as Model

        model = Model(self.m, affinity="precomputed", n_init=10, random_state=self.seed)
        return model.fit_predict((similarity.clip(-1, 1) + 1) / 2)
