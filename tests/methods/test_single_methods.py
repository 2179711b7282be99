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
    names = ("gd", "si", "rlw", "dwa", "famo", "mgda")
    assert all(made(n, Model(2)).parameters() == [] for n in names)


def test_si_minimises_the_sum_of_the_logarithms():
    ours, plain = Model(3), Model(3)
    weights = made("si", ours).backward(ours.losses(ours.x))
    losses = plain.losses(plain.x)
    sum(loss.log() for loss in losses.values()).backward()
    torch.testing.assert_close(weights, torch.stack([1 / loss for loss in losses.values()]))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_si_forgets_the_scale_of_a_loss():
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    found = []
    for scale in (1.0, 1000.0):
        x.grad = None
        method = tg.methods.SI([x], ["a", "b"])
        method.backward({"a": scale * x.square().sum(), "b": x.sum()})
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("name", "loss"), [("si", 0.0), ("si", -2.0), ("famo", -2.0)])
def test_a_loss_without_a_logarithm_names_its_task(name, loss):
    x = nn.Parameter(torch.ones(1))
    method = tg.methods.find(name)([x], ["a", "b"])
    with pytest.raises(ValueError, match=f"loss of task 'b' is {loss}, .* losses must be positive"):
        method.backward({"a": x.sum(), "b": loss * x.sum()})
    assert x.grad is None


def test_rlw_draws_new_weights_for_every_batch():
    """The softmax of standard normals, from a generator of its own, whose state is saved."""
    x = nn.Parameter(torch.ones(1))
    first, again, other = (tg.methods.RLW([x], ["a", "b", "c"], seed=s) for s in (7, 7, 8))

    def weights(method):
        x.grad = None
        return method.backward({"a": x.sum(), "b": 2 * x.sum(), "c": x.sum()})

    generator = torch.Generator().manual_seed(7)
    before = torch.get_rng_state()
    for _ in range(3):
        expected = torch.randn(3, generator=generator).softmax(0)
        torch.testing.assert_close(weights(first), expected)
        torch.testing.assert_close(x.grad, expected @ torch.tensor([[1.0], [2.0], [1.0]]))
    assert torch.equal(torch.get_rng_state(), before)
    again.load_state_dict(first.state_dict())
    following = weights(first)
    assert torch.equal(weights(again), following)
    assert not torch.equal(weights(other), following)


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


def test_dwa_does_not_count_losses_that_are_not_finite():
    x = nn.Parameter(torch.ones(1))
    method = tg.methods.DWA([x], ["a", "b"], epoch=2, temperature=1.0)
    for b in (4.0, math.inf, 1.0, 3.0):  # the means are 4 and 2; those of a are 1
        method.backward({"a": x.sum(), "b": b * x.sum()})
    weights = method.backward({"a": x.sum(), "b": x.sum()})
    share = math.exp(1) / (math.exp(1) + math.exp(0.5))
    torch.testing.assert_close(weights, torch.tensor([2 * share, 2 - 2 * share]))


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
