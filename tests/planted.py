"""Quadratic tasks in known clusters, for tests of whether the clusters are found."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

import taskgroup as tg

SPREAD = 0.6
NOISE = 0.05


class Planted:
    """K quadratic losses ``|x - target_k|^2 / 2`` whose targets lie in planted clusters.

    The cosine between the centres of two clusters is ``cosine``. Every target is its centre plus
    ``SPREAD`` times a random direction, scaled to length 1. Each batch adds noise with a standard
    deviation of ``NOISE``.
    """

    def __init__(self, sizes: list[int], cosine: float, seed: int, dim: int = 32) -> None:
        rng = np.random.default_rng(seed)
        clusters = len(sizes)
        gram = np.full((clusters, clusters), cosine) + (1 - cosine) * np.eye(clusters)
        basis = np.linalg.qr(rng.standard_normal((dim, clusters)))[0]
        centres = np.linalg.cholesky(gram + 1e-12 * np.eye(clusters)) @ basis.T
        targets = []
        for cluster, size in enumerate(sizes):
            for _ in range(size):
                direction = rng.standard_normal(dim)
                targets.append(centres[cluster] + SPREAD * direction / np.linalg.norm(direction))
        target = np.array(targets)
        self.target = torch.tensor(target / np.linalg.norm(target, axis=1, keepdims=True))
        self.tasks = [f"task{k}" for k in range(sum(sizes))]
        edges = np.cumsum([0, *sizes])
        self.partition = {tuple(self.tasks[a:b]) for a, b in itertools.pairwise(edges)}
        self.x = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self) -> Tensor:
        """The noisy targets of one batch, ``[K, dim]``."""
        noise = torch.randn(self.target.shape, generator=self._generator, dtype=torch.float64)
        return self.target + NOISE * noise

    def losses(self, batch: Tensor) -> Tensor:
        return 0.5 * (self.x - batch).square().sum(1)

    def train(self, groups: tg.TaskGroups, batches: int, lr: float = 1e-3) -> list[set]:
        """Train with plain gradient steps, and return the partition after each batch."""
        partitions = []
        for _ in range(batches):
            batch = self.batch()
            for group in groups:
                (gradient,) = torch.autograd.grad(group.loss(self.losses(batch)), self.x)
                self.x.data.sub_(lr * gradient)
            partitions.append(set(groups.partition))
        return partitions
