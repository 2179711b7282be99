"""Heads that run as one do what they do one by one, or say why they cannot."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

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
        if called == "whole":  # all heads of a kind have a gradient then
            groups.attach(stepper, model.heads)
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
    assert tg.BatchedHeads(heads)._sorted.kinds == [TASKS]
    named = [nn.ModuleDict({name: nn.Linear(2, 3)}) for name in "pq"]
    assert not tg.BatchedHeads(dict(zip("ab", named, strict=True)))._sorted.kinds


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
    """And heads that are measured outside the group get none, or zeros where all heads run."""
    x = torch.randn(5, 3)
    found = []
    for model in both("linear"):
        affinity = tg.GradientAffinity(model.encoder, decay=1.0)
        for group in tg.TaskGroups(TASKS, affinity=affinity):
            outputs = model(x, group=group) if called == "group" else model(x)
            model.zero_grad()
            group.loss({task: total(output) for task, output in outputs.items()}).backward()
            gradients = {t: head.weight.grad for t, head in model.heads.items()}
            if called == "group":
                assert {t for t, g in gradients.items() if g is not None} == set(group.tasks)
            assert {t for t, g in gradients.items() if g is not None and g.any()} == {*group.tasks}
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
def test_compiled_whole_heads_learn():
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
            assert not head.weight.grad.any()


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
                with pytest.raises(ValueError, match=r"tensor \[6\].* or \[1\], those of"):
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


class Twice(nn.Module):
    """One layer on two paths, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(4, 4)
        self.body = nn.Sequential(layer, nn.Tanh(), layer)
        self.out = nn.Linear(4, 4)
        self.out.weight = layer.weight

    def forward(self, x):
        return self.out(self.body(x))


class Rich(nn.Module):
    """Several outputs, of which some are no tensors; a parameter without use, and one in a list."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(2))])
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = self.norm(x).square()
        return {"p": self.out(x).softmax(-1), "q": x[:, :2] * self.scales[0], "n": None, "k": 3}


class Recurrent(nn.Module):
    """It lists its parameters a second time."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(4, 2, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, None])[0]


def only_out(head, x):
    return head.out(x)


UNUSUAL = {
    "one layer on two paths": Twice,
    "several outputs": Rich,
    "no bias": lambda: nn.Sequential(nn.Linear(4, 2, bias=False), nn.Sigmoid()),
    "perceptron": lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5)),
    "recurrent": lambda: Recurrent(),
    "parameters without use": lambda: Parts(only_out),
}


class Parts(nn.Module):
    """A head that is given by a function."""

    def __init__(self, run):
        super().__init__()
        self.run, self.out, self.inner = run, nn.Linear(4, 5), nn.Linear(5, 2)
        self.cell = nn.LSTMCell(4, 2)

    def forward(self, x):
        return self.run(self, x)


def pair(make):
    """The same model twice, heads one by one and as one."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    one_by_one = tg.MultiTaskModel(encoder, {task: make() for task in TASKS})
    return one_by_one, batched(one_by_one)


def batched(model):
    model = copy.deepcopy(model)
    return tg.MultiTaskModel(model.encoder, tg.BatchedHeads(dict(model.heads)))


def tensors(outputs):
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def assert_alike(models, run, rtol=1e-5, atol=1e-6, zeros=False):
    """What ``run(model)`` returns, and the gradients it leaves.

    None where the others have None; with ``zeros``, zeros may stand there as well.
    """
    found = []
    for model in models:
        before = dict(model.named_parameters())
        torch.manual_seed(1)
        values = run(model)
        after = dict(model.named_parameters())
        assert list(before) == list(after)
        assert all(after[name] is before[name] for name in before)
        found.append((values, {name: p.grad for name, p in after.items()}))
    for (value, gradients), (other, others) in itertools.pairwise(found):
        for one, same in zip(tree_leaves(value), tree_leaves(other), strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, same, rtol=rtol, atol=atol)
            else:
                assert one == same
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, others[name], rtol=rtol, atol=atol)
            else:
                assert others[name] is None or (zeros and not others[name].any())


def outputs_and_a_backward_pass(model, dtype=None):
    """Of a step on two tasks that needs the losses of all."""
    used = ["depth", "keys"]
    groups = tg.TaskGroups(TASKS, grouping=tg.Fixed([used, [t for t in TASKS if t not in used]]))
    group = next(group for group in groups if "depth" in group.tasks or group.skip())
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(torch.randn(5, 3), group=group)
    used = tensors([outputs["depth"], outputs["keys"]])
    sum(output.float().square().mean() for output in used).backward()
    return tree_leaves(outputs)


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_heads(make):
    models = pair(make)
    assert_alike(models, outputs_and_a_backward_pass)
    assert_alike(models, outputs_and_a_backward_pass)  # the first forward is a special one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["one layer on two paths", "several outputs", "perceptron"])
def test_autocast_gives_the_same_dtypes(kind, dtype):
    """Values to the rounding of 16 bit: 8 bits of bfloat16, a few operations in a row."""
    assert_alike(
        pair(UNUSUAL[kind]), lambda model: outputs_and_a_backward_pass(model, dtype), 3e-2, 3e-2
    )


def test_after_autocast_outputs_are_float32_again():
    _, model = pair(lambda: nn.Linear(4, 2))
    outputs_and_a_backward_pass(model, torch.bfloat16)
    assert {output.dtype for output in outputs_and_a_backward_pass(model)} == {torch.float32}


@pytest.mark.parametrize("shared", ["head", "layer", "with the encoder"])
def test_parameters_that_tasks_share(shared):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    heads = {task: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for task in TASKS}
    if shared == "head":
        heads["keys"] = heads["depth"]
    elif shared == "layer":
        heads["keys"][0] = heads["depth"][0]
    else:
        heads["keys"][0].weight = encoder[1].weight
    model = tg.MultiTaskModel(encoder, heads)
    assert_alike((model, batched(model)), outputs_and_a_backward_pass)


def old_style(function):
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    return Old.apply(function)


CANNOT = {
    "gradient reversal": lambda head, x: head.out(old_style(x)),
    "recurrent cell": lambda head, x: head.cell(x)[0],
    "checkpointing": lambda head, x: checkpoint(head.out, x, use_reentrant=False),
    "reentrant checkpointing": lambda head, x: checkpoint(head.out, x, use_reentrant=True),
    "item": lambda head, x: head.out(x) * head.out.bias.sum().item(),
    "a condition": lambda head, x: head.out(x) if head.out.bias.sum() > 0 else x,
    "an object": lambda head, x: torch.distributions.Normal(head.out(x), 1.0, validate_args=False),
    "an attribute": lambda head, x: setattr(head, "last", x.mean()) or head.out(x),
    "noise": lambda head, x: head.out(x + torch.randn_like(x)),
}


@pytest.mark.filterwarnings("ignore:.*requires_grad=True")  # of reentrant checkpointing
@pytest.mark.parametrize("run", CANNOT.values(), ids=CANNOT)
def test_what_cannot_be_mapped_names_the_cure(run):
    one_by_one, model = pair(lambda: Parts(run))
    before = dict(model.named_parameters())
    one_by_one(torch.randn(5, 3))
    for _ in range(1 if run is CANNOT["an attribute"] else 2):
        with pytest.raises(RuntimeError, match=r"\['depth', 'seg\.fine', .*plain dict"):
            model(torch.randn(5, 3))
    assert all(p is before[name] for name, p in model.named_parameters())


SCALES = {}


class Hidden(nn.Module):
    """What sets two heads apart is nowhere in them."""

    def __init__(self, scale):
        super().__init__()
        self.out = nn.Linear(4, 2)
        SCALES[id(self.out.weight)] = scale

    def forward(self, x):
        return self.out(x) * SCALES.get(id(self.out.weight), 1)


def test_other_outputs_are_never_passed_on():
    torch.manual_seed(0)
    heads = tg.BatchedHeads({"a": Hidden(2), "b": Hidden(3)})
    with pytest.raises(RuntimeError, match=r"not those of the single heads.*plain dict"):
        heads(torch.randn(5, 4))


def hooked(head):
    head.register_forward_hook(lambda *_: None)
    return head


REFUSED = {
    "forward hook": (lambda: hooked(nn.Linear(4, 2)), "hooks on Linear"),
    "inner hook": (lambda: nn.Sequential(hooked(nn.Linear(4, 2))), "hooks on Linear at '0'"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 2)), "parametrizations of"),
    "uninitialized": (lambda: nn.LazyLinear(2), "LazyLinear"),
    "sparse": (lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True)), "sparse Embedding at '0'"),
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 2)), "compiled RecursiveScriptModule"),
    "compiled": (lambda: torch.compile(nn.Linear(4, 2), backend="eager"), "compiled Optimized"),
    "statistics": (lambda: nn.BatchNorm1d(4), "buffer 'running_mean'"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_when_made(case):
    make, words = case
    with pytest.raises(ValueError, match=f"head of task 'b' has .*{words}.*plain dict"):
        tg.BatchedHeads({"a": nn.Linear(4, 2), "b": make()})


def test_layers_without_statistics_are_no_buffers():
    assert_alike(
        pair(lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))),
        outputs_and_a_backward_pass,
    )


class Switch(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.act, self.factor = nn.Linear(4, 2), nn.Tanh(), 1.0

    def forward(self, x):
        out = self.act(self.out(x)) * self.factor
        return out if self.training else out + 1


def replace(head):
    head.act = nn.Sigmoid()


def set_factor(head):
    head.factor = 3.0


def set_tensor(head):
    head.factor = torch.tensor([2.0, 3.0])


def new_layer(head):
    head.out = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        head.out[0].weight.fill_(0.5)


EDITS = {
    "eval": nn.Module.eval,
    "freeze": lambda head: head.requires_grad_(False),
    "freeze a part": lambda head: head.out.weight.requires_grad_(False),
    "another activation": replace,
    "a number": set_factor,
    "a tensor": set_tensor,
    "a layer": new_layer,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_heads_edited_afterwards(edit):
    models = pair(Switch)
    for model in models:
        model(torch.randn(5, 3))
        edit(model.heads["keys"])
    assert_alike(models, outputs_and_a_backward_pass)
    requires = [[o.requires_grad for o in m.heads(torch.randn(5, 4)).values()] for m in models]
    assert requires[0] == requires[1]


def test_a_hook_added_afterwards_is_refused():
    _, model = pair(lambda: nn.Linear(4, 2))
    model(torch.randn(5, 3))
    handle = model.heads["keys"].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'keys' has hooks on Linear.*plain dict"):
        model(torch.randn(5, 3))
    handle.remove()
    model(torch.randn(5, 3))


def test_a_head_that_raises_loses_nothing():
    """Its own error, on the first forward and later."""

    def run(head, x):
        if len(x) == 3:
            raise KeyError("three")
        return head.out(x)

    _, model = pair(lambda: Parts(run))
    before = dict(model.named_parameters())
    for _ in range(2):
        with pytest.raises(KeyError, match="three"):
            model(torch.randn(3, 3))
        model(torch.randn(5, 3))
    assert all(p is before[name] for name, p in model.named_parameters())


def slopes(outputs, place):
    return [
        torch.autograd.grad(outputs[task].sum(), place, create_graph=True)[0] for task in outputs
    ]


def penalty(model):
    place = torch.randn(5, 3, requires_grad=True)
    found = slopes(model(place), place)
    (found[0].square().sum() + found[2].sum()).backward()
    return found


def penalty_by_parameter(model):
    place = torch.randn(5, 3, requires_grad=True)
    slope = slopes(model(place), place)[1]
    own = [*model.heads[TASKS[1]].parameters()]
    return torch.autograd.grad(slope.square().sum(), own, allow_unused=True)


def third_order(model):
    place = torch.randn(5, 3, requires_grad=True)
    slope = slopes(model(place), place)[1]
    (second,) = torch.autograd.grad(slope.square().sum(), place, create_graph=True)
    second.square().sum().backward()


def two_passes(model):
    outputs = model(torch.randn(5, 3))
    outputs["depth"].square().sum().backward(retain_graph=True)
    outputs["depth"].square().sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in model.heads["depth"].parameters()]
    model.zero_grad()
    outputs["keys"].square().sum().backward()
    return first


def a_pass_that_fails(model):
    def fail(gradient):
        raise KeyError

    outputs = model(torch.randn(5, 3))
    handle = model.encoder[0].bias.register_hook(fail)
    with pytest.raises(KeyError):
        outputs["depth"].square().sum().backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    outputs["keys"].square().sum().backward()


def single_gradients(model):
    outputs = model(torch.randn(5, 3))
    losses = torch.stack([outputs[task].square().sum() for task in TASKS])
    shared = [*model.encoder.parameters()]
    return torch.autograd.grad(losses, shared, torch.eye(len(TASKS)), is_grads_batched=True)


def written(model):
    outputs = model(torch.randn(5, 3))
    outputs["depth"].mul_(2)
    outputs["keys"].view(-1).square().sum().add(outputs["depth"].square().sum()).backward()


def checkpointed(model):
    for reentrant in (False, True):
        place = torch.randn(5, 3, requires_grad=True)
        outputs = checkpoint(lambda x: tuple(model(x).values()), place, use_reentrant=reentrant)
        outputs[0].square().sum().backward()
    for p in [p for head in [*model.heads.values()][1:] for p in head.parameters()]:
        p.grad = None  # a reentrant checkpoint gives zeros to whatever it ran


PASSES = [
    penalty,
    penalty_by_parameter,
    third_order,
    two_passes,
    a_pass_that_fails,
    single_gradients,
    written,
    checkpointed,
]


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_backward_passes_of_all_sorts(run):
    models = pair(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert_alike(models, run, zeros=True)  # of the heads that run and are not used


def test_a_gradient_for_what_the_used_outputs_depend_on():
    """Tasks that use other outputs of their heads: None or zero for the rest."""

    def run(model):
        outputs = model(torch.randn(5, 3))
        (outputs["depth"]["p"].square().sum() + outputs["keys"]["q"].sum()).backward()

    models = pair(Rich)
    assert_alike(models, run, zeros=True)
    for head in models[1].heads.values():
        assert head.unused.grad is None


def test_within_transforms_of_torch_func():
    torch.manual_seed(0)
    model = tg.MultiTaskModel(nn.Linear(3, 4), {task: nn.Linear(4, 2) for task in "ab"})

    def per_sample(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],))["b"].square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        return gradients(dict(model.named_parameters()), torch.randn(5, 3))

    assert_alike((model, batched(model)), per_sample)


def test_copies_in_the_middle_of_training():
    one_by_one, model = pair(Twice)
    x = torch.randn(5, 3)
    model(x)["depth"].sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(twin.state_dict()) == list(one_by_one.state_dict())
        for task, output in twin(x).items():
            torch.testing.assert_close(output, one_by_one(x)[task])
        with torch.no_grad():
            twin.heads["keys"].out.bias.add_(1)
        torch.testing.assert_close(twin(x)["keys"], one_by_one(x)["keys"] + 1)
        torch.testing.assert_close(model(x)["keys"], one_by_one(x)["keys"])
