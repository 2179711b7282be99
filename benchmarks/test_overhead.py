"""What a batch costs besides model, loss, backward and optimizer: K = 11 tasks in M = 3 groups.

All of it: dealing the groups out, replaying the random state, reading and checking the losses,
summing them, the affinity update, and the clustering. The peer is scikit-learn's clustering alone,
on the same matrix.
"""

import itertools
import time
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import AffinityPropagation

import taskgroup as tg

TASKS = [f"task{k}" for k in range(11)]
GOAL = 0.15


def affinity_of_three_groups():
    """An affinity, float32 [11, 11], that clusters into groups of 4, 4 and 3."""
    labels = np.repeat([0, 1, 2], [4, 4, 3])
    rng = np.random.default_rng(0)
    matrix = np.where(labels[:, None] == labels, 0.5, -0.2) + 0.1 * rng.standard_normal((11, 11))
    np.fill_diagonal(matrix, 1)
    return torch.tensor(1e-3 * matrix, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["dict", "stacked"])
def test_cost_of_a_batch(benchmark, capsys, kind):
    benchmark.group = "overhead, K = 11, M = 3"
    groups = tg.TaskGroups(TASKS, warmup=0, affinity=tg.ProximalAffinity(decay=1e-12))
    groups.affinity.matrix.copy_(affinity_of_three_groups())
    # Losses of four forwards, so that every step shows an effect.
    rng = np.random.default_rng(1)
    stacked = [torch.tensor(rng.uniform(0.5, 1.5, 11)).float().requires_grad_() for _ in range(4)]
    losses = [
        dict(zip(TASKS, values.unbind(), strict=True)) if kind == "dict" else values
        for values in stacked
    ]
    forwards = itertools.cycle(losses)

    def batch():
        for group in groups:
            group.loss(next(forwards))

    batch()  # the round that warm-up always has
    ratio = groups.affinity.matrix.double().numpy()
    ratio = ratio / ratio.diagonal()
    similarity = (ratio + ratio.T) / 2
    peer = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)

    def least(rounds):
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            peer.fit(similarity)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = least(50)
        benchmark(batch)
        theirs = min(theirs, least(50))
    assert len(groups.partition) == 3
    if benchmark.stats is None:  # --benchmark-disable
        return
    ours = benchmark.stats.stats.min
    benchmark.extra_info["share of scikit-learn's clustering"] = ours / theirs
    with capsys.disabled():
        print(
            f"\n{kind} losses: {ours * 1e6:.0f} µs a batch, scikit-learn's clustering alone "
            f"{theirs * 1e6:.0f} µs: {ours / theirs:.3f} of it; goal {GOAL}"
        )
