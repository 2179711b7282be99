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

from taskgroup import checkpoint, methods, ops, recording
from taskgroup._delta_m import delta_m
from taskgroup._version import __version__ as __version__
from taskgroup.affinity.base import Affinity
from taskgroup.affinity.gradient import GradientAffinity
from taskgroup.affinity.lookahead import lookahead_affinity
from taskgroup.affinity.proximal import ProximalAffinity
from taskgroup.costs.measure import step_costs
from taskgroup.costs.prediction import StepCosts
from taskgroup.gradients.analysis import conflicts, pareto_stationarity
from taskgroup.gradients.per_task import task_gradients
from taskgroup.gradients.row_tasks import row_task_gradients, row_task_gram
from taskgroup.gradients.streaming import streaming_task_gram
from taskgroup.grouping.base import Grouping
from taskgroup.grouping.coloring import GraphColoring
from taskgroup.grouping.exhaustive import Exhaustive
from taskgroup.grouping.fixed import Fixed, RandomGroups, Singletons, Together
from taskgroup.grouping.propagation import AffinityPropagation, Heterogeneous
from taskgroup.grouping.sklearn import KMeans, Spectral
from taskgroup.loop.group import Group
from taskgroup.loop.schedule import TaskGroups
from taskgroup.nn.batched import BatchedHeads
from taskgroup.nn.model import MultiTaskModel
from taskgroup.nn.norm import statistics_once
from taskgroup.ops.affinity_propagation import affinity_propagation
from taskgroup.ops.affinity_update import affinity_update_
from taskgroup.ops.combine import combine
from taskgroup.ops.gram_affinity_update import gram_affinity_update_
from taskgroup.ops.task_gram import task_gram
from taskgroup.recording.recorder import Recorder

__all__ = [
    "Affinity",
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
    "Recorder",
    "Singletons",
    "Spectral",
    "StepCosts",
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
    "recording",
    "row_task_gradients",
    "row_task_gram",
    "statistics_once",
    "step_costs",
    "streaming_task_gram",
    "task_gradients",
    "task_gram",
]
