"""The joint methods under a GradScaler."""

import copy
import math

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.methods.problems import NAMES, Model, gradient_space, made, tasks_of

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def optimizer_of(model, method):
    return torch.optim.SGD([*model.parameters(), *method.parameters()], lr=0.05)


def step(model, method, optimizer, x, scaler=None):
    """One step as torch's own lines with a scaler; the weights."""
    optimizer.zero_grad()
    weights = method.backward(model.losses(x), scaler=scaler)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if method.observes_step:
        with torch.no_grad():
            method.observe(model.losses(x))
    return weights


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [2.0**16, 300.0])
def test_results_do_not_depend_on_the_scale(name, scale):
    """Five steps, at 1e-5: rounding alone, of which a power of two has none."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        model = Model(3)
        method = made(name, model)
        optimizer = optimizer_of(model, method)
        torch.manual_seed(0)
        weights = [step(model, method, optimizer, model.x + k, scaler) for k in range(5)]
        found.append([*weights, *model.parameters(), *method.parameters()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    moved = (found[1][5] - Model(3).shared[0].weight).abs().max()
    assert moved > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_float16_lowers_the_scale_and_goes_on(name):
    model = Model(3)
    method = made(name, model)
    optimizer = optimizer_of(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)
    start = copy.deepcopy(model.state_dict())
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = model.losses(model.x)
        method.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        if method.observes_step:
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
                method.observe(model.losses(model.x))
    assert 1 <= scaler.get_scale() <= 2.0**24
    for key, value in model.state_dict().items():
        assert value.isfinite().all()
        assert not torch.equal(value, start[key])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["losses", "gradients"])
def test_a_batch_that_is_skipped_leaves_no_trace(name, kind):
    """Afterwards all is as if that batch had never been: the weights at 1e-6."""
    model = Model(3)
    method = made(name, model)
    optimizer = optimizer_of(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k in range(3):
        torch.manual_seed(k)
        step(model, method, optimizer, model.x + k, scaler)
    other = copy.deepcopy((model, method, optimizer))
    before = copy.deepcopy(model.state_dict())

    optimizer.zero_grad()
    losses = model.losses(model.x)
    if kind == "losses":
        losses["task1"] = losses["task1"] * torch.nan
    else:  # as under a scale that is too large
        losses = {task: _Overflow.apply(loss) for task, loss in losses.items()}
    method.backward(losses, scaler=scaler)
    found = torch.cat([p.grad.flatten() for p in model.shared.parameters()])
    assert not found.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    if method.observes_step:
        with torch.no_grad():
            method.observe(losses)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])

    for k in range(3):
        torch.manual_seed(10 + k)
        weights = step(model, method, optimizer, model.x + k, scaler)
        torch.manual_seed(10 + k)
        expected = step(*other, model.x + k, torch.amp.GradScaler("cpu", init_scale=4.0))
        assert weights.isfinite().all()
        if kind == "losses" or name not in ("dtp", "dwa", "rlw"):  # which take finite losses in
            torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


@pytest.mark.parametrize("name", [n for n in gradient_space() if n != "graddrop"])
def test_squares_that_overflow_are_seen_by_the_scaler(name):
    """Gradients of 1e25 are finite, and their squares are not."""
    x = nn.Parameter(torch.zeros(4))
    method = made(name, None, [x], tasks_of(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**83)
    weights = method.backward({"task0": x.sum(), "task1": x[:2].sum()}, scaler=scaler)
    assert weights.isnan().all()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_scaler_that_is_not_enabled_is_none(name):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model = Model(3)
        torch.manual_seed(0)
        weights = made(name, model).backward(model.losses(model.x), scaler=scaler)
        found.append([weights, *(p.grad for p in model.parameters())])
    for plain, disabled in zip(*found, strict=True):
        assert torch.equal(plain, disabled)


@pytest.mark.parametrize("name", [n for n in gradient_space() if n != "graddrop"])
@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_without_a_scaler_gradients_must_be_finite(name, scaler):
    model = Model(3)
    losses = model.losses(model.x)
    losses["task1"] = losses["task1"] * torch.inf
    with pytest.raises(FloatingPointError, match=r"'task1' .*backward\(losses, scaler=scaler\)"):
        made(name, model).backward(losses, scaler=scaler)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_scaler_is_refused(name):
    model = Model(2)
    method = made(name, model)
    with pytest.raises(TypeError, match=r"must be a torch.amp.GradScaler or None, got float"):
        method.backward(model.losses(model.x), scaler=2.0)
    assert all(p.grad is None for p in model.parameters())
    method.backward(model.losses(model.x))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate_under_a_scaler(name):
    model = Model(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found = []
    for before in (0.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, before)
        torch.manual_seed(0)
        method = made(name, model)
        method.backward(model.losses(model.x), scaler=scaler)
        learned = [p.grad - 0 for p in method.parameters()]
        found.append([*(p.grad - before for p in model.parameters()), *learned])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@HALF
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_everywhere(name, dtype):
    """Parameters and losses of half precision against the same numbers in float32: 1e-2."""
    found = []
    for wide in (torch.float32, dtype):
        rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).to(dtype).to(wide)
        x = nn.Parameter(torch.zeros(40, dtype=wide))
        method = made(name, None, [x], tasks_of(4))
        torch.manual_seed(4)
        losses = {t: row @ x + 1 for t, row in zip(tasks_of(4), rows, strict=True)}
        assert losses["task0"].dtype == wide
        weights = method.backward(losses)
        assert x.grad.dtype == wide
        found.append((x.grad.float(), weights))
    (wide, wide_weights), (narrow, narrow_weights) = found
    assert (narrow - wide).norm() <= 1e-2 * wide.norm()
    assert (narrow_weights - wide_weights).norm() <= 1e-2 * wide_weights.norm()


@pytest.mark.parametrize("name", NAMES)
def test_an_autocast_around_the_backward_pass_does_not_reach_the_weights(name):
    """Gradients are the same to the bit; a solver in bfloat16 would be 1e-3 off."""
    rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    found = []
    for on in (False, True):
        x = nn.Parameter(torch.zeros(40))
        losses = {t: (row * x).sum() + 1 for t, row in zip(tasks_of(4), rows, strict=True)}
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            found.append(made(name, None, [x], tasks_of(4)).backward(losses))
    assert torch.equal(*found)


class TestFAMO:
    def method(self):
        x = nn.Parameter(torch.ones(2))
        return x, tg.methods.FAMO([x], ["a", "b"])

    def losses(self, x):
        return {"a": x.sum(), "b": 3 * x.square().sum()}

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_step_that_was_skipped_teaches_nothing(self, mode):
        x, method = self.method()
        method.backward(self.losses(x))
        with mode():
            method.observe({"a": x.sum(), "b": x.square().sum()})
        logits = method.state_dict()["logits"]
        assert logits.any()  # and Adam has moments, which would move them further
        method.backward(self.losses(x))
        with mode():
            method.observe(self.losses(x))
        assert torch.equal(method.state_dict()["logits"], logits)

    @pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
    def test_losses_without_a_logarithm_are_named(self, value):
        x, method = self.method()
        losses = self.losses(x) | {"b": x.sum() * value}
        error = ValueError if value < 0 else FloatingPointError
        with pytest.raises(error, match=r"loss of task 'b' is -?\w+"):
            method.backward(losses)
        assert x.grad is None
        assert not method.state_dict()["open"]

    @pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
    def test_losses_without_a_logarithm_are_not_learned_from(self, value):
        x, method = self.method()
        method.backward(self.losses(x))
        method.observe(self.losses(x) | {"b": torch.tensor(value)})
        assert not method.state_dict()["logits"].any()
        assert method.backward(self.losses(x)).isfinite().all()
