import copy
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import taskgroup as tg


def make(optimizer):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3))
    heads = {task: nn.Linear(6, 1) for task in ("a", "b", "c")}
    model = tg.MultiTaskModel(encoder, heads)
    x, y = torch.randn(8, 4), torch.randn(3, 8, 1)

    def losses():
        outputs = model(x)
        return {t: (outputs[t] - y[k]).square().mean() for k, t in enumerate(outputs)}

    return model, optimizer(model.parameters()), losses


class Peculiar(torch.optim.Optimizer):
    """State that is no tensor, some of it outside of ``state``, and steps that change gradients."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.steps = 0
        self.state["all"] = {"gradients": deque(maxlen=2), "numpy": np.zeros(1), "history": []}
        self.master = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.noise = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        group, ours = self.param_groups[0], self.state["all"]
        ours["numpy"] += 1
        ours["history"].append((self.steps, {"lr": group["lr"]}))
        for parameter, master in zip(group["params"], self.master, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
                ours["gradients"].append(parameter.grad.norm().item())
                master -= group["lr"] * parameter.grad * (1 + 0.1 * len(ours["gradients"]))
                master -= 0.01 * torch.rand((), generator=self.noise)
                parameter.copy_(master)
                self.state[parameter]["last"] = self.steps
        group["lr"] *= 0.9


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False, amsgrad=True),
}


def everything(model, optimizer):
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "random": torch.get_rng_state(),
        }
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("trained", [0, 3])
def test_is_what_a_copy_of_the_model_shows(kind, trained):
    """Against copies of model and optimizer, of which only the encoder's step is kept."""
    model, optimizer, losses = make(OPTIMIZERS[kind])
    for _ in range(trained):
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()
    start = everything(model, optimizer)
    got = tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert same(everything(model, optimizer), start)

    for i, task in enumerate(("a", "b", "c")):
        other, twin, its_losses = make(OPTIMIZERS[kind])
        other.load_state_dict(start["model"])
        twin.load_state_dict(copy.deepcopy(start["optimizer"]))
        torch.set_rng_state(start["random"])
        before = its_losses()
        before[task].backward()
        twin.step()
        other.heads.load_state_dict(
            {k[6:]: v for k, v in start["model"].items() if k.startswith("heads.")}
        )
        torch.set_rng_state(start["random"])
        after = its_losses()
        expected = torch.stack([1 - after[t] / before[t] for t in before]).detach()
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-6)


def test_heads_stay_even_where_the_optimizer_would_move_them():
    """Zero gradients, as from attach(outside="coast"), let momentum move the heads: not here."""
    model, optimizer, losses = make(OPTIMIZERS["momentum"])
    sum(losses().values()).backward()
    optimizer.step()  # now there is momentum
    expected = tg.lookahead_affinity(losses, optimizer, model.encoder)

    def coast(*_):
        for parameter in model.heads.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    optimizer.register_step_pre_hook(coast)
    assert torch.equal(tg.lookahead_affinity(losses, optimizer, model.encoder), expected)


def test_first_order_agrees_with_gradient_affinity():
    """For a small plain step the look ahead is lr <g_i, g_k> / L_k."""
    model, _, losses = make(OPTIMIZERS["sgd"])
    model.eval()
    lr = 1e-3
    ahead = tg.lookahead_affinity(losses, torch.optim.SGD(model.parameters(), lr), model.encoder)
    now = losses()
    gradients = tg.task_gradients(now, model.encoder.parameters())
    first_order = torch.zeros(3, 3)
    values = torch.stack(list(now.values())).detach()
    tg.gram_affinity_update_(first_order, gradients, values, decay=1.0, lr=lr)
    torch.testing.assert_close(ahead, first_order, rtol=2e-2, atol=2e-6)


def test_everything_is_restored_when_the_closure_fails():
    model, optimizer, losses = make(OPTIMIZERS["adamw"])
    sum(losses().values()).backward()
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyError("no more data")
        return losses()

    start = everything(model, optimizer)
    with pytest.raises(KeyError, match="no more data"):
        tg.lookahead_affinity(failing, optimizer, model.encoder)
    assert same(everything(model, optimizer), start)


def test_training_goes_on_as_if_nothing_had_happened():
    runs = []
    for looks in (False, True):
        model, optimizer, losses = make(OPTIMIZERS["adamw"])
        for _ in range(3):
            if looks:
                tg.lookahead_affinity(losses, optimizer, model.encoder)
            optimizer.zero_grad()
            sum(losses().values()).backward()
            optimizer.step()
        runs.append(everything(model, optimizer))
    assert same(*runs)


def test_stacked_losses():
    x = torch.zeros(2, requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    optimizer = torch.optim.SGD([x], lr=0.25)
    affinity = tg.lookahead_affinity(lambda: (x - target).square().sum(1), optimizer, [x])
    assert affinity.tolist() == [[0.75, -0.25], [-0.25, 0.75]]
    assert affinity.dtype == torch.float32


def test_losses_that_are_not_positive_have_no_ratio():
    x = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.5)
    affinity = tg.lookahead_affinity(
        lambda: {"a": (x - 1).square().sum(), "b": x.sum() - 1, "c": x.sum() * torch.nan},
        optimizer,
        [x],
    )
    assert affinity[0, 0] == 1.0
    assert affinity[:, 1:].isnan().all()


def test_bad_input_is_named():
    x = torch.zeros(2, requires_grad=True)
    head = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([x, head], lr=0.5)
    good = lambda: {"a": x.square().sum() + 1}  # noqa: E731
    with pytest.raises(ValueError, match="holds none of the shared parameters"):
        tg.lookahead_affinity(good, optimizer, [torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="task 'b' has no graph"):
        tg.lookahead_affinity(lambda: {**good(), "b": torch.ones(())}, optimizer, [x])
    with pytest.raises(ValueError, match="task 'b' must be a floating-point scalar"):
        tg.lookahead_affinity(lambda: {**good(), "b": x * 2}, optimizer, [x])
    with pytest.raises(ValueError, match=r"closure returns must be .*tensor \[K\], .*\[2, 1\]"):
        tg.lookahead_affinity(lambda: x[:, None] * 2, optimizer, [x])
    names = iter("abcdefghij")
    with pytest.raises(ValueError, match="same tasks at every call"):
        tg.lookahead_affinity(lambda: {next(names): good()["a"], "z": good()["a"]}, optimizer, [x])
    for losses, got in (([x.sum()], "list"), (1.0, "float")):
        with pytest.raises(TypeError, match=rf"closure returns must be .*; got {got}"):
            tg.lookahead_affinity(lambda losses=losses: losses, optimizer, [x])
    for losses in ({}, x[:0]):
        with pytest.raises(ValueError, match="closure returns must hold the loss of at least one"):
            tg.lookahead_affinity(lambda losses=losses: losses, optimizer, [x])
    with pytest.raises(ValueError, match=r"task 'b' must be a .* got float; .*\.item\(\)"):
        tg.lookahead_affinity(lambda: {**good(), "b": 0.5}, optimizer, [x])
    with pytest.raises(ValueError, match=r"task 'b' must be .* got torch.int64 of shape \[\]"):
        tg.lookahead_affinity(lambda: {**good(), "b": torch.ones((), dtype=int)}, optimizer, [x])
    with pytest.raises(TypeError, match=r"its parameters, model.encoder for instance; got a tuple"):
        tg.lookahead_affinity(good, optimizer, nn.Linear(1, 1).named_parameters())
    with pytest.raises(TypeError, match=r"got generator; pass a torch.optim.Optimizer"):
        tg.lookahead_affinity(good, nn.Linear(1, 1).parameters(), [x])


class Sam(torch.optim.Optimizer):
    """As davda54/sam: its closure is optional by its signature, and asserted."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        self.param_groups[0]["params"][0].data.add_(1)
        assert closure is not None, "Sharpness Aware Minimization requires closure"


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sam])
def test_optimizers_that_need_a_closure_are_refused(kind):
    model, _, losses = make(OPTIMIZERS["sgd"])
    optimizer = kind(model.parameters())
    start = everything(model, optimizer)
    with pytest.raises(ValueError, match=f"step of {kind.__name__} needs a closure.*optim.SGD"):
        tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert same(everything(model, optimizer), start)


def test_other_errors_of_a_step_are_those_of_the_optimizer():
    x = nn.Embedding(3, 1, sparse=True)
    optimizer = torch.optim.Adam(x.parameters())
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        tg.lookahead_affinity(lambda: {"a": x(torch.tensor([1])).sum()}, optimizer, x)


def test_state_of_any_kind_is_restored_where_it_is():
    """Others may hold it: a schedule, a captured graph, the recorder of a run."""
    model, optimizer, losses = make(Peculiar)
    for _ in range(2):
        sum(losses().values()).backward()
        optimizer.step()

    def inside():
        ours = optimizer.state["all"]
        objects = [optimizer.state, ours, ours["history"], ours["gradients"], optimizer.master]
        objects += [optimizer.param_groups, optimizer.param_groups[0], *optimizer.master]
        return [id(part) for part in objects]

    def values():
        return copy.deepcopy(
            [
                {k: v for k, v in optimizer.state["all"].items() if k != "gradients"},
                list(optimizer.state["all"]["gradients"]),
                [optimizer.state[p] for p in model.parameters()],
                optimizer.master,
                optimizer.steps,
                optimizer.param_groups[0]["lr"],
                optimizer.noise.get_state(),
                [p.grad for p in model.parameters()],
            ]
        )

    before, where = values(), inside()
    first = tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert inside() == where
    assert same(values(), before)
    assert torch.equal(tg.lookahead_affinity(losses, optimizer, model.encoder), first)
    assert len(optimizer.state["all"]["history"]) == 2


def test_states_made_by_a_step_are_taken_away_again():
    model, optimizer, losses = make(OPTIMIZERS["adamw"])
    state = optimizer.state
    tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert optimizer.state is state
    assert len(state) == 0


def test_gradients_are_each_parameters_own():
    """autograd.grad gives both parameters one tensor, which an optimizer may write into."""

    class Halving(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)
            return super().step(closure)

    def affinity(kind):
        a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
        return tg.lookahead_affinity(
            lambda: {"sum": (a + b).sum(), "a": a.sum()}, kind([a, b], lr=0.2), [a, b]
        )

    torch.testing.assert_close(affinity(Halving), affinity(torch.optim.SGD) / 2)


def test_shared_parameters_named_twice_or_alone():
    x = torch.zeros(2, requires_grad=True)
    closure = lambda: {"a": (x - 2).square().sum(), "b": (x - 1).square().sum()}  # noqa: E731
    once = tg.lookahead_affinity(closure, torch.optim.SGD([x], lr=0.1), [x])
    for shared in ([x, x], x, iter([x]), [x, torch.zeros(1)]):
        optimizer = torch.optim.SGD([x], lr=0.1)
        assert torch.equal(tg.lookahead_affinity(closure, optimizer, shared), once)


def test_sparse_gradients():
    torch.manual_seed(0)
    table = nn.Embedding(5, 2, sparse=True)
    rows, targets = torch.tensor([1, 3, 3]), torch.randn(2, 3, 2)
    closure = lambda: (table(rows) - targets).square().mean((1, 2))  # noqa: E731
    sparse = tg.lookahead_affinity(closure, torch.optim.SGD(table.parameters(), lr=0.1), table)
    table.sparse = False
    dense = tg.lookahead_affinity(closure, torch.optim.SGD(table.parameters(), lr=0.1), table)
    torch.testing.assert_close(sparse, dense)
    table.sparse = True
    adam = torch.optim.SparseAdam(list(table.parameters()))
    before = table.weight.clone()
    assert tg.lookahead_affinity(closure, adam, table).isfinite().all()
    assert torch.equal(table.weight, before)
    assert len(adam.state) == 0


@pytest.mark.parametrize("around", [True, False])
def test_mixed_precision(around):
    """Also inside one autocast block, which keeps its copies of the weights from before a step."""
    model, optimizer, losses = make(lambda p: torch.optim.SGD(p, lr=1.0))
    model.eval()
    exact = tg.lookahead_affinity(losses, optimizer, model.encoder)

    def low():
        with torch.autocast("cpu", torch.bfloat16, enabled=not around):
            return losses()

    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        got = tg.lookahead_affinity(losses if around else low, optimizer, model.encoder)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0.1, atol=0.03)
    assert exact.abs().max() > 0.1


def test_under_another_default():
    """Of dtype, of device, and of gradients."""
    model, optimizer, losses = make(OPTIMIZERS["adamw"])
    expected = tg.lookahead_affinity(losses, optimizer, model.encoder)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            got = tg.lookahead_affinity(losses, optimizer, model.encoder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)
    assert got.dtype == torch.float32


def test_a_schedule_does_not_take_it_for_a_step():
    model, optimizer, losses = make(OPTIMIZERS["sgd"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    lr = optimizer.param_groups[0]["lr"]
    tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert optimizer.param_groups[0]["lr"] == lr
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()
    sum(losses().values()).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_hooks_on_gradients_see_none():
    """Optimizers in the backward pass take their steps there."""
    model, optimizer, losses = make(OPTIMIZERS["sgd"])
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert seen == []


def test_optimizers_that_a_trainer_has_wrapped():
    """As Lightning's and Accelerate's, which step only where their trainer runs."""

    class Wrapper(torch.optim.SGD):
        def __init__(self, optimizer):
            self.__dict__ |= optimizer.__dict__ | {"optimizer": optimizer}

        def step(self, closure=None):
            raise AssertionError

    model, optimizer, losses = make(OPTIMIZERS["momentum"])
    expected = tg.lookahead_affinity(losses, optimizer, model.encoder)
    assert torch.equal(tg.lookahead_affinity(losses, Wrapper(optimizer), model.encoder), expected)
