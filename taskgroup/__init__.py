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

import importlib
from typing import TYPE_CHECKING, Any

from taskgroup import ops
from taskgroup._version import __version__ as __version__
from taskgroup.affinity.base import Affinity
from taskgroup.affinity.proximal import ProximalAffinity
from taskgroup.grouping.base import Grouping
from taskgroup.grouping.coloring import GraphColoring
from taskgroup.grouping.fixed import Fixed, RandomGroups, Singletons, Together
from taskgroup.grouping.propagation import AffinityPropagation, Heterogeneous
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

# What the loop does without is imported when it is first used: it takes 40% of the time.
if TYPE_CHECKING:
    from taskgroup import checkpoint, methods, recording
    from taskgroup._delta_m import delta_m
    from taskgroup.affinity.gradient import GradientAffinity
    from taskgroup.affinity.lookahead import lookahead_affinity
    from taskgroup.costs.measure import step_costs
    from taskgroup.costs.prediction import StepCosts
    from taskgroup.gradients.analysis import conflicts, pareto_stationarity
    from taskgroup.gradients.per_task import task_gradients
    from taskgroup.gradients.row_tasks import row_task_gradients, row_task_gram
    from taskgroup.gradients.streaming import streaming_task_gram
    from taskgroup.grouping.exhaustive import Exhaustive
    from taskgroup.grouping.sklearn import KMeans, Spectral
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

_HOMES = {
    "checkpoint": "checkpoint",
    "methods": "methods",
    "recording": "recording",
    "delta_m": "_delta_m",
    "GradientAffinity": "affinity.gradient",
    "lookahead_affinity": "affinity.lookahead",
    "step_costs": "costs.measure",
    "StepCosts": "costs.prediction",
    "conflicts": "gradients.analysis",
    "pareto_stationarity": "gradients.analysis",
    "task_gradients": "gradients.per_task",
    "row_task_gradients": "gradients.row_tasks",
    "row_task_gram": "gradients.row_tasks",
    "streaming_task_gram": "gradients.streaming",
    "Exhaustive": "grouping.exhaustive",
    "KMeans": "grouping.sklearn",
    "Spectral": "grouping.sklearn",
    "Recorder": "recording.recorder",
}

if not TYPE_CHECKING:  # which would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        if name != _HOMES[name]:  # if it is, the import has set it
            globals()[name] = getattr(module, name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
