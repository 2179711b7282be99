"""What is read from a GPU a batch late, tried on the host with a copy that arrives when told."""

import pytest
import torch

import taskgroup as tg
from taskgroup.loop import loss_reader, observer
from tests.nn.test_outside import TASKS
from tests.planted import Planted
from tests.ranks import on_ranks


class LateCopy:
    """A HostCopy that is there when it is waited for."""

    arrived = False

    def __init__(self, tensors):
        (_,) = {tensor.device for tensor in tensors}  # they go in one piece
        self.tensors = [tensor.clone() for tensor in tensors]

    def ready(self):
        return self.arrived

    def wait(self):
        return self.tensors


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(observer, "HostCopy", LateCopy)
    monkeypatch.setattr(loss_reader, "waits_for", lambda device: True)


def decisions(**settings):
    planted = Planted([2, 2], -0.5, seed=0)
    groups = tg.TaskGroups(
        planted.tasks, warmup=3, affinity=tg.ProximalAffinity(decay=0.1), **settings
    )
    return planted.train(groups, 40), groups.affinity.matrix


@pytest.mark.parametrize("arrived", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"observe_every": 3}, {"groups_per_batch": 1, "regroup_every": 2}], ids=str
)
def test_decisions_are_the_same(settings, arrived, monkeypatch, request):
    at_once = decisions(**settings)
    request.getfixturevalue("late")
    monkeypatch.setattr(LateCopy, "arrived", arrived)
    later = decisions(**settings)
    assert later[0] == at_once[0]
    assert torch.equal(later[1], at_once[1])


def test_each_loss_is_looked_at_once_and_by_its_name(late, monkeypatch):
    """Also where a batch is left early, so that a copy is read twice with others behind it."""
    monkeypatch.setattr(LateCopy, "arrived", True)
    groups = tg.TaskGroups(TASKS, observe_every=2)
    x = torch.ones(3, requires_grad=True)
    looked = []
    monkeypatch.setattr(
        groups._observer.watch, "look", lambda values, members, **_: looked.append(members)
    )
    expected = []
    for n in range(8):
        for group in groups:
            group.loss(x * (n + 1))
            expected.append(tuple(TASKS.index(task) for task in group.observed))
            if n % 3 == 1:
                break
    next(iter(groups))
    assert looked == expected[: len(looked)]
    assert len(looked) >= len(expected) - 3


@pytest.mark.parametrize("tasks", [["a"], ["a", "b"]], ids=str)
def test_an_affinity_that_never_observed_goes_with_the_losses(tasks, late, monkeypatch):
    """Losses on another device, of which nothing can be read."""
    groups = tg.TaskGroups(tasks, grouping=tg.Together())
    x = torch.ones(len(tasks), device="meta", requires_grad=True)
    for group in groups:
        group.loss(x * 2)
    assert groups.affinity.matrix.device.type == "meta"


def test_nothing_piles_up_where_batches_are_left_early(late, monkeypatch):
    monkeypatch.setattr(LateCopy, "arrived", True)
    groups = tg.TaskGroups(TASKS)
    x = torch.ones(3, requires_grad=True)
    for _ in range(20):
        for group in groups:
            group.loss(x * 2)
            break
    assert len(groups._observer._unread) <= 2
    groups.load_state_dict(tg.TaskGroups(TASKS).state_dict())
    assert groups._observer._unread == []


def test_bad_losses_are_told_a_batch_late(late, monkeypatch):
    monkeypatch.setattr(LateCopy, "arrived", True)
    groups = tg.TaskGroups(TASKS)
    x = torch.ones(3, requires_grad=True)
    for group in groups:
        group.loss(x * torch.tensor([1.0, -1.0, 1.0]))
    with pytest.warns(UserWarning, match="task 'b' is -1"):
        next(iter(groups))


def drift(rank):
    observer.HostCopy = LateCopy
    loss_reader.waits_for = lambda device: True
    groups = tg.TaskGroups(TASKS)
    x = torch.ones(3, requires_grad=True)
    for group in groups:
        group.loss(x * 2)
    groups._rounds.partition = [(0, 1), (2,)] if rank else [(0, 2), (1,)]
    for group in groups:
        group.loss(x * 2)  # nothing is read here
    try:
        next(iter(groups))
    except RuntimeError as error:
        return str(error)


def test_ranks_that_differ_are_told_at_the_same_place():
    for rank, said in enumerate(on_ranks(drift)):
        assert f"The ranks step on different groups; rank {rank} steps on" in said
