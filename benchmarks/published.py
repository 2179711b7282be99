"""The tracking and grouping of the published code, as a peer to measure against.

A reimplementation of what that code does, including its defects. It is as fast as the published
code: one Python loop over the entries, with two synchronisations for each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from sklearn.cluster import AffinityPropagation
from torch import Tensor

NOT_SEEN = -1.0  # the loss before the first step of a batch
TRIES = 10


class PublishedTaskAffinity:
    """The affinity between K tasks and the groups found in it, as in the published code.

    It differs from the method in the paper:

    - It credits a change of the losses to the group about to be stepped, although the step before
      caused the change. The first group of a batch gets no credit, and the last step is never seen.
    - It normalises each column for the clustering, but not the entries below the diagonal.
    - A task that never improved by its own step has zero on the diagonal, so the clustering raises.
    - If the clustering does not converge, it raises ``convergence_iter``, not the iterations.

    The published training also logs K * K numbers per batch; this class does not.

    Args:
        tasks: names of the K tasks.
        groups: the first groups, ``{name: tasks}``.
        decay: weight of a new observation.

    Attributes:
        affinity_map: float32 ``[K, K]``; row s is the effect of task s, column t that on task t.
        groups: the current groups, ``{name: tasks}``; you may set it.
    """

    def __init__(
        self, tasks: Sequence[str], groups: Mapping[str, Sequence[str]], decay: float
    ) -> None:
        self.tasks = list(tasks)
        self.groups = {name: list(members) for name, members in groups.items()}
        self.decay = decay
        self.affinity_map = torch.zeros(len(tasks), len(tasks))
        self._row = {task: k for k, task in enumerate(tasks)}
        self.init_pre_loss()

    def init_pre_loss(self) -> None:
        """Start a batch, in which no loss has been seen yet."""
        self._before = dict.fromkeys(self.tasks, NOT_SEEN)

    def order(self) -> list[str]:
        """The names of the groups in random order; a single group is named twice."""
        names = list(self.groups)
        random.shuffle(names)
        return names * 2 if len(names) == 1 else names

    def update(self, group_name: str, losses: Mapping[str, Tensor]) -> None:
        """Update the affinity with the scalar losses of all tasks before the step on a group."""
        group = self.groups[group_name]
        after = dict(self._before)
        for s in group:
            for t in self.tasks:
                # Every entry reads its losses again: 2 * |S| * K synchronisations.
                after[s] = losses[s].item()
                after[t] = losses[t].item()
                if not self._before[t] > 0:
                    continue
                change_t = (1 - after[t] / self._before[t]) / len(group)
                observed = change_t
                if t in group:
                    if not self._before[s] > 0:
                        continue
                    change_s = (1 - after[s] / self._before[s]) / len(group)
                    if t == s:
                        if change_t < 0:
                            continue
                    elif change_t * change_s < 0:
                        observed = -max(change_t, change_s)
                i, k = self._row[s], self._row[t]
                self.affinity_map[i, k] = (1 - self.decay) * self.affinity_map[
                    i, k
                ] + self.decay * observed
        self._before = after

    def similarity(self) -> Tensor:
        """The matrix ``[K, K]`` that is clustered.

        Each column is divided in place by its diagonal entry. That entry is one afterwards, so the
        entries below it are divided by one.
        """
        ratio = self.affinity_map.clone()
        for k in range(len(self.tasks)):
            ratio[: k + 1, k] /= ratio[k, k].item()
        return (ratio + ratio.T) / 2

    def next_groups(self) -> dict[str, list[str]]:
        """Cluster the tasks into new groups; keep the groups if no exemplar is found.

        Raises:
            ValueError: from scikit-learn, if a diagonal entry of the affinity is zero.
        """
        similarity = self.similarity().numpy()
        convergence_iter = 50
        for _ in range(TRIES):
            found = AffinityPropagation(
                preference=None, affinity="precomputed", convergence_iter=convergence_iter
            ).fit(similarity)
            if len(found.cluster_centers_indices_) > 0:
                groups: dict[str, list[str]] = {}
                for task, label in zip(self.tasks, found.labels_, strict=True):
                    groups.setdefault(f"group{label}", []).append(task)
                self.groups = groups
                break
            convergence_iter += 100
        return self.groups
