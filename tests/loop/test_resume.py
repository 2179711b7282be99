"""A run stopped and resumed is the run that was not stopped, bit by bit."""

import io

import pytest
import torch

import taskgroup as tg
from tests.nn.test_outside import TASKS, data, losses_of, make_model

SETTINGS = {
    "learned": {},
    "dealt-out": {"groups_per_batch": 1, "observe_every": 2, "regroup_every": 2},
    "random": {"grouping": lambda: tg.RandomGroups(2, seed=5)},
    "not-converging": {"grouping": lambda: tg.AffinityPropagation(max_iter=1)},
}


class Run:
    """A model with dropout, its optimizer and its groups; all there is to save."""

    def __init__(self, setting):
        settings = dict(SETTINGS[setting])
        if "grouping" in settings:
            settings["grouping"] = settings["grouping"]()
        self.model = make_model()
        self.model.encoder.append(torch.nn.Dropout(0.3))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.groups = tg.TaskGroups(
            TASKS, warmup=2, affinity=tg.ProximalAffinity(decay=0.2), **settings
        )
        torch.manual_seed(1)

    def train(self, batches):
        trace = []
        for n in batches:
            x, target = data(n % 5)
            for group in self.groups:
                losses = losses_of(self.model(x, group=group), target)
                self.optimizer.zero_grad()
                loss = group.loss(losses)
                loss.backward()
                self.optimizer.step()
                trace.append((n, group.tasks, loss.item()))
            trace.append((n, self.groups.partition, self.groups.affinity.matrix.tolist()))
        return trace

    def save(self):
        file = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "groups": self.groups.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.groups.load_state_dict(state["groups"])
        torch.set_rng_state(state["rng"])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resumed_run_is_the_uninterrupted_one(setting, stop):
    whole = Run(setting).train(range(14))
    first = Run(setting)
    trace = first.train(range(stop))
    saved = first.save()
    first.train(range(2))  # what happens after the checkpoint leaves no trace in it
    second = Run(setting)
    second.train(range(3))  # nor does what the object did before it was loaded into
    second.load(saved)
    trace += second.train(range(stop, 14))
    assert trace == whole


@pytest.mark.learned
def test_count_of_failures_is_saved():
    run = Run("not-converging")
    run.train(range(8))
    assert run.groups.unconverged == 6
    other = Run("not-converging")
    other.load(run.save())
    assert other.groups.unconverged == 6


def changed(state, **changes):
    return {**state, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: changed(s, tasks=["a", "b", "x"]), "'x'.*name the same tasks"),
        (lambda s: changed(s, tasks=["b", "a", "c"]), "same order"),
        (lambda s: changed(s, version=99), "has version 99"),
        (lambda s: {k: v for k, v in s.items() if k != "queue"}, "queue missing"),
        (lambda s: changed(s, surplus=1), "surplus missing or unexpected"),
        (lambda s: changed(s, partition=[[0], [1]]), "every task once"),
        (lambda s: changed(s, partition=[[0, 1, 2], []]), "every task once"),
        (lambda s: changed(s, queue=[[0, 2]]), "not in its partition"),
        (lambda s: changed(s, affinity={}), r"float32 matrix of shape \[3, 3\]"),
        (lambda s: changed(s, affinity={"matrix": torch.zeros(2, 2)}), r"shape \[3, 3\]"),
        (lambda s: changed(s, grouping={"generator": 0}), "grouping that wrote it"),
    ],
)
def test_bad_state_is_refused_whole(change, said):
    run = Run("learned")
    run.train(range(5))
    state = run.groups.state_dict()
    other = Run("learned")
    other.train(range(2))
    before = other.save()
    with pytest.raises(ValueError, match=said):
        other.groups.load_state_dict(change(state))
    assert other.save() == before


def test_not_inside_a_batch():
    groups = tg.TaskGroups(TASKS)
    state = groups.state_dict()
    for group in groups:
        with pytest.raises(RuntimeError, match="inside a batch"):
            groups.state_dict()
        with pytest.raises(RuntimeError, match="inside a batch"):
            groups.load_state_dict(state)
        group.skip()
    groups.load_state_dict(state)


def test_state_is_a_copy():
    run = Run("learned")
    run.train(range(3))
    state = run.groups.state_dict()
    matrix = state["affinity"]["matrix"].clone()
    run.train(range(3))
    assert torch.equal(state["affinity"]["matrix"], matrix)
    run.groups.load_state_dict(state)
    run.train(range(3))
    assert torch.equal(state["affinity"]["matrix"], matrix)
