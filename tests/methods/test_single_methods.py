"""What one method promises and the others do not."""

import math
import warnings

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.methods.problems import Model, gradient_space, made, tasks_of


@pytest.mark.parametrize("name", ["uw", "imtl-l"])
def test_what_is_learned_and_forgotten_is_told_once(name):
    model = Model(2)
    method = made(name, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(250):
            method.backward(model.losses(model.x))
    assert len(caught) == 1
    assert "pass method.parameters() to the optimizer" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["uw", "imtl-l"])
@pytest.mark.parametrize("fused", [False, True])
def test_no_false_alarm(name, fused):
    model = Model(2)
    method = made(name, model)
    (learned,) = method.parameters()
    assert isinstance(learned, nn.Parameter)
    assert learned.device == model.x.device
    optimizer = torch.optim.Adam([*model.parameters(), learned], fused=fused)
    for batch in range(1, 300):
        method.backward(model.losses(model.x))
        if batch % 64 == 0:  # micro-batches
            optimizer.step()
            optimizer.zero_grad()
        if batch == 200:
            method.load_state_dict(method.state_dict())


def test_others_have_nothing_to_learn():
    assert all(made(n, Model(2)).parameters() == [] for n in ("gd", "dwa", "famo", "mgda"))


def test_famo_asks_for_observe():
    model = Model(2)
    method = made("famo", model)
    with pytest.raises(RuntimeError, match="no step to observe"):
        method.observe(model.losses(model.x))
    method.backward(model.losses(model.x))
    losses = model.losses(model.x)
    kept = model.shared[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"after optimizer.step\(\), .* call observe"):
        method.backward(losses)
    assert torch.equal(model.shared[0].weight.grad, kept)
    other = made("famo", model)
    other.load_state_dict(method.state_dict())  # saved between the two
    for each in (method, other):
        each.observe({task: loss.detach() * 0.9 for task, loss in losses.items()})
    assert torch.equal(other.backward(losses), method.backward(model.losses(model.x)))


def test_dwa_rolls_its_history_by_itself():
    x = nn.Parameter(torch.ones(1))
    method = tg.methods.DWA([x], ["a", "b"], epoch=2, temperature=1.0)
    weights = [
        method.backward({"a": x.sum(), "b": b * x.sum()})
        for b in (4.0, 2.0, 1.0, 2.0, 1.0)  # means of the epochs: 3 and 1.5; that of a stays at 1
    ]
    for uniform in weights[:4]:
        assert uniform.tolist() == [1, 1]
    share = math.exp(1) / (math.exp(1) + math.exp(0.5))
    torch.testing.assert_close(weights[4], torch.tensor([2 * share, 2 - 2 * share]))


@pytest.mark.parametrize("score", [0.0, 1.0, -0.5, math.nan])
def test_dtp_names_the_score_that_is_out_of_range(score):
    x = nn.Parameter(torch.ones(1))
    method = tg.methods.DTP([x], ["a", "b"], score=lambda losses: {"a": 0.5, "b": score})
    with pytest.raises(ValueError, match=f"score of task 'b' is {score}, .* clamp it"):
        method.backward({"a": x.sum(), "b": x.sum()})
    assert x.grad is None


def test_dtp_names_the_tasks_that_are_not_scored():
    x = nn.Parameter(torch.ones(1))
    for scores in ({"a": 0.5}, [0.5, 0.5]):
        method = tg.methods.DTP([x], ["a", "b"], score=lambda losses, scores=scores: scores)
        with pytest.raises(ValueError, match=r"score must return .* for the tasks \['a', 'b'\]"):
            method.backward({"a": x.sum(), "b": x.sum()})


def test_nash_mtl_raises_where_ecos_finds_nothing():
    """TorchJD would return the weights of the step before, equal ones at first."""
    x = nn.Parameter(torch.zeros(2))
    method = tg.methods.NashMTL([x], ["a", "b"], update_weights_every=3)
    before = method.state_dict()
    for _ in range(2):  # the second step would keep the weights of the first
        with pytest.raises(RuntimeError, match="NashMTL found no weights for these gradients"):
            method.backward({"a": 0 * x[0], "b": x[1]})  # a has no gradient
    assert x.grad is None
    assert torch.equal(method.state_dict()["alpha"], before["alpha"])
    assert method.backward({"a": x[0], "b": x[1]}).isfinite().all()


def test_nash_mtl_raises_where_every_problem_fails(monkeypatch):
    from cvxpy import SolverError

    x = nn.Parameter(torch.zeros(2))
    method = tg.methods.NashMTL([x], ["a", "b"])

    def fails(**options):
        raise SolverError("ECOS gave up")

    monkeypatch.setattr(method._weighting.problem, "solve", fails)
    with pytest.raises(RuntimeError, match=r"NashMTL found no weights .*ECOS gave up"):
        method.backward({"a": x[0], "b": x[1]})


def test_nash_mtl_keeps_its_weights_where_a_later_problem_fails(monkeypatch):
    x = nn.Parameter(torch.zeros(2))
    method = tg.methods.NashMTL([x], ["a", "b"])
    solved = method.backward({"a": x[0], "b": 3 * x[1]})
    assert method.unsolved == 0

    def fails(**options):
        raise ValueError("ECOS gave up")

    monkeypatch.setattr(method._weighting.problem, "solve", fails)
    kept = method.backward({"a": x[0], "b": 3 * x[1]})
    torch.testing.assert_close(kept, solved)
    assert method.unsolved == 1
    resumed = tg.methods.NashMTL([x], ["a", "b"])
    resumed.load_state_dict(method.state_dict())
    assert resumed.unsolved == 1


def test_nash_mtl_keeps_weights_between_updates():
    rows = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0))
    x = nn.Parameter(torch.zeros(10))
    method = tg.methods.NashMTL([x], tasks_of(3), update_weights_every=2, max_norm=0)
    weights = [
        method.backward({t: row @ x for t, row in zip(tasks_of(3), batch, strict=True)})
        for batch in rows
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])


@pytest.mark.parametrize("name", [n for n in gradient_space() if n != "graddrop"])
def test_solver_that_fails_is_told(name, monkeypatch):
    model = Model(2)
    method = made(name, model)
    monkeypatch.setattr(method, "_weigh", lambda gram: torch.full((2,), torch.nan))
    with pytest.raises(RuntimeError, match="weights that are not finite"):
        method.backward(model.losses(model.x))
    assert all(p.grad is None for p in model.shared.parameters())


def test_gradients_that_are_all_zero():
    x = nn.Parameter(torch.zeros(3))
    for name in gradient_space():
        losses = {t: 0 * x.sum() for t in tasks_of(3)}
        assert made(name, None, [x], tasks_of(3)).backward(losses).tolist() == [1, 1, 1]
    assert x.grad.tolist() == [0, 0, 0]
