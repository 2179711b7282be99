"""Heads that run as one do what they do one by one."""

import copy

import pytest
import torch
from torch import nn

import taskgroup as tg

TASKS = ["depth", "seg.fine", "keys", "type", "edges", "normal"]
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


class Deep(nn.Module):
    """A head of several layers, from a nest of features to a nest of outputs."""

    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features):
        wide, (narrow, _) = features["maps"]
        out = self.body(wide) * self.scale
        return {"sum": out + narrow[:, :2], "more": [out]}


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        wide = self.linear(x)
        return {"maps": [wide, (wide.tanh(), "label")]}


def total(output):
    if isinstance(output, torch.Tensor):
        return output.square().mean() + 0.1
    return (output["sum"] * output["more"][0]).square().mean() + 0.1


def linear():
    return nn.Linear(3, 4), {task: nn.Linear(4, 2) for task in TASKS}


def deep():
    return Features(), {task: Deep() for task in TASKS}


def of_several_kinds():
    """Two of one kind, three of another, and one alone."""
    heads = {task: Deep(bias=k % 2 == 0) for k, task in enumerate(TASKS)}
    heads["keys"] = Deep(bias=True).double().float()
    heads["type"].body[0] = nn.Linear(4, 5, bias=True)
    return Features(), heads


KINDS = {"linear": linear, "deep": deep, "of several kinds": of_several_kinds}


def both(kind):
    """The same model twice: heads one by one, and as one."""
    torch.manual_seed(0)
    encoder, heads = KINDS[kind]()
    one_by_one = tg.MultiTaskModel(encoder, heads)
    encoder, heads = copy.deepcopy((encoder, heads))
    return one_by_one, tg.MultiTaskModel(encoder, tg.BatchedHeads(heads))


def assert_close(one, other):
    for (name, a), (same, b) in zip(one, other, strict=True):
        assert name == same
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_group_outputs_and_gradients_are_those_of_the_single_heads(kind):
    x = torch.randn(5, 3)
    gradients = []
    for model in both(kind):
        outputs = model(x)
        assert list(outputs) == TASKS
        sum(total(output) for output in outputs.values()).backward()
        gradients.append([(name, p.grad) for name, p in model.named_parameters()])
    assert_close(*gradients)


@pytest.mark.parametrize("called", ["group", "whole"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_groups_is_that_of_the_single_heads(kind, optimizer, called):
    x = torch.randn(5, 3)
    models = both(kind)
    trained = []
    for model in models:
        groups = tg.TaskGroups(
            TASKS,
            grouping=tg.RandomGroups(3, seed=2),
            groups_per_batch=2,
            observe_every=2,
        )
        stepper = OPTIMIZERS[optimizer](model.parameters())
        for batch in range(8):
            for group in groups:
                before = copy.deepcopy({t: head.state_dict() for t, head in model.heads.items()})
                outputs = model(x, group=group) if called == "group" else model(x)
                assert list(outputs) == list(group.observed if called == "group" else TASKS)
                stepper.zero_grad()
                group.loss({task: total(output) for task, output in outputs.items()}).backward()
                stepper.step()
                for task, head in model.heads.items():
                    moved = any((p != before[task][n]).any() for n, p in head.named_parameters())
                    assert moved == (task in group.tasks)  # with momentum of their own
        trained.append(model.named_parameters())
        matrices = groups.affinity.matrix
    assert_close(*trained)
    assert matrices.any()


def test_outputs_come_in_the_order_of_the_losses():
    """Whatever the order of the heads, so that they can be stacked."""
    heads = {task: nn.Linear(4, 2) for task in reversed(TASKS)}
    for given in (heads, tg.BatchedHeads(heads)):
        model = tg.MultiTaskModel(nn.Linear(3, 4), given)
        for group in tg.TaskGroups(TASKS, grouping=tg.Fixed([TASKS[:2], TASKS[2:]])):
            outputs = model(torch.randn(5, 3), group=group)
            assert list(outputs) == list(group.observed)
            stacked = torch.stack([total(output) for output in outputs.values()])
            expected = sum(total(outputs[task]) for task in group.tasks)
            torch.testing.assert_close(group.loss(stacked), expected)


def test_under_autocast_a_task_is_computed_alike_alone_and_with_others():
    _, model = both("linear")
    groups = tg.TaskGroups(TASKS)
    x = torch.randn(5, 3)
    seen = []
    for group in groups:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x, group=group)
        seen.append(outputs)
        group.skip()
    for outputs in seen[1:]:
        for task in TASKS:
            assert torch.equal(outputs[task], seen[0][task])


def test_settings_that_are_lists_are_of_one_kind():
    heads = {task: nn.Conv1d(2, 3, 3, padding="same") for task in TASKS}
    assert len(tg.BatchedHeads(heads)._kinds) == 1
    named = [nn.ModuleDict({name: nn.Linear(2, 3)}) for name in "pq"]
    assert len(tg.BatchedHeads(dict(zip("ab", named, strict=True)))._kinds) == 2


def test_only_the_group_has_a_graph():
    _, model = both("linear")
    groups = tg.TaskGroups(TASKS, grouping=tg.Fixed([TASKS[:2], TASKS[2:]]))
    for group in groups:
        outputs = model(torch.randn(5, 3), group=group)
        assert {t for t, output in outputs.items() if output.requires_grad} == set(group.tasks)
        group.skip()


def test_checkpoints_are_those_of_the_single_heads():
    one_by_one, batched = both("deep")
    assert list(one_by_one.state_dict()) == list(batched.state_dict())
    with torch.no_grad():
        for parameter in one_by_one.parameters():
            parameter.add_(1)
    batched.load_state_dict(one_by_one.state_dict())
    x = torch.randn(5, 3)
    outputs = batched(x)
    for task, output in one_by_one(x).items():
        torch.testing.assert_close(outputs[task]["sum"], output["sum"])


def test_a_copy_of_a_model_has_heads_of_its_own():
    _, model = both("linear")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.heads["keys"].weight.zero_()
        twin.heads["keys"].bias.fill_(3)
    x = torch.randn(5, 3)
    assert (twin(x)["keys"] == 3).all()
    assert (model(x)["keys"] != 3).all()


@pytest.mark.parametrize("called", ["group", "whole"])
def test_gradient_affinity_sees_the_same_gradients(called):
    """And heads that are measured outside the group stay where they are."""
    x = torch.randn(5, 3)
    found = []
    for model in both("linear"):
        affinity = tg.GradientAffinity(model.encoder, decay=1.0)
        for group in tg.TaskGroups(TASKS, affinity=affinity):
            outputs = model(x, group=group) if called == "group" else model(x)
            model.zero_grad()
            group.loss({task: total(output) for task, output in outputs.items()}).backward()
            reached = {t for t, head in model.heads.items() if head.weight.grad is not None}
            assert reached == set(group.tasks)
        found.append(affinity.matrix)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0].any()


def test_frozen_heads_and_heads_without_parameters():
    heads = {task: nn.Linear(4, 2) for task in TASKS[:3]}
    heads |= {task: nn.Flatten() for task in TASKS[3:]}
    heads["keys"].requires_grad_(False)
    model = tg.MultiTaskModel(nn.Linear(3, 4), tg.BatchedHeads(heads))
    sum(total(output) for output in model(torch.randn(5, 3)).values()).backward()
    assert heads["keys"].weight.grad is None
    assert heads["depth"].weight.grad is not None


def test_compiled_the_encoder_is_and_the_heads_run_as_one():
    one_by_one, model = both("linear")
    model.compile(backend="eager")
    x = torch.randn(5, 3)
    outputs = model(x)
    for task, output in one_by_one(x).items():
        torch.testing.assert_close(outputs[task], output)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler
def test_compiled_whole_heads_learn_and_hold():
    one_by_one, model = both("linear")
    x = torch.randn(5, 3)
    compiled = torch.compile(model, backend="aot_eager")
    for call in (one_by_one, compiled):
        outputs = call(x)
        (total(outputs["depth"]) + total(outputs["keys"])).backward()
    for task, head in model.heads.items():
        if task in ("depth", "keys"):
            expected = one_by_one.heads[task].weight.grad
            torch.testing.assert_close(head.weight.grad, expected)
        else:
            assert head.weight.grad is None


def test_buffers_are_refused():
    heads = {task: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)) for task in TASKS}
    with pytest.raises(ValueError, match=r"'depth' has the buffer '1.running_mean'.*plain dict"):
        tg.BatchedHeads(heads)


def test_dropout_is_refused_where_it_draws():
    heads = {task: nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)) for task in TASKS}
    model = tg.MultiTaskModel(nn.Linear(3, 4), tg.BatchedHeads(heads))
    with pytest.raises(RuntimeError, match=r"'depth', 'seg\.fine', .* draw random numbers"):
        model(torch.randn(5, 3))
    model.eval()(torch.randn(5, 3))


def test_an_error_within_a_head_is_its_own():
    model = tg.MultiTaskModel(nn.Linear(3, 5), tg.BatchedHeads(linear()[1]))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(5, 3))


@pytest.mark.parametrize("n", ["all", "observed"])
def test_stacked_losses_of_the_observed_tasks(n):
    """As many as the model gave outputs, or all K; the same step either way, and as a dict."""
    x = torch.randn(5, 3)
    trained = []
    for stacked in (False, True):
        model = both("linear")[1]
        affinity = tg.ProximalAffinity(0.5)
        groups = tg.TaskGroups(
            TASKS,
            groups_per_batch=2,
            observe_every=2,
            affinity=affinity,
            weights=[1, 2, 3, 4, 5, 6],
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for batch in range(6):
            present = TASKS if batch % 3 else TASKS[1:]
            for group in groups.batch(present):
                outputs = model(x, group=group if n == "observed" else None)
                losses = {task: total(output) for task, output in outputs.items()}
                optimizer.zero_grad()
                group.loss(torch.stack([*losses.values()]) if stacked else losses).backward()
                if n == "all":  # with a graph for every head, to which the stack gives zeros
                    for task in set(TASKS) - set(group.tasks):
                        model.heads[task].zero_grad()
                optimizer.step()
        trained.append((model.named_parameters(), affinity.matrix))
    assert_close(*(parameters for parameters, _ in trained))
    torch.testing.assert_close(*(matrix for _, matrix in trained), rtol=1e-5, atol=1e-6)


def test_stacked_losses_of_the_measured_tasks():
    """GradientAffinity on a sample: the stack holds the group and the sample."""
    x = torch.randn(5, 3)
    found = []
    for stacked in (False, True):
        model = both("linear")[1]
        affinity = tg.GradientAffinity(model.encoder, decay=1.0, sample=2)
        groups = tg.TaskGroups(TASKS, affinity=affinity, groups_per_batch=1)
        for batch in range(12):
            for group in groups:
                losses = {task: total(out) for task, out in model(x, group=group).items()}
                assert list(losses) == list(group.observed)
                model.zero_grad()
                group.loss(torch.stack([*losses.values()]) if stacked else losses).backward()
        found.append(affinity.matrix)
    torch.testing.assert_close(*found)
    assert found[0].any()


def test_a_stack_of_another_length_is_told_both():
    groups = tg.TaskGroups(TASKS, observe_every=2, groups_per_batch=2)
    for _ in range(2):
        for group in groups:
            if not group.observes:
                with pytest.raises(ValueError, match=r"floating point \[6\].* or \[1\], those of"):
                    group.loss(torch.ones(3, requires_grad=True))
            group.skip()


def test_names_of_many_tasks_do_not_fill_the_screen():
    tasks = [f"task{k}" for k in range(1000)]
    groups = tg.TaskGroups(tasks, grouping=tg.Together())
    with pytest.raises(ValueError, match=r"'task9', \.\.\. \(1000 in all\)\]") as caught:
        groups.batch(["task0", "none"])
    assert len(str(caught.value)) < 300
    group = next(iter(groups))
    assert len(repr(group)) < 300
