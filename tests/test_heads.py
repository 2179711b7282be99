"""Heads outside the group hold or coast, by choice, on every path a model can take."""

import copy
import itertools

import pytest
import torch
from torch import nn

import taskgroup as tg

# Of torch's own making, when it compiles a module whose input has a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

TASKS = ["a", "b", "c"]
OPTIMIZERS = {
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def make_model():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
    return tg.MultiTaskModel(encoder, {task: nn.Linear(8, 2) for task in TASKS})


def data(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(6, 5, generator=generator), torch.randn(3, 6, 2, generator=generator)


def losses_of(outputs, target):
    return {t: (outputs[t] - target[TASKS.index(t)]).square().mean() for t in outputs}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before):
    """The tasks whose head has moved."""
    found = set()
    for name, parameter in model.named_parameters():
        part, task, *_ = name.split(".")
        if part == "heads" and not torch.equal(parameter, before[name]):
            found.add(task)
    return found


def train(model, call, groups, optimizer, *, stacked, batches=4, set_to_none=True, check=None):
    """The loop of the README."""
    for n in range(batches):
        x, target = data(n)
        for group in groups:
            losses = losses_of(call(model, x, group), target)
            optimizer.zero_grad(set_to_none=set_to_none)
            group.loss(torch.stack(list(losses.values())) if stacked else losses).backward()
            before = snapshot(model)
            optimizer.step()
            if check is not None:
                check(group, moved(model, before))


def fixed_groups():
    return tg.TaskGroups(TASKS, grouping=tg.Fixed([["a", "b"], ["c"]]))


def plain(model, x, group):
    return model(x)


def with_group(model, x, group):
    return model(x, group=group)


PATHS = {
    # how the model is called, whether it is compiled, whether losses are stacked
    "plain-dict": (plain, None, False),
    "plain-stacked": (plain, None, True),
    "group-dict": (with_group, None, False),
    "group-stacked": (with_group, None, True),
    "compiled-whole-dict": (plain, "whole", False),
    "compiled-whole-stacked": (plain, "whole", True),
    "compiled-apart-dict": (with_group, "apart", False),
    "compiled-apart-stacked": (with_group, "apart", True),
}


def prepared(path):
    call, compiled, stacked = PATHS[path]
    model = make_model()
    if compiled == "whole":
        whole = torch.compile(model, backend="aot_eager")
        return model, (lambda _, x, group: whole(x)), stacked
    if compiled == "apart":
        model.compile(backend="aot_eager")
    return model, call, stacked


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("path", PATHS)
def test_attached_hold_moves_the_heads_of_the_group_alone(path, kind):
    model, call, stacked = prepared(path)
    groups = fixed_groups()
    optimizer = OPTIMIZERS[kind](model.parameters())
    groups.attach(optimizer, model.heads, outside="hold")
    steps = []

    def check(group, tasks_moved):
        assert tasks_moved == set(group.tasks)
        steps.append(group.tasks)

    train(model, call, groups, optimizer, stacked=stacked, check=check)
    assert len(steps) == 8


@pytest.mark.parametrize(
    "path", ["plain-dict", "group-dict", "group-stacked", "compiled-apart-dict"]
)
def test_these_hold_without_attach(path):
    model, call, stacked = prepared(path)
    optimizer = OPTIMIZERS["adam"](model.parameters())

    def check(group, tasks_moved):
        assert tasks_moved == set(group.tasks)

    train(model, call, fixed_groups(), optimizer, stacked=stacked, check=check)


@pytest.mark.parametrize(
    ("path", "set_to_none"),
    [("plain-stacked", True), ("compiled-whole-dict", True), ("plain-dict", False)],
)
def test_these_coast_without_attach(path, set_to_none):
    """What DESIGN and the README say of the accident that attach() prevents."""
    model, call, stacked = prepared(path)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    seen = []
    train(
        model,
        call,
        fixed_groups(),
        optimizer,
        stacked=stacked,
        set_to_none=set_to_none,
        check=lambda group, tasks_moved: seen.append(tasks_moved),
    )
    assert seen[-1] == set(TASKS)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("path", PATHS)
def test_coast_is_the_same_step_with_zero_gradients(path, kind):
    model, call, stacked = prepared(path)
    reference = copy.deepcopy(model)
    groups = fixed_groups()
    optimizer = OPTIMIZERS[kind](model.parameters())
    groups.attach(optimizer, model.heads, outside="coast")
    train(model, call, groups, optimizer, stacked=stacked)

    # By hand: joint gradients of the group's losses, zeros elsewhere.
    by_hand = OPTIMIZERS[kind](reference.parameters())
    for n, dealt in enumerate(dealt_by_fixed_groups(batches=4)):
        x, target = data(n)
        for tasks in dealt:
            losses = losses_of(prepared_call(path, reference)(x), target)
            total = torch.stack([losses[t] for t in tasks]).sum()
            parameters = list(reference.parameters())
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            by_hand.step()
    for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, expected), name


def prepared_call(path, model):
    """The same forward, compiled or not, so that the comparison is bitwise."""
    return torch.compile(model, backend="aot_eager") if "whole" in path else model


def dealt_by_fixed_groups(batches):
    """The groups that fixed_groups() deals, by batch."""
    groups = fixed_groups()
    dealt = []
    for _ in range(batches):
        dealt.append([])
        for group in groups:
            dealt[-1].append(group.tasks)
            group.skip()
    return dealt


def test_coast_and_hold_differ():
    results = []
    for outside in ("hold", "coast"):
        model = make_model()
        groups = fixed_groups()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        groups.attach(optimizer, model.heads, outside=outside)
        train(model, plain, groups, optimizer, stacked=False)
        results.append(snapshot(model))
    assert any(
        not torch.equal(results[0][name], results[1][name])
        for name in results[0]
        if name.startswith("heads")
    )


def test_heads_are_known_from_the_model_that_ran():
    model = make_model()
    groups = fixed_groups()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    groups.attach(optimizer, outside="coast")
    seen = []
    train(
        model,
        with_group,
        groups,
        optimizer,
        stacked=False,
        check=lambda group, tasks_moved: seen.append(tasks_moved),
    )
    assert seen[-1] == set(TASKS)  # by momentum

    model = make_model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    groups.attach(optimizer)
    with pytest.raises(RuntimeError, match="does not know the heads"):
        train(model, plain, groups, optimizer, stacked=False)


def test_parameter_of_two_heads_moves_with_either():
    model = make_model()
    shared = nn.Parameter(torch.ones(2))
    heads = {task: [*model.heads[task].parameters()] for task in TASKS}
    heads["b"].append(shared)
    heads["c"].append(shared)
    groups = fixed_groups()
    optimizer = torch.optim.SGD([*model.parameters(), shared], lr=0.1)
    groups.attach(optimizer, heads)
    x, target = data(0)
    for group in groups:
        losses = losses_of(model(x), target)
        losses = {t: v * shared.sum() if t != "a" else v for t, v in losses.items()}
        before = shared.detach().clone()
        optimizer.zero_grad()
        group.loss(losses).backward()
        optimizer.step()
        assert not torch.equal(shared, before)  # b is in one group, c in the other


def test_removed_handle_and_steps_outside_the_loop():
    model = make_model()
    groups = fixed_groups()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    handle = groups.attach(optimizer, model.heads)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    optimizer.step()  # no group has been asked for yet
    assert moved(model, before) == set(TASKS)
    handle.remove()
    train(model, plain, groups, optimizer, stacked=True)
    seen = snapshot(model)
    optimizer.step()
    assert moved(model, seen) == set(TASKS)


@pytest.mark.parametrize(
    ("heads", "outside", "said"),
    [
        ({"a": [], "b": []}, "hold", r"\['c'\] are missing or unknown.*empty list"),
        ({"a": [], "b": [], "c": [], "d": []}, "hold", r"\['d'\] are missing or unknown"),
        ({"a": [], "b": ["weight"], "c": []}, "hold", "head of task 'b'.*str"),
        ({"a": [], "b": [], "c": []}, "freeze", "'hold' or 'coast', got 'freeze'"),
    ],
)
def test_bad_attach(heads, outside, said):
    groups = fixed_groups()
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=said):
        groups.attach(optimizer, heads, outside=outside)


def test_frozen_head_stays_without_a_gradient():
    model = make_model()
    model.heads["c"].requires_grad_(False)
    groups = fixed_groups()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    groups.attach(optimizer, model.heads, outside="coast")
    x, target = data(0)
    for group in groups:
        optimizer.zero_grad()
        group.loss(losses_of(model(x), target)).backward()
        optimizer.step()
        assert all(p.grad is None for p in model.heads["c"].parameters())


def test_every_pair_of_paths_gives_the_same_losses():
    """Skipping graphs and heads changes what is computed for a step, not what comes out."""
    finals = {}
    for path in ("plain-dict", "group-dict", "compiled-apart-dict"):
        model, call, stacked = prepared(path)
        grouping = tg.Fixed([["a", "b"], ["c"]])  # a learned one may be another, by the last bit
        groups = tg.TaskGroups(TASKS, grouping=grouping, affinity=tg.ProximalAffinity(decay=0.1))
        optimizer = OPTIMIZERS["adam"](model.parameters())
        train(model, call, groups, optimizer, stacked=stacked, batches=6)
        finals[path] = (snapshot(model), groups.affinity.matrix)
    for one, other in itertools.combinations(finals.values(), 2):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-6)
