"""A step that is forgotten, or that trains nothing shared, is told once; a right loop is not."""

import warnings

import pytest
import torch
from torch import nn

import taskgroup as tg

TASKS = ["a", "b", "c", "d"]
STILL = "steps changed no loss, so no affinity can be observed"
APART = "steps changed the losses of their own groups alone"


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), *layers)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def losses(self, x):
        z = self.encoder(x)
        return {t: 0.1 + (self.heads[t](z) - k).square().mean() for k, t in enumerate(TASKS)}


class Loop:
    """The natural loop; subclasses do something else, mostly wrong."""

    batches = 60
    layers = ()
    micro_batches = 1

    def options(self):
        return {}

    def __init__(self):
        torch.manual_seed(0)
        self.model = Model(*self.layers)
        self.optimizer = torch.optim.SGD(self.trained(), lr=0.01)
        self.steps = 0

    def trained(self):
        return self.model.parameters()

    def present(self, batch):
        return TASKS

    def given(self, losses, group):
        return losses

    def after_backward(self):
        pass

    def step(self):
        self.optimizer.step()

    def before_batch(self, batch):
        pass

    def told(self):
        groups = tg.TaskGroups(TASKS, warmup=5, **self.options())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in range(self.batches):
                self.before_batch(batch)
                x = torch.randn(16, 5)
                for group in groups.batch(self.present(batch)):
                    self.optimizer.zero_grad()
                    for _ in range(self.micro_batches):
                        losses = self.model.losses(x)
                        losses = {task: losses[task] for task in group.observed}
                        loss = group.loss(self.given(losses, group), share=1 / self.micro_batches)
                        loss.backward()
                    self.after_backward()
                    self.steps += 1
                    self.step()
        assert all(warning.filename == __file__ for warning in caught)  # the loop's own line
        return [str(warning.message) for warning in caught]


class Forgotten(Loop):
    def step(self):
        pass


class ForgottenOfStacked(Forgotten):
    def given(self, losses, group):
        return torch.stack(list(losses.values()))


class ForgottenOfSomeLabels(Forgotten):
    def present(self, batch):
        return [TASKS[batch % 4]] if batch % 2 else TASKS[:3]


class ForgottenSeldomObserved(Forgotten):
    batches = 240

    def options(self):
        return {"observe_every": 4, "groups_per_batch": 1}


class ForgottenWithDropoutAndBatchNorm(Forgotten):
    layers = (nn.BatchNorm1d(8), nn.Dropout(0.5))


class ForgottenOfMicroBatches(Forgotten):
    micro_batches = 4


class ZeroedAfterBackward(Loop):
    def after_backward(self):
        self.optimizer.zero_grad()


class OfAnotherModel(Loop):
    def trained(self):
        return Model().parameters()


class SkippedByAScaler(Loop):
    def step(self):
        if self.steps > 40:
            self.optimizer.step()


class FrozenEncoder(Loop):
    def trained(self):
        self.model.encoder.requires_grad_(False)
        return self.model.heads.parameters()


class EncoderNotInTheOptimizer(Loop):
    def trained(self):
        return self.model.heads.parameters()


class WarmUpFromZero(Loop):
    def options(self):
        return {"grouping": tg.Singletons()}

    def before_batch(self, batch):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.001 * max(0, batch - 2)


class MicroBatches(Loop):
    micro_batches = 4


class DropoutNotReplayed(Loop):
    layers = (nn.Dropout(0.5),)

    def options(self):
        return {"replay_rng": False}


class ScalerThatFindsItsScale(Loop):
    def step(self):
        if self.steps > 15:
            self.optimizer.step()


class ObservesNothing(Forgotten):
    """The losses of one step per batch do not show that it was forgotten."""

    def options(self):
        return {"grouping": tg.Together()}


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        *((loop, STILL) for loop in (Forgotten, ForgottenOfStacked, ForgottenOfSomeLabels)),
        *((loop, STILL) for loop in (ForgottenSeldomObserved, ForgottenOfMicroBatches)),
        *((loop, STILL) for loop in (ForgottenWithDropoutAndBatchNorm, ZeroedAfterBackward)),
        *((loop, STILL) for loop in (OfAnotherModel, SkippedByAScaler)),
        *((loop, APART) for loop in (FrozenEncoder, EncoderNotInTheOptimizer)),
        *((loop, None) for loop in (Loop, WarmUpFromZero, MicroBatches, DropoutNotReplayed)),
        *((loop, None) for loop in (ScalerThatFindsItsScale, ObservesNothing)),
    ],
)
def test_loops(loop, said):
    messages = loop().told()
    assert len(messages) == (said is not None)
    if said is not None:
        assert said in messages[0]


def test_one_batch_of_many_steps_at_a_rate_of_zero_is_a_warm_up():
    tasks = [f"task{k}" for k in range(40)]
    groups = tg.TaskGroups(tasks)
    x = torch.ones((), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(3):
            for group in groups:
                losses = x.square() + torch.arange(1.0, 41)
                (gradient,) = torch.autograd.grad(group.loss(losses), x)
                x.data -= 0.001 * batch * gradient
