"""The overhead of a batch besides its steps, on a real model with 11 to 1000 tasks.

The model is the demo's ViT with K linear heads, on batches of 8 images of 64 x 64 pixels. The
groups are learned from a planted affinity that does not change, in every round, or in every tenth
with 1000 tasks. "Outside" means everything that is not the model, the losses, the backward pass or
the optimizer.
"""

import statistics
import time
import warnings

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

import taskgroup as tg
from benchmarks.training import Training, learned_groups, published_tracking
from taskgroup.lab.vision.backbones import ViTFeatures

INSIDE = "without what is outside"
PUBLISHED = "published tracking and clustering"
BY_HAND = "the same steps by hand"
JOINT = "one joint step"
ONE_BY_ONE = "head by head"
SIZES = [11, 100, 1000]
GROUPS = {11: 3, 100: 25, 1000: 25}
REGROUP_EVERY = {11: 1, 100: 1, 1000: 10}
GOALS = {11: 0.99, 100: 0.99, 1000: 0.95}  # share of a batch that is not outside
ONE_GROUP = {"groups_per_batch": 1, "observe_every": 10}
ALL, ONE = "batch, all groups", "batch of one group, observed every 10th"


class Pooled(nn.Module):
    """The demo's encoder and the mean over its patches: [B, 3, 64, 64] to [B, 256]."""

    def __init__(self):
        super().__init__()
        self.features = ViTFeatures(size=64, patch=8, dim=64, depth=4, attention_heads=4)

    def forward(self, images):
        return self.features(images).mean((2, 3))


def now_on_gpu():
    torch.cuda.synchronize()  # so that kernels cannot hide the time of the host
    return time.perf_counter()


def training_of(n_tasks, device, heads=dict):
    """The model with K tasks and a batch; also the labels, by task."""
    torch.manual_seed(0)
    tasks = [f"task{k}" for k in range(n_tasks)]
    model = tg.MultiTaskModel(Pooled(), heads({task: nn.Linear(256, 1) for task in tasks}))
    images = torch.randn(8, 3, 64, 64, device=device)
    stacked = torch.randn(n_tasks, 8, 1, device=device)
    labels = dict(zip(tasks, stacked, strict=True))

    def losses_of(outputs):
        return {task: (out - labels[task]).square().mean() for task, out in outputs.items()}

    now = now_on_gpu if images.is_cuda else time.perf_counter
    return Training(model.to(device), images, losses_of, lr=1e-4, now=now), labels


def groups_of(tasks, **options):
    """TaskGroups with the planted clusters, after their first round."""
    n_tasks = len(tasks)
    options["regroup_every"] = REGROUP_EVERY[n_tasks]
    groups = learned_groups(tasks, GROUPS[n_tasks], **options)
    for group in groups:  # the next round starts with learned groups
        group.skip()
    assert GROUPS[n_tasks] <= len(groups.partition) <= 2 * GROUPS[n_tasks]
    return groups


def published(training, tasks):
    """The published loop, which runs every head with a graph in every step."""
    tracking = published_tracking(tasks, GROUPS[len(tasks)])

    def batch():
        tracking.init_pre_loss()
        groups = tracking.next_groups()
        for name in tracking.order():
            losses = training.losses()
            training.step(torch.stack([losses[task] for task in groups[name]]).sum())
            tracking.update(name, losses)

    return batch


def measure(training, batch, batches):
    """The mean seconds of a batch, and of the part that is outside."""
    training.inside = 0.0
    start = training.now()
    for _ in range(batches):
        batch()
    total = training.now() - start
    return total / batches, (total - training.inside) / batches


@pytest.mark.parametrize("n_tasks", SIZES)
def test_all_groups_in_a_batch(record, device, n_tasks):
    training, labels = training_of(n_tasks, device)
    groups = groups_of([*labels])
    sides = {
        "ours": lambda: training.batch(groups),
        BY_HAND: lambda: training.by_hand(groups.partition),
    }
    if n_tasks < 1000 or record.full:
        sides[PUBLISHED] = published(training, [*labels])
    cycle = REGROUP_EVERY[n_tasks]  # batches; one of them begins with a regrouping
    cycles = {11: 20, 100: 2, 1000: 1}[n_tasks] * (3 if record.full else 1)
    found = {name: [] for name in sides}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published code warns
        for _ in range(cycles * cycle):
            for name, batch in sides.items():
                if name != PUBLISHED or len(found[name]) < 3 or n_tasks < 1000:
                    found[name].append(measure(training, batch, 1))
    mean = {
        name: [*map(statistics.mean, zip(*times, strict=True))] for name, times in found.items()
    }
    (total, outside), (by_hand, _) = mean["ours"], mean[BY_HAND]
    theirs, their_outside = mean.get(PUBLISHED, ("with --full",) * 2)
    record.add(
        ALL,
        n_tasks,
        total,
        {INSIDE: total - outside, BY_HAND: by_hand, PUBLISHED: theirs},
        goals={INSIDE: GOALS[n_tasks]},
    )
    record.add(f"outside in a {ALL}", n_tasks, outside, {PUBLISHED: their_outside})


@pytest.mark.parametrize("n_tasks", SIZES)
def test_one_group_in_a_batch(record, device, n_tasks):
    """Measure whole rounds, so that the regrouping at their start counts for its share."""
    training, labels = training_of(n_tasks, device)
    groups = groups_of([*labels], **ONE_GROUP)
    round_ = len(groups.partition)
    rounds = {11: 40, 100: 4, 1000: 10}[n_tasks] * (3 if record.full else 1)
    for _ in range(round_):
        training.batch(groups)
    total, outside = measure(training, lambda: training.batch(groups), rounds * round_)
    joint, _ = measure(training, training.joint, 20)
    record.add(
        ONE,
        n_tasks,
        total,
        {INSIDE: total - outside, JOINT: joint},
        goals={INSIDE: GOALS[n_tasks]},
    )


@pytest.mark.parametrize("n_tasks", SIZES)
def test_heads_as_one_module(record, device, n_tasks):
    """A step on a group that observes all tasks, and a joint step; single and stacked losses."""
    (one_by_one, labels), (batched, _) = (
        training_of(n_tasks, device, heads) for heads in (dict, tg.BatchedHeads)
    )
    tasks = [*labels]
    group = next(iter(groups_of(tasks)))
    members = [tasks.index(task) for task in group.tasks]

    def stacked_losses(training, group=None):
        """The losses as one tensor, as one would write them for very many tasks."""
        outputs = training.model(training.inputs, group=group)
        targets = torch.stack([labels[task] for task in outputs])
        return (torch.stack([*outputs.values()]) - targets).square().mean((1, 2))

    def step_on_a_group(training, stacked):
        if stacked:
            training.step(stacked_losses(training, group)[members].sum())
        else:
            losses = training.losses(group)
            training.step(torch.stack([losses[task] for task in group.tasks]).sum())

    def joint_step(training, stacked):
        training.step(stacked_losses(training).sum()) if stacked else training.joint()

    for name, step in (("step on a group, observed", step_on_a_group), ("joint step", joint_step)):
        least = record.least_seconds(
            {
                "ours": lambda step=step: step(batched, True),
                ONE_BY_ONE: lambda step=step: step(one_by_one, False),
                f"{ONE_BY_ONE}, losses stacked": lambda step=step: step(one_by_one, True),
                "heads as one, losses one by one": lambda step=step: step(batched, False),
            }
        )
        record.add(f"{name}, heads as one", n_tasks, least.pop("ours"), least)
