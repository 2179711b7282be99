"""What a batch costs besides model, loss, backward and optimizer: K = 11 tasks in M = 3 groups.

All of it: dealing the groups out, replaying the random state, reading and checking the losses,
summing them, the affinity update, and the clustering. The peer is scikit-learn's clustering alone,
on the same matrix.
"""

import itertools
import warnings

import numpy as np
import torch
from sklearn.cluster import AffinityPropagation

import taskgroup as tg
from benchmarks.test_scaling import know

TASKS = [f"task{k}" for k in range(11)]
GOAL = 1 / 0.15
PEER = "scikit-learn, clustering alone"


def affinity_of_three_groups():
    """An affinity, float32 [11, 11], that clusters into groups of 4, 4 and 3."""
    labels = np.repeat([0, 1, 2], [4, 4, 3])
    rng = np.random.default_rng(0)
    matrix = np.where(labels[:, None] == labels, 0.5, -0.2) + 0.1 * rng.standard_normal((11, 11))
    np.fill_diagonal(matrix, 1)
    return torch.tensor(1e-3 * matrix, dtype=torch.float32)


def batch_of(kind, device):
    """One batch of a loop whose losses are ready-made, and its TaskGroups."""
    groups = tg.TaskGroups(TASKS, warmup=0, affinity=tg.ProximalAffinity(decay=1e-12))
    know(groups, affinity_of_three_groups())
    # Losses of four forwards, so that every step shows an effect.
    rng = np.random.default_rng(1)
    stacked = [
        torch.tensor(rng.uniform(0.5, 1.5, 11), dtype=torch.float32, device=device).requires_grad_()
        for _ in range(4)
    ]
    losses = [
        dict(zip(TASKS, values.unbind(), strict=True)) if kind == "dict" else values
        for values in stacked
    ]
    forwards = itertools.cycle(losses)

    def batch():
        for group in groups:
            group.loss(next(forwards))

    batch()
    return batch, groups


def test_cost_of_a_batch(record, device):
    batches = {kind: batch_of(kind, device) for kind in ("dict", "stacked")}
    ratio = affinity_of_three_groups().double().numpy()
    ratio = ratio / ratio.diagonal()
    similarity = (ratio + ratio.T) / 2
    peer = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)
    sides = {kind: batch for kind, (batch, _) in batches.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        least = record.least_seconds({**sides, PEER: lambda: peer.fit(similarity)})
    for kind, (_, groups) in batches.items():
        assert len(groups.partition) == 3
        op = f"batch of 3 groups, {kind} losses"
        record.add(op, 11, least[kind], {PEER: least[PEER]}, goals={PEER: GOAL})
