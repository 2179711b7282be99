"""Selective updates find the planted groups."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import taskgroup as tg
from tests.planted import Planted

pytestmark = pytest.mark.learned

WARMUP = 100
BATCHES = 300


@pytest.mark.parametrize(
    ("sizes", "cosine"),
    [
        pytest.param([3, 3], -0.5, id="2x3"),
        pytest.param([4, 4, 4], -0.3, id="3x4"),
        pytest.param([5, 5, 5, 5], -0.2, id="4x5"),
        pytest.param([2, 2], -0.5, id="2x2"),
        pytest.param([2, 2, 2], -0.3, id="3x2"),
        pytest.param([2], 0.0, id="two-agree"),
        pytest.param([3], 0.0, id="three-agree"),
        pytest.param([1, 1], -0.5, id="two-conflict"),
        pytest.param([1, 1, 1], -0.4, id="three-conflict"),
        pytest.param([2, 1], -0.5, id="two-against-one"),
    ],
)
@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 8), marks=pytest.mark.full)], ids=["", "full"]
)
def test_finds_planted_partition(sizes, cosine, seeds):
    for seed in seeds:
        planted = Planted(sizes, cosine, seed)
        groups = tg.TaskGroups(
            planted.tasks, affinity=tg.ProximalAffinity(decay=0.01), warmup=WARMUP, seed=seed
        )
        partitions = planted.train(groups, BATCHES)
        assert all(len(partition) == sum(sizes) for partition in partitions[:WARMUP])
        learned = partitions[WARMUP:]
        found = sum(partition == planted.partition for partition in learned)
        assert found >= 0.99 * len(learned), f"seed {seed}: {found} of {len(learned)} batches"


def test_heterogeneous_mixes_planted_clusters():
    planted = Planted([3, 3], -0.5, seed=0)
    groups = tg.TaskGroups(
        planted.tasks,
        affinity=tg.ProximalAffinity(decay=0.01),
        grouping=tg.Heterogeneous(),
        warmup=20,
    )
    for partition in planted.train(groups, 60)[20:]:
        assert len(partition) == 2
        # Each group holds tasks of both clusters.
        assert all(set(group) & set(c) for group in partition for c in planted.partition)


def of_steps(planted):
    return tg.ProximalAffinity(decay=0.02)


def of_gradients(planted):
    return tg.GradientAffinity([planted.x], decay=0.05)


def of_some_gradients(planted):
    return tg.GradientAffinity([planted.x], decay=0.05, sample=3)


@pytest.mark.parametrize("affinity", [of_steps, of_gradients, of_some_gradients])
@pytest.mark.parametrize(
    "grouping",
    [
        lambda m: tg.AffinityPropagation(),
        lambda m: tg.GraphColoring(),
        tg.Exhaustive,
        tg.KMeans,
        tg.Spectral,
    ],
    ids=["propagation", "coloring", "exhaustive", "k-means", "spectral"],
)
@pytest.mark.parametrize(("sizes", "cosine"), [([3, 3], -0.5), ([3, 2, 3], -0.3)], ids=str)
def test_every_grouping_finds_planted_partition_with_every_affinity(
    grouping, affinity, sizes, cosine
):
    planted = Planted(sizes, cosine, seed=1)
    groups = tg.TaskGroups(
        planted.tasks, affinity=affinity(planted), grouping=grouping(len(sizes)), warmup=60
    )
    learned = planted.train(groups, 120)[60:]
    found = sum(partition == planted.partition for partition in learned)
    assert found >= 0.95 * len(learned), f"{found} of {len(learned)} batches"


@pytest.mark.parametrize("affinity", [of_gradients, of_steps])
def test_one_colour_a_batch(affinity):
    """SON-GOKU's schedule; only a batch that observes takes steps on two groups."""
    planted = Planted([3, 2, 3], -0.3, seed=0)
    groups = tg.TaskGroups(
        planted.tasks,
        affinity=affinity(planted),
        grouping=tg.GraphColoring(),
        groups_per_batch=1,
        observe_every=5,
        warmup=30,
    )
    dealt = []
    for batch in range(400):
        targets = planted.batch()
        steps = []
        for group in groups:
            steps.append(group.tasks)
            (gradient,) = torch.autograd.grad(group.loss(planted.losses(targets)), planted.x)
            planted.x.data.sub_(1e-3 * gradient)
        observes = affinity is of_steps and batch % 5 == 0
        assert len(steps) == (2 if observes else 1)
        dealt += steps
    assert set(groups.partition) == planted.partition
    assert set(dealt[-6:]) == planted.partition  # two rounds, whole


def test_first_order_identity():
    """A step on S changes the loss of k by lr * <sum of g_j over S, g_k> / L_k, to first order."""
    errors = []
    for lr in (1e-2, 1e-3):
        planted = Planted([2, 2], -0.5, seed=3)
        groups = tg.TaskGroups(
            planted.tasks,
            affinity=tg.ProximalAffinity(decay=1.0),
            grouping=tg.Fixed([planted.tasks[:1], planted.tasks[1:]]),
        )
        batch = planted.batch()
        losses = planted.losses(batch).detach()
        gradients = (planted.x - batch).detach()
        stepped = []
        for group in groups:
            stepped.append(group.tasks)
            (gradient,) = torch.autograd.grad(group.loss(planted.losses(batch)), planted.x)
            planted.x.data.sub_(lr * gradient)
        members = [planted.tasks.index(task) for task in stepped[0]]
        predicted = lr * gradients @ gradients[members].sum(0) / losses / len(members)
        outside = [k for k in range(4) if k not in members]
        seen = groups.affinity.matrix[members[0], outside].double()
        errors.append((seen - predicted[outside]).abs().max().item())
    # A tenth of the step, a hundredth of the error.
    assert errors[1] < 0.02 * errors[0]


@pytest.mark.parametrize(
    ("n_tasks", "clusters", "batches"),
    [(150, 5, 900), pytest.param(1000, 10, 3000, marks=pytest.mark.full)],
)
@pytest.mark.parametrize(
    ("grouping", "least"),
    [
        pytest.param(tg.GraphColoring(), 1.0, id="colouring"),
        pytest.param(tg.AffinityPropagation(damping=0.9, max_iter=1000), 0.9, id="propagation"),
    ],
)
def test_many_tasks_one_group_a_batch(grouping, least, n_tasks, clusters, batches):
    """The warm-up is two rounds with every task alone; after that a batch takes two steps."""
    planted = Planted([n_tasks // clusters] * clusters, -0.9 / (clusters - 1), seed=0, dim=64)
    groups = tg.TaskGroups(
        planted.tasks,
        affinity=tg.ProximalAffinity(decay=0.5),
        grouping=grouping,
        warmup=2,
        groups_per_batch=1,
        regroup_every=10,
    )
    planted.train(groups, batches)
    true, found = (labels_of(partition, planted.tasks) for partition in (planted, groups))
    assert adjusted_rand_score(true, found) >= least


def labels_of(who, tasks):
    group_of = {task: n for n, members in enumerate(who.partition) for task in members}
    return [group_of[task] for task in tasks]
