"""Joint methods on batches in which each row belongs to one task."""

import inspect

import pytest
import torch
from torch import nn

import taskgroup as tg
from taskgroup.methods.gradient_space import GradientMethod

TASKS = ("a", "b", "c")
ROWS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 0, 2])
METHODS = [
    name
    for name, kind in tg.methods.METHODS.items()
    if inspect.isclass(kind) and issubclass(kind, GradientMethod)
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8)
        )
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in TASKS)

    def forward(self, x, rows):
        features = self.encoder(x)
        outputs = torch.stack([head(features).squeeze(1) for head in self.heads], 1)
        return outputs.gather(1, rows.clamp(min=0)[:, None]).squeeze(1).square()


def setting(name):
    torch.manual_seed(0)
    model = Model()
    return model, tg.methods.find(name)(model.encoder, TASKS), torch.randn(len(ROWS), 8)


def step(name, rows_at_once, scale=None):
    model, method, x = setting(name)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    seen = []
    for _ in range(2):  # the second one has a memory
        torch.manual_seed(1)
        losses = model(x, ROWS)
        model.zero_grad()
        if rows_at_once:
            weights = method.backward(losses, scaler, rows=ROWS)
        else:
            means = {task: losses[k == ROWS].mean() for k, task in enumerate(TASKS)}
            weights = method.backward(means, scaler)
        seen += [weights, *(parameter.grad for parameter in model.parameters())]
    return seen


def test_there_are_methods():
    assert len(METHODS) == 10


@pytest.mark.parametrize("name", METHODS)
def test_the_same_step_as_with_the_means(name):
    for found, wanted in zip(step(name, True), step(name, False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_scaled():
    for found, wanted in zip(step("cagrad", True, 64.0), step("cagrad", False, 64.0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_no_task():
    model, method, x = setting("pcgrad")
    torch.manual_seed(1)
    weights = method.backward(model(x, ROWS), rows=ROWS)
    rows = torch.cat([ROWS, torch.tensor([-1, -1])])
    grads = [parameter.grad for parameter in model.parameters()]
    more = torch.cat([x, torch.randn(2, 8)])
    model.zero_grad()
    torch.manual_seed(1)
    torch.testing.assert_close(method.backward(model(more, rows), rows=rows), weights)
    for parameter, wanted in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_recorder_hears_the_means():
    model, method, x = setting("pcgrad")
    heard = []

    class Listener:
        def begin_loss(self):
            pass

        def losses(self, tasks, values):
            heard.append(values)

        def end_loss(self):
            pass

    method.listen(Listener())
    losses = model(x, ROWS)
    method.backward(losses, rows=ROWS)
    means = torch.stack([losses[k == ROWS].mean() for k in range(3)])
    torch.testing.assert_close(heard[0], means.detach())


def test_a_task_without_rows_is_named():
    model, method, x = setting("pcgrad")
    rows = ROWS.clamp(max=1)
    with pytest.raises(ValueError, match=r"no row of \['c'\]"):
        method.backward(model(x, rows), rows=rows)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mixed_rows_change_nothing():
    model, method, x = setting("pcgrad")
    model.encoder.insert(1, nn.BatchNorm1d(16))
    method = tg.methods.find("pcgrad")(model.encoder, TASKS)
    with pytest.raises(ValueError, match="BatchNorm"):
        method.backward(model(x, ROWS), rows=ROWS)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_losses_by_name_are_not_rows():
    model, method, x = setting("pcgrad")
    losses = model(x, ROWS)
    with pytest.raises(TypeError, match="one loss for each row"):
        method.backward({"a": losses}, rows=ROWS)
