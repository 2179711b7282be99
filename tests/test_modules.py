"""MultiTaskModel runs the heads a step needs, with a graph where it needs one."""

import copy

import pytest
import torch
from torch import nn

import taskgroup as tg

TASKS = ["depth", "seg.fine", "keys", "type"]  # a dot, and names that nn.ModuleDict refuses


class Features(nn.Module):
    """Features as a nest of tensors and something else."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x, scale=1.0):
        h = self.linear(x) * scale
        return {"maps": [h, (h.tanh(), "label")]}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.calls = []

    def forward(self, features):
        h, (tanh, _) = features["maps"]
        self.calls.append((torch.is_grad_enabled(), h.requires_grad))
        return self.linear(h + tanh)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tg.MultiTaskModel(Features(), {task: Head() for task in TASKS})


def test_without_a_group_every_head_runs_with_a_graph(model):
    outputs = model(torch.ones(2, 3), scale=2.0)
    assert list(outputs) == TASKS
    assert all(output.requires_grad for output in outputs.values())
    assert not torch.equal(outputs["depth"], model(torch.ones(2, 3))["depth"])


def test_with_a_group_others_run_without_a_graph_or_not_at_all(model):
    groups = tg.TaskGroups(TASKS, groups_per_batch=1, observe_every=2, warmup=99)
    full = {task: output.detach() for task, output in model(torch.ones(2, 3)).items()}
    for n in range(4):
        for group in groups:
            for head in model.heads.values():
                head.calls.clear()
            outputs = model(torch.ones(2, 3), group=group)
            assert set(outputs) == set(TASKS if n % 2 == 0 else group.tasks)
            for task, output in outputs.items():
                assert torch.equal(output, full[task])
                assert output.requires_grad == (task in group.tasks)
                inside = task in group.tasks
                assert model.heads[task].calls == [(inside, inside)]
            for task in set(TASKS) - set(outputs):
                assert model.heads[task].calls == []
            group.skip()


def test_encoder_runs_once_and_gets_its_gradient_from_the_group_alone(model):
    groups = tg.TaskGroups(TASKS, grouping=tg.Fixed([["depth", "keys"], ["seg.fine"], ["type"]]))
    for group in groups:
        expected = copy.deepcopy(model)
        x = torch.ones(2, 3)
        outputs = model(x, group=group)
        group.loss({task: output.square().mean() for task, output in outputs.items()}).backward()
        sum(expected(x)[task].square().mean() for task in group.tasks).backward()
        weight = model.encoder.linear.weight
        torch.testing.assert_close(weight.grad, expected.encoder.linear.weight.grad)
        model.zero_grad()


def test_dropout_draws_the_same_masks_whatever_the_group():
    torch.manual_seed(0)
    model = tg.MultiTaskModel(
        nn.Linear(3, 64), {task: nn.Sequential(nn.Dropout(), nn.Linear(64, 1)) for task in TASKS}
    )
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    seen = []
    for group in groups:
        outputs = model(torch.ones(4, 3), group=group)
        group.loss({task: output.square().mean() for task, output in outputs.items()})
        seen.append(torch.stack([outputs[task].detach() for task in TASKS]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_heads_are_a_mapping_and_a_module(model):
    assert list(model.heads) == TASKS
    assert len(model.heads) == 4
    assert "seg.fine" in model.heads
    assert model.heads["seg.fine"] is dict(model.heads.items())["seg.fine"]
    with pytest.raises(KeyError):
        model.heads["unknown"]
    assert {model.heads: 1}[model.heads] == 1  # hashable, as modules are
    assert not model.eval().heads["keys"].training


def test_state_dict_round_trip(model):
    state = model.state_dict()
    assert "heads.seg/fine.linear.weight" in state
    other = tg.MultiTaskModel(Features(), {task: Head() for task in TASKS})
    other.load_state_dict(state)
    x = torch.ones(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(model(x).values(), other(x).values(), strict=True))
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x)["type"], model(x)["type"])
    assert clone.heads["type"] is not model.heads["type"]


def test_bad_models_and_groups(model):
    with pytest.raises(ValueError, match="at least one head"):
        tg.MultiTaskModel(nn.Identity(), {})
    with pytest.raises(TypeError, match="head of task 'a' must be a module, got int"):
        tg.MultiTaskModel(nn.Identity(), {"a": 3})
    with pytest.raises(ValueError, match=r"'\.' and '/'"):
        tg.MultiTaskModel(nn.Identity(), {"a.b": nn.Identity(), "a/b": nn.Identity()})
    group = next(iter(tg.TaskGroups([*TASKS, "surplus"], grouping=tg.Together())))
    with pytest.raises(ValueError, match=r"\['surplus'\], which have no head"):
        model(torch.ones(2, 3), group=group)
