"""Which groups on which batch: integers only."""

import ast
import doctest
import importlib.util
import sys
from types import SimpleNamespace

import pytest

import taskgroup.loop.rounds as rounds_module
from taskgroup.loop.rounds import Plan, Rounds


def test_it_runs_without_torch(monkeypatch):
    """Imports for types included; loaded by its path, because the package itself needs torch."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "taskgroup")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("rounds_alone", rounds_module.__file__)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rounds_alone", alone)
    spec.loader.exec_module(alone)
    assert doctest.testmod(alone).attempted > 0
    assert doctest.testmod(alone).failed == 0

    tree = ast.parse(spec.loader.get_source("rounds_alone"))
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert named == {"__future__", "collections.abc", "typing", "numpy"}


class InOrder:
    def permutation(self, n):
        return list(range(n))

    def below(self, n):
        return 0


def make(n_tasks=3, reads_steps=True, every=None, draw=tuple, **settings):
    affinity = SimpleNamespace(reads_steps=reads_steps, every=every, draw=draw)
    defaults = {"warmup": 100, "regroup_every": 1, "groups_per_batch": None, "observe_every": 1}
    return Rounds(n_tasks, affinity, InOrder(), **{"learns": True, **defaults, **settings})


def keep():
    """No regrouping."""


def test_a_batch_that_observes_needs_the_losses_of_all_present_tasks():
    rounds = make(observe_every=2)
    assert rounds.plan((0, 2), keep) == [
        Plan((0,), (0,), (0, 2), (), observes=True, place=0, last=False),
        Plan((2,), (2,), (0, 2), (), observes=True, place=1, last=True),
    ]
    assert rounds.plan((0, 2), keep) == [
        Plan((0,), (0,), (0,), (), observes=False, place=0, last=False),
        Plan((2,), (2,), (2,), (), observes=False, place=1, last=True),
    ]


def test_gradients_are_measured_in_the_first_step_of_every_nth_round():
    rounds = make(reads_steps=False, every=2, draw=lambda present: present[:2])
    plans = [rounds.plan((0, 1, 2), keep) for _ in range(3)]
    assert [[plan.measures for plan in batch] for batch in plans] == [
        [(0, 1), (), ()],
        [(), (), ()],
        [(0, 1), (), ()],
    ]
    assert [plan.needed for plan in plans[0]] == [(0, 1), (1,), (2,)]
    assert not any(plan.observes for batch in plans for plan in batch)


def test_only_learned_groups_take_a_second_step_to_be_observed():
    for learns, steps in ((True, 2), (False, 1)):
        rounds = make(groups_per_batch=1, learns=learns)
        assert len(rounds.plan((0, 1, 2), keep)) == steps


def test_a_task_alone_is_stepped_once_and_observes_nothing():
    (plan,) = make(every=1).plan((1,), keep)
    assert plan == Plan((1,), (1,), (1,), (), observes=False, place=0, last=True)


def test_it_goes_on_from_its_state():
    one, other = (
        make(groups_per_batch=2, observe_every=3),
        make(groups_per_batch=2, observe_every=3),
    )
    for _ in range(4):
        one.plan((0, 1, 2), keep)
    other.load(one.state())
    for _ in range(5):
        assert one.plan((0, 1, 2), keep) == other.plan((0, 1, 2), keep)


def test_a_state_that_does_not_fit_changes_nothing():
    rounds = make()
    before = rounds.state()
    for change, said in (
        ({"partition": [[0], [1]]}, "every task once"),
        ({"queue": [[0, 1]]}, "not in its partition"),
        ({"turns": [0]}, "one number for every task"),
    ):
        with pytest.raises(ValueError, match=said):
            rounds.load({**before, **change})
        assert rounds.state() == before
