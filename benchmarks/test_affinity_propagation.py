"""Clustering, side by side with scikit-learn's.

Times include everything the Python face does, from a float32 tensor to labels. The least of many
rounds is compared: whatever else the machine does only adds to a time, and adds most to the longer.
"""

import time
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import AffinityPropagation

from taskgroup import ops

# What the C++ is held to; the reference is here to be looked at.
GOAL = {11: 30, 200: 5}


def affinity_like(n_tasks):
    """A symmetric matrix with planted groups of about four tasks and ones on the diagonal."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, max(2, n_tasks // 4), n_tasks)
    matrix = (group[:, None] == group[None, :]) * 0.5 - 0.2
    matrix = matrix + 0.3 * rng.standard_normal((n_tasks, n_tasks))
    matrix = np.clip((matrix + matrix.T) / 2, -1, 1).astype(np.float32)
    np.fill_diagonal(matrix, 1)
    return matrix


def least_seconds(function, rounds):
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize("n_tasks", list(GOAL))
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_affinity_propagation(benchmark, capsys, backend, n_tasks):
    benchmark.group = f"affinity_propagation, K = {n_tasks}"
    similarity = affinity_like(n_tasks)
    tensor = torch.from_numpy(similarity)
    peer = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)
    wide = similarity.astype(np.float64)

    with ops.use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error")  # a peer that does not converge is no peer
        # The peer before and after, lest the machine's change of pace flatter either.
        theirs = least_seconds(lambda: peer.fit(wide), 50)
        labels = benchmark(ops.affinity_propagation, tensor)
        theirs = min(theirs, least_seconds(lambda: peer.fit(wide), 50))

    assert labels.tolist() == peer.labels_.tolist()
    if benchmark.stats is None:  # --benchmark-disable
        return
    ours = benchmark.stats.stats.min
    benchmark.extra_info["times as fast as scikit-learn"] = theirs / ours
    goal = f"; goal {GOAL[n_tasks]}" if backend == "cpp" else ""
    with capsys.disabled():
        print(
            f"\n{backend}, K = {n_tasks}: {ours * 1e6:.0f} µs, scikit-learn {theirs * 1e6:.0f} µs: "
            f"{theirs / ours:.1f} times as fast{goal}"
        )
