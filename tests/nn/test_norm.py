"""Running statistics move once per batch, as in a joint step."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import taskgroup as tg

TASKS = ["a", "b", "c"]
NORMS = {
    "batch": lambda: nn.BatchNorm1d(8),
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "stateless": lambda: nn.BatchNorm1d(8, track_running_stats=False),
}


def make_model(norm="batch"):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv1d(2, 8, 3), NORMS[norm](), nn.ReLU())
    heads = {
        task: nn.Sequential(nn.Conv1d(8, 8, 1), NORMS[norm](), nn.Conv1d(8, 1, 1)) for task in TASKS
    }
    return tg.MultiTaskModel(encoder, heads)


def data(n):
    return torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(n)) * (n + 1)


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def train(model, groups, batches, call=None, lr=0.1):
    """Also returns what a joint step's forward would have left, batch by batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    joint = copy.deepcopy(model)
    seen = []
    for n in batches:
        joint.load_state_dict(model.state_dict())
        joint(data(n))
        for group in groups:
            outputs = model(data(n), group=group) if call is None else call(group, data(n))
            losses = {t: out.square().mean() + 1 for t, out in outputs.items()}
            optimizer.zero_grad()
            group.loss(losses).backward()
            optimizer.step()
        seen.append((buffers(model), buffers(joint)))
    return seen


@pytest.mark.parametrize("norm", NORMS)
def test_as_in_a_joint_step(norm):
    model = make_model(norm)
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    before = buffers(model)
    for got, joint in train(model, groups, range(3)):
        torch.testing.assert_close(got, joint, rtol=0, atol=0)
    if norm != "stateless":
        assert not torch.equal(got["encoder.1.running_mean"], before["encoder.1.running_mean"])
        assert got["encoder.1.num_batches_tracked"] == (0 if norm == "instance" else 3)


def test_a_head_moves_when_it_runs():
    """On batches that do not observe, a head runs in its own group alone."""
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Fixed([["a", "b"], ["c"]]), observe_every=2)
    train(model, groups, range(4))
    for task in TASKS:
        assert model.heads[task][1].num_batches_tracked == 4
    assert model.encoder[1].num_batches_tracked == 4


def test_a_head_that_did_not_run_keeps_its_statistics():
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons(), groups_per_batch=1, observe_every=2)
    train(model, groups, range(3))
    assert [int(model.heads[task][1].num_batches_tracked) for task in TASKS] == [1, 1, 1]
    assert model.encoder[1].num_batches_tracked == 3


def test_skipped_group_leaves_it_to_the_next():
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    for group in groups:
        if group.first:
            group.skip()
            continue
        model(data(0), group=group)
        group.skip()
    assert model.encoder[1].num_batches_tracked == 1


def test_micro_batches_of_a_group_all_move_them():
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    for group in groups:
        for micro in range(2):
            outputs = model(data(micro), group=group)
            group.loss({t: v.square().mean() + 1 for t, v in outputs.items()}, share=0.5)
    assert model.encoder[1].num_batches_tracked == 2
    assert model.heads["a"][1].num_batches_tracked == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_context_for_a_model_that_is_called_whole(compiled):
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    run = torch.compile(model, backend="eager") if compiled else model

    def call(group, x):
        with tg.statistics_once(model, group):
            return run(x)

    for got, joint in train(model, groups, range(3), call):
        torch.testing.assert_close(got, joint, rtol=0, atol=0)


def test_outputs_and_gradients_are_those_of_training_mode():
    model = make_model()
    other = copy.deepcopy(model)
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    for group in groups:
        outputs = model(data(1), group=group)
        expected = other(data(1))
        for task in TASKS:
            assert torch.equal(outputs[task], expected[task])
        model.zero_grad(), other.zero_grad()
        group.loss({t: v.square().mean() + 1 for t, v in outputs.items()}).backward()
        expected[group.tasks[0]].square().mean().backward()
        torch.testing.assert_close(model.encoder[0].weight.grad, other.encoder[0].weight.grad)


def test_statistics_are_back_after_an_exception():
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    for group in groups:
        with pytest.raises(KeyError), tg.statistics_once(model, group):
            model(data(0))
            raise KeyError
        group.skip()
    assert model.encoder[1].num_batches_tracked == 1
    assert model.state_dict().keys() == make_model().state_dict().keys()


def test_frozen_layers_are_left_alone():
    """They normalise by their running statistics, in every group."""
    model = make_model()
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
    train(model, groups, range(3))
    for part in (model.encoder, *model.heads.values()):
        part[1].eval()
    before = buffers(model)
    train(model, groups, range(2))
    for name, buffer in model.named_buffers():
        assert torch.equal(before[name], buffer), name
    expected = {task: output.detach() for task, output in model(data(0)).items()}
    for group in groups:
        outputs = model(data(0), group=group)
        assert all(torch.equal(outputs[task], expected[task]) for task in TASKS)
        group.skip()


def test_a_look_in_eval_mode_is_not_the_first_run():
    model = make_model()
    for group in tg.TaskGroups(TASKS, grouping=tg.Singletons()):
        model.train(not group.first)
        model(data(0), group=group)
        group.skip()
    assert model.encoder[1].num_batches_tracked == 1


class Scaled(nn.BatchNorm1d):
    """With a buffer of its own, which it reads and writes."""

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


def test_other_buffers_are_as_they_are():
    layer = Scaled(2)
    calls = layer.calls
    for n in range(3):
        for group in tg.TaskGroups(["a", "b"]):
            with tg.statistics_once(layer, group):
                layer(torch.ones(4, 2))
            group.skip()
        assert layer.calls is calls
        assert calls == 2 * (n + 1)
    assert layer.num_batches_tracked == 3


def test_models_are_let_go():
    norm = nn.BatchNorm1d(2)
    for group in tg.TaskGroups(["a", "b"]):
        with tg.statistics_once(norm, group):
            norm(torch.randn(4, 2))
        group.skip()
    gone = weakref.ref(norm)
    del norm
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("norm", ["batch", "cumulative", "instance"])
def test_copies_and_checkpoints_within_it_hold_what_is_kept(norm):
    """A checkpoint at a signal, say. And the context may be entered twice."""
    model = make_model(norm)
    for group in tg.TaskGroups(TASKS, grouping=tg.Singletons()):
        with tg.statistics_once(model, group), tg.statistics_once(model, group):
            model(data(2))
            state = {name: value.clone() for name, value in model.state_dict().items()}
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            assert model.encoder[1].running_mean.data_ptr()  # is one that may be written to
        group.skip()
        after = model.state_dict()
        assert list(state) == list(after)
        for twin in twins:
            assert vars(twin.encoder[1]).keys() == vars(model.encoder[1]).keys()
        for name, value in after.items():
            for found in (state, *(twin.state_dict() for twin in twins)):
                assert torch.equal(found[name], value), name
    moved = copy.deepcopy(model)
    moved(data(3))
    assert not torch.equal(moved.encoder[1].running_mean, model.encoder[1].running_mean)
