"""Copies of a user's objects continue exactly like the original, also in the middle of training."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp

import taskgroup as tg

TASKS = ["a", "b", "c"]
SETTINGS = {
    "default": dict,
    "observing now and then": lambda: {"observe_every": 3, "groups_per_batch": 2},
    "random groups": lambda: {"grouping": tg.RandomGroups(2), "regroup_every": 2},
    "fixed": lambda: {"grouping": tg.Fixed([["a", "b"], ["c"]])},
    "graph coloring": lambda: {"grouping": tg.GraphColoring()},
    "k-means": lambda: {"grouping": tg.KMeans(2)},
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


class Run:
    """A model of two numbers, and three tasks with different targets for them."""

    def __init__(self, setting, sample=None):
        self.x = torch.zeros(2, requires_grad=True)
        settings = SETTINGS[setting]() if setting in SETTINGS else {}
        if setting == "gradients":
            settings["affinity"] = tg.GradientAffinity([self.x], sample=sample, decay=0.3)
        settings.setdefault("affinity", tg.ProximalAffinity(decay=0.3))
        self.groups = tg.TaskGroups(TASKS, warmup=2, seed=3, **settings)

    def losses(self):
        return {t: (self.x - k).square().sum() for k, t in enumerate(TASKS, 1)}

    def step(self, group):
        loss = group.loss(self.losses())
        (gradient,) = torch.autograd.grad(loss, self.x)
        self.x.data -= 0.01 * gradient
        return group.tasks, loss.item()

    def train(self, batches):
        trace = []
        for _ in range(batches):
            trace += [self.step(group) for group in self.groups]
            trace.append((self.groups.partition, self.groups.affinity.matrix.tolist()))
        return trace


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("setting", [*SETTINGS, "gradients", "gradients of a sample"])
def test_a_copy_goes_on_as_the_original(setting, kind):
    run = Run("gradients", sample=2) if "sample" in setting else Run(setting)
    run.train(4)
    other = COPIES[kind](run)
    expected = run.train(6)
    assert other.train(6) == expected


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_taken_inside_a_batch_begins_the_next_one(kind):
    run = Run("default")
    run.train(3)
    for group in run.groups:
        run.step(group)
        if not group.first:
            continue
        other, own = COPIES[kind](run), COPIES[kind](group)
        assert (own.tasks, own.observed, own.first) == (group.tasks, group.observed, True)
        assert torch.equal(own.mask, group.mask)
    state = other.groups.state_dict()  # no batch is open there
    assert state["batches"] == 4
    assert len(other.train(2)) > 2
    run.train(1)


@pytest.mark.parametrize(
    "value",
    [
        tg.AffinityPropagation(damping=0.6),
        tg.Heterogeneous(),
        tg.GraphColoring(0.1),
        tg.Exhaustive(2),
        tg.KMeans(2, seed=1),
        tg.Spectral(2),
        tg.Together(),
        tg.Singletons(),
        tg.RandomGroups(2, seed=4),
        tg.ProximalAffinity(0.2),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", COPIES)
def test_parts_by_themselves(value, kind):
    other = COPIES[kind](value)
    matrix = torch.tensor([[1.0, 0.8, -0.5], [0.7, 1.0, -0.4], [-0.6, -0.5, 1.0]])
    if callable(value):
        assert torch.equal(other(matrix), value(matrix))
    else:
        assert other.decay == value.decay


def child(rank, runs, folder):
    torch.save([run.train(4) for run in runs], f"{folder}/traces.pt")


def test_a_spawned_process_goes_on_as_the_original(tmp_path):
    """As with torch.multiprocessing.spawn(train, (groups, ...)); pytorch/pytorch#146828."""
    runs = [Run(setting, sample=2) for setting in [*SETTINGS, "gradients"]]
    for run in runs:
        run.train(3)
    expected = [run.train(4) for run in copy.deepcopy(runs)]
    mp.spawn(child, (runs, str(tmp_path)), nprocs=1)
    assert torch.load(tmp_path / "traces.pt", weights_only=True) == expected


def test_what_is_handed_out_is_a_copy():
    run = Run("fixed")
    run.train(3)
    groups = run.groups
    before = copy.deepcopy(groups.state_dict())
    groups.partition.clear()
    groups.affinity.matrix.zero_()
    groups.affinity.observed.zero_()
    state = groups.state_dict()
    state["affinity"]["matrix"].zero_()
    state["generator"].zero_()
    state["partition"].clear()
    state["turns"].clear()
    for group in groups:
        group.mask.zero_()
        run.step(group)
    run = Run("fixed")
    run.train(3)
    assert str(run.groups.state_dict()) == str(before)
    labels = groups._partitioner.grouping(torch.eye(3))
    labels.zero_()
    assert groups._partitioner.grouping(torch.eye(3)).tolist() == [0, 0, 1]
