"""Costs and advice that follow from the times of encoder and heads."""

import dataclasses

import pytest

import taskgroup as tg
from taskgroup.costs import prediction

COSTS = tg.StepCosts(encoder=2.0, heads_forward=3.0, heads_backward=5.0, n_tasks=11)


@pytest.mark.parametrize("groups", [2, 3, 11])
@pytest.mark.parametrize("n", [1, 10])
def test_formulas_of_the_page(groups, n):
    """The closed forms in docs/cost.md."""
    e, f, b = 0.2, 0.3, 0.5
    everything = groups * e + f + b + (groups - 1) * f / n
    assert COSTS.of(groups, n) == pytest.approx(everything)
    assert COSTS.of(groups, n, groups_per_batch=groups) == pytest.approx(everything)
    one = (1 + 1 / n) * (e + (f + b) / groups) + 2 * (1 - 1 / groups) * f / n
    assert COSTS.of(groups, n, groups_per_batch=1) == pytest.approx(one)
    whole = dataclasses.replace(COSTS, skips_heads=False)
    assert whole.of(groups, n) == pytest.approx(groups * (e + f) + b)


def test_one_group_takes_two_steps_where_it_observes():
    assert COSTS.of(1) == 2.0
    assert COSTS.of(1, observe_every=10) == pytest.approx(1.1)


def with_cost(cost, **others):
    """Costs of which a batch of three groups with observe_every=10 takes ``cost`` joint steps."""
    encoder = (cost - 1) / 2
    return tg.StepCosts(encoder, 0.0, 1 - encoder, n_tasks=11, **others)


@pytest.mark.parametrize("offset", [-0.01, 0.01])
def test_advice_changes_at_the_threshold(offset):
    costs = with_cost(prediction.WORTH_TRYING + offset)
    assert costs.advice().startswith("Group steps are worth" if offset < 0 else "Train jointly")
    assert costs.advice() in " ".join(str(costs).split())


def test_advice_for_a_model_that_does_not_skip_heads():
    costs = tg.StepCosts(0.4, 2.0, 5.6, n_tasks=11, skips_heads=False)
    assert "costs 1.60 joint steps" in costs.advice()
    assert "would cost 1.15 with a tg.MultiTaskModel" in costs.advice()
    assert "Train jointly if" in dataclasses.replace(costs, encoder=50.0).advice()


def test_advice_of_two_tasks_is_about_two_groups():
    assert "a batch of 2 groups" in dataclasses.replace(COSTS, n_tasks=2).advice()


@pytest.mark.parametrize(("n_tasks", "shown"), [(2, [1, 2]), (3, [1, 2, 3]), (7, [1, 2, 3, 7])])
def test_table(n_tasks, shown):
    costs = dataclasses.replace(COSTS, n_tasks=n_tasks)
    header, *rows = [line.split() for line in costs.table().splitlines()]
    assert header == ["groups", "observe_every=1", "observe_every=10"]
    assert [int(row[0]) for row in rows] == shown
    for groups, *cells in rows:
        expected = [costs.of(int(groups), n) for n in (1, 10)]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=0.0051)
    assert costs.table() in str(costs)


@pytest.mark.parametrize(
    ("seconds", "words"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4e-5, "40 µs")]
)
def test_units(seconds, words):
    costs = tg.StepCosts(seconds, 0.0, 0.0, n_tasks=2, clock="4 threads")
    assert f"A joint step takes {words} (4 threads): encoder 100%" in str(costs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"groups": 0}, "groups must be an integer of at least 1"),
        ({"groups": 12}, "groups must be at most 11, the number of tasks"),
        ({"groups": 2, "observe_every": 0}, "observe_every must be"),
        ({"groups": 2, "groups_per_batch": 1.5}, "groups_per_batch must be"),
    ],
)
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        COSTS.of(**arguments)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_wrong_times(seconds):
    with pytest.raises(ValueError, match="heads_forward must be a number of seconds"):
        dataclasses.replace(COSTS, heads_forward=seconds)
    with pytest.raises(dataclasses.FrozenInstanceError):
        COSTS.encoder = seconds
