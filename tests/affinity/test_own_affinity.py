"""The protocol of affinities: what the loop asks of one that a user has written."""

import math

import pytest
import torch

import taskgroup as tg

TASKS = ["a", "b", "c"]


class Noted(tg.Affinity):
    """Notes the calls of the loop."""

    def __init__(self, reads_steps=False, every=None):
        super().__init__(decay=0.5)
        self.reads_steps, self.every = reads_steps, every
        self.observed_steps, self.measured = [], []

    def observe(self, before, after, mask, following=None):
        self.observed_steps.append((before, after, mask.tolist(), following.tolist()))
        self.update(torch.where(mask[:, None], before - after, torch.nan))

    def measure(self, losses, values, average=None, model=None):
        assert average is None
        assert model is None
        assert all(loss.requires_grad for loss in losses.values())
        self.measured.append((sorted(losses), values.tolist()))
        self.update(torch.diag(values))

    def draw(self, present):
        return tuple(present[:2])


def train(groups, batches=1, present=TASKS):
    x = torch.ones(3, requires_grad=True)
    stepped = []
    for _ in range(batches):
        for group in groups.batch(present):
            losses = x.square()
            loss = group.loss({t: losses[TASKS.index(t)] for t in group.observed})
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            stepped.append((group.tasks, group.observed, losses.detach()))
            x.data -= 0.1 * gradient
    return stepped


def test_it_is_shown_every_step_with_the_losses_around_it_and_the_group_that_follows():
    groups = tg.TaskGroups(TASKS, affinity=Noted(reads_steps=True))
    steps = train(groups)
    seen = groups.affinity.observed_steps
    assert len(steps) == 3
    assert len(seen) == 2
    for (before, after, mask, following), one, other in zip(seen, steps, steps[1:], strict=False):
        assert torch.equal(before, one[2])
        assert torch.equal(after, other[2])
        assert mask == [task in one[0] for task in TASKS]
        assert following == [task in other[0] for task in TASKS]
    assert not groups.affinity.measured


def test_it_is_given_the_losses_whose_gradients_it_measures():
    groups = tg.TaskGroups(TASKS, affinity=Noted(every=2))
    steps = train(groups, batches=3)
    assert [tasks for tasks, _ in groups.affinity.measured] == [[0, 1], [0, 1]]
    assert not groups.affinity.observed_steps
    for (tasks, observed, losses), (_, values) in zip(
        steps[::6], groups.affinity.measured, strict=True
    ):
        assert set(observed) == {"a", "b", *tasks}
        for k, task in enumerate(TASKS):
            assert values[k] == losses[k] if task in observed else math.isnan(values[k])


def test_an_update_moves_and_counts_what_was_observed_alone():
    affinity = tg.Affinity(decay=0.25)
    affinity.start(("a", "b"))
    for _ in range(2):
        affinity.update(torch.tensor([[1.0, torch.nan], [0.0, -1.0]], dtype=torch.float64))
    assert affinity.matrix.tolist() == [[0.4375, 0], [0, -0.4375]]
    assert affinity.matrix.dtype == torch.float32
    assert affinity.observed.tolist() == [[2, 0], [2, 2]]
    assert affinity.known().isnan().tolist() == [[False, True], [False, False]]


def test_its_state_is_that_of_the_groups():
    groups, other = (tg.TaskGroups(TASKS, affinity=Noted(reads_steps=True)) for _ in range(2))
    train(groups, batches=3)
    other.load_state_dict(groups.state_dict())
    assert torch.equal(other.affinity.matrix, groups.affinity.matrix)
    assert torch.equal(other.affinity.observed, groups.affinity.observed)


@pytest.mark.parametrize(
    ("settings", "method"), [({"reads_steps": True}, "observe"), ({"every": 1}, "measure")]
)
def test_what_it_does_not_define_is_named(settings, method):
    kind = type("Mine", (tg.Affinity,), settings)
    with pytest.raises(NotImplementedError, match=rf"Mine must define {method}\(\)"):
        train(tg.TaskGroups(TASKS, affinity=kind(decay=0.5)))
