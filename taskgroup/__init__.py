"""Selective task group updates for multi-task learning in PyTorch.

Tasks are updated group by group inside every batch, and the groups are learned while training::

    import taskgroup as tg

    groups = tg.TaskGroups(["depth", "normal", "edges"], warmup=100)

    for images, labels in loader:
        for group in groups:
            losses = criterion(model(images), labels)
            optimizer.zero_grad()
            group.loss(losses).backward()
            optimizer.step()
"""

from taskgroup import checkpoint, methods, ops
from taskgroup.affinity import GradientAffinity, ProximalAffinity
from taskgroup.clustering import (
    AffinityPropagation,
    Exhaustive,
    GraphColoring,
    Heterogeneous,
    KMeans,
    Spectral,
)
from taskgroup.gradients import (
    conflicts,
    pareto_stationarity,
    streaming_task_gram,
    task_gradients,
)
from taskgroup.grouping import Fixed, Grouping, RandomGroups, Singletons, Together
from taskgroup.lookahead import lookahead_affinity
from taskgroup.metrics import delta_m
from taskgroup.modules import MultiTaskModel
from taskgroup.ops import (
    affinity_propagation,
    affinity_update_,
    combine,
    gram_affinity_update_,
    task_gram,
)
from taskgroup.schedule import Group, TaskGroups
from taskgroup.statistics import statistics_once
from taskgroup.task_heads import BatchedHeads

__all__ = [
    "AffinityPropagation",
    "BatchedHeads",
    "Exhaustive",
    "Fixed",
    "GradientAffinity",
    "GraphColoring",
    "Group",
    "Grouping",
    "Heterogeneous",
    "KMeans",
    "MultiTaskModel",
    "ProximalAffinity",
    "RandomGroups",
    "Singletons",
    "Spectral",
    "TaskGroups",
    "Together",
    "affinity_propagation",
    "affinity_update_",
    "checkpoint",
    "combine",
    "conflicts",
    "delta_m",
    "gram_affinity_update_",
    "lookahead_affinity",
    "methods",
    "ops",
    "pareto_stationarity",
    "statistics_once",
    "streaming_task_gram",
    "task_gradients",
    "task_gram",
]

__version__ = "0.1.0"
