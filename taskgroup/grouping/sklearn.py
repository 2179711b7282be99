"""Groupings by the clustering of scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgroup._arguments import whole_number
from taskgroup.grouping.clustering import _Clustering, _Floats, _Mask

__all__ = ["KMeans", "Spectral"]


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
        >>> import torch
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
        >>> import torch
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
