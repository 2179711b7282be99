"""What the benchmarks of whole batches share: planted groups, ready losses, and a training."""

from __future__ import annotations

import itertools
import time
from functools import cache

import numpy as np
import torch

import taskgroup as tg
from benchmarks.published import PublishedTaskAffinity

DECAY = 1e-12  # so small that the planted clusters do not change


@cache
def planted_affinity(n_tasks, clusters=None):
    """An affinity, float32 ``[K, K]``, with clusters (of four tasks by default), and the labels."""
    labels = np.arange(n_tasks) % (clusters or max(2, n_tasks // 4))
    rng = np.random.default_rng(0)
    matrix = np.where(labels[:, None] == labels, 0.5, -0.2)
    matrix = matrix + 0.05 * rng.standard_normal((n_tasks, n_tasks))
    np.fill_diagonal(matrix, 1)
    return torch.tensor(matrix, dtype=torch.float32), labels


def learned_groups(tasks, clusters=None, **options):
    """TaskGroups that have observed every entry of a planted affinity and find its clusters."""
    matrix, _ = planted_affinity(len(tasks), clusters)
    affinity = {"matrix": matrix, "observed": torch.ones(matrix.shape, dtype=torch.int32)}
    groups = tg.TaskGroups(tasks, warmup=0, affinity=tg.ProximalAffinity(decay=DECAY), **options)
    groups.load_state_dict({**groups.state_dict(), "affinity": affinity})
    return groups


def published_tracking(tasks, clusters=None):
    """The published tracking and clustering, with the same planted affinity."""
    tracking = PublishedTaskAffinity(tasks, {task: [task] for task in tasks}, DECAY)
    tracking.affinity_map.copy_(planted_affinity(len(tasks), clusters)[0])
    return tracking


def ready_losses(tasks, device, stacked=False):
    """An endless iterator over the losses of four forward passes: a dict, or one tensor ``[K]``.

    The four differ, so that every step has an effect.
    """
    rng = np.random.default_rng(1)
    values = torch.tensor(rng.uniform(0.5, 1.5, (4, len(tasks))), dtype=torch.float32)
    forwards = [losses.to(device).requires_grad_() for losses in values]
    if stacked:
        return itertools.cycle(forwards)
    return itertools.cycle(dict(zip(tasks, own.unbind(), strict=True)) for own in forwards)


class Training:
    """A multi-task model, a batch, and Adam; counts the seconds that its steps take.

    Args:
        model: the :class:`taskgroup.MultiTaskModel`.
        inputs: the input of the model.
        losses_of: computes ``{task: loss}`` from ``{task: output}``.
        lr: the learning rate.
        now: the clock, in seconds.
    """

    def __init__(self, model, inputs, losses_of, lr, now=time.perf_counter):
        self.model, self.inputs, self.losses_of, self.now = model, inputs, losses_of, now
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.inside = 0.0  # seconds in model, losses, backward passes and optimizer
        self.steps = 0

    def losses(self, group=None):
        start = self.now()
        losses = self.losses_of(self.model(self.inputs, group=group))
        self.inside += self.now() - start
        return losses

    def step(self, loss):
        start = self.now()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        del loss  # frees the graph, which is part of the step
        self.inside += self.now() - start
        self.steps += 1

    def joint(self):
        """A joint step on all tasks."""
        self.step(torch.stack([*self.losses().values()]).sum())

    def batch(self, groups):
        """A batch of steps on groups, with taskgroup."""
        for group in groups:
            self.step(group.loss(self.losses(group)))

    def by_hand(self, partition):
        """The same steps in a fixed order, without observing or learning anything."""
        heads = self.model.heads
        for members in partition:
            features = self.model.encoder(self.inputs)
            detached = features.detach()
            outputs = {task: heads[task](features) for task in members}
            with torch.no_grad():
                outputs |= {task: heads[task](detached) for task in heads if task not in outputs}
            losses = self.losses_of(outputs)
            self.step(torch.stack([losses[task] for task in members]).sum())
