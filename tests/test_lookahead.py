import copy

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


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
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
    if isinstance(a, list):
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
    with pytest.raises(ValueError, match="task 'b' must be a scalar"):
        tg.lookahead_affinity(lambda: {**good(), "b": x * 2}, optimizer, [x])
    with pytest.raises(ValueError, match=r"\{task: scalar\} or a tensor \[K\], got \[2, 1\]"):
        tg.lookahead_affinity(lambda: x[:, None] * 2, optimizer, [x])
    names = iter("abcdefghij")
    with pytest.raises(ValueError, match="same tasks at every call"):
        tg.lookahead_affinity(lambda: {next(names): good()["a"], "z": good()["a"]}, optimizer, [x])
