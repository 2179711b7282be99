"""Affinity propagation, compared with scikit-learn.

Times include everything that the Python function does, from a float32 tensor to labels. Clustering
runs on the host on every device.
"""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import AffinityPropagation

import taskgroup as tg

# Goals of the C++ code; the reference has none.
GOAL = {11: 30, 200: 5}
PEER = "scikit-learn"


def affinity_like(n_tasks):
    """A symmetric matrix with planted groups of about four tasks and ones on the diagonal."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, max(2, n_tasks // 4), n_tasks)
    matrix = (group[:, None] == group[None, :]) * 0.5 - 0.2
    matrix = matrix + 0.3 * rng.standard_normal((n_tasks, n_tasks))
    matrix = np.clip((matrix + matrix.T) / 2, -1, 1).astype(np.float32)
    np.fill_diagonal(matrix, 1)
    return matrix


@pytest.mark.parametrize("n_tasks", list(GOAL))
def test_affinity_propagation(record, n_tasks):
    similarity = affinity_like(n_tasks)
    tensor = torch.from_numpy(similarity)
    wide = similarity.astype(np.float64)
    peer = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)

    def ours():
        return tg.affinity_propagation(tensor)

    def reference():
        with tg.ops.use_backend("reference"):
            return tg.affinity_propagation(tensor)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a peer that does not converge is no peer
        expected = peer.fit(wide).labels_.tolist()
        assert ours().tolist() == reference().tolist() == expected
        least = record.least_seconds(
            {"ours": ours, "reference": reference, PEER: lambda: peer.fit(wide)}
        )
    peers = {PEER: least[PEER]}
    record.add("affinity_propagation", n_tasks, least["ours"], peers, goals={PEER: GOAL[n_tasks]})
    record.add("affinity_propagation, reference", n_tasks, least["reference"], peers)
