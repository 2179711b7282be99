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
    train(model, plain, groups, optimizer, stacked=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen = snapshot(model)
    optimizer.step()  # of other losses, after the loop: the last group does not hold it back
    assert moved(model, seen) == set(TASKS)
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
        ({"a": [], "b": 3, "c": []}, "hold", "head of task 'b' must be a module.*int"),
        ({"a": [], "b": nn.Linear(2, 2), "c": []}, "hold", "'b'.*'weight'.*not in the optimizer"),
        ({"a": [torch.zeros(2)], "b": [], "c": []}, "hold", "'a'.*not in the optimizer"),
        ({"a": [nn.Linear(2, 2).weight * 2], "b": [], "c": []}, "hold", "'a'.*computed from"),
        ({0: [], 1: [], 2: []}, "hold", r"missing or unknown"),
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


class Closure:
    """The ways to take a step: the gradients are made before it, or within."""

    @staticmethod
    def none(optimizer, run):
        run()
        optimizer.step()

    @staticmethod
    def positional(optimizer, run):
        optimizer.step(run)

    @staticmethod
    def keyword(optimizer, run):
        optimizer.step(closure=run)


@pytest.mark.parametrize("outside", ["hold", "coast"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stacked", [True, False])
def test_a_closure_makes_no_difference(outside, kind, stacked):
    finals = {}
    for way in ("none", "positional", "keyword"):
        model = make_model()
        optimizer = OPTIMIZERS[kind](model.parameters())
        groups = fixed_groups()
        groups.attach(optimizer, model.heads, outside=outside)
        for n in range(4):
            x, target = data(n)
            for group in groups:

                def run(model=model, optimizer=optimizer, group=group, x=x, target=target):
                    optimizer.zero_grad()
                    losses = losses_of(model(x), target)
                    loss = group.loss(torch.stack([*losses.values()]) if stacked else losses)
                    loss.backward()
                    return loss

                before = snapshot(model)
                getattr(Closure, way)(optimizer, run)
                if outside == "hold":
                    assert moved(model, before) == set(group.tasks)
        finals[way] = snapshot(model)
    for way in ("positional", "keyword"):
        for name, value in finals["none"].items():
            assert torch.equal(finals[way][name], value), (way, name)


def test_an_optimizer_that_calls_its_closure_twice_holds_in_both():
    """A step of extragradient: the second pass is of the same step, and is not observed."""

    class Twice(torch.optim.SGD):
        def step(self, closure):
            with torch.enable_grad():
                closure()
            super().step()
            with torch.enable_grad():
                closure()
            super().step()

    model = make_model()
    optimizer = Twice(model.parameters(), lr=0.01, momentum=0.9)
    groups = tg.TaskGroups(TASKS, warmup=1000)
    groups.attach(optimizer, model.heads)
    for n in range(4):
        x, target = data(n)
        for group in groups:

            def run(group=group, x=x, target=target):
                optimizer.zero_grad()
                losses = losses_of(model(x), target)
                loss = group.loss(torch.stack([*losses.values()]), again=True)
                loss.backward()
                return loss

            before = snapshot(model)
            optimizer.step(run)
            assert moved(model, before) == set(group.tasks)
    assert groups.affinity.observed.sum() <= 4 * 2 * 3  # two of three steps a batch, three entries


@pytest.mark.parametrize("outside", ["hold", "coast"])
def test_gradients_that_are_held_back_keep_their_identity(outside):
    model = make_model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    groups = fixed_groups()
    groups.attach(optimizer, model.heads, outside=outside)
    x, target = data(0)
    for group in groups:
        optimizer.zero_grad(set_to_none=False)
        group.loss(torch.stack([*losses_of(model(x), target).values()])).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is gradients[name]


class Wrapper:
    """What a trainer puts around an optimizer."""

    def __init__(self, name, optimizer):
        setattr(self, name, optimizer)


def test_wrappers_are_looked_into_or_named():
    model, groups = make_model(), fixed_groups()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for name in ("optimizer", "base_optimizer"):
        handle = groups.attach(Wrapper("optimizer", Wrapper(name, inner)).optimizer, model.heads)
        x, target = data(0)
        group = next(iter(groups))
        group.loss(torch.stack([*losses_of(model(x), target).values()])).backward()
        before = snapshot(model)
        inner.step()
        assert moved(model, before) == set(group.tasks)
        handle.remove()
    for bad in (Wrapper("inner", inner), [inner, None], [], None):
        with pytest.raises(TypeError, match=r"takes a torch\.optim\.Optimizer"):
            groups.attach(bad, model.heads)
    with pytest.raises(ValueError, match="LBFGS"):
        groups.attach(torch.optim.LBFGS(model.parameters()), model.heads)
    with pytest.raises(TypeError, match=r"task: module or parameters.*ModuleList"):
        groups.attach(inner, nn.ModuleList(model.heads.values()))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_heads_in_several_optimizers(one_by_one):
    model, groups = make_model(), fixed_groups()
    optimizers = {t: torch.optim.SGD(model.heads[t].parameters(), lr=0.1) for t in TASKS}
    if one_by_one:
        for task, optimizer in optimizers.items():
            groups.attach(optimizer, {t: model.heads[t] if t == task else [] for t in TASKS})
    else:
        groups.attach([*optimizers.values()], model.heads)
    x, target = data(0)
    for group in groups:
        before = snapshot(model)
        group.loss(torch.stack([*losses_of(model(x), target).values()])).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        assert moved(model, before) == set(group.tasks)
    encoders = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    groups.attach(encoders)
    with pytest.raises(ValueError, match="holds none of the heads"):
        train(model, with_group, groups, encoders, stacked=False)


class TestRows:
    """One linear layer is the head of all tasks, a row each."""

    def make(self, kind, rows=True):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        head = nn.Linear(8, 3)
        heads = {t: nn.Linear(8, 1) for t in TASKS}
        for k, own in enumerate(heads.values()):
            own.weight.data.copy_(head.weight.data[k : k + 1])
            own.bias.data.copy_(head.bias.data[k : k + 1])
        modules = [encoder, head] if rows else [encoder, *heads.values()]
        optimizer = OPTIMIZERS[kind]([p for m in modules for p in m.parameters()])
        return encoder, head, heads, optimizer

    def named(self, head):
        return {t: [head.weight[k], head.bias[k]] for k, t in enumerate(TASKS)}

    @pytest.mark.parametrize("outside", ["hold", "coast"])
    def test_rows_are_as_heads_of_their_own(self, outside):
        finals = []
        for rows in (True, False):
            encoder, head, heads, optimizer = self.make("sgd", rows)
            groups = fixed_groups()
            groups.attach(optimizer, self.named(head) if rows else heads, outside=outside)
            for n in range(6):
                x, target = data(n)
                for group in groups:
                    features = encoder(x)
                    out = head(features).T if rows else [h(features)[:, 0] for h in heads.values()]
                    losses = [
                        (o - y[:, 0]).square().mean() for o, y in zip(out, target, strict=True)
                    ]
                    optimizer.zero_grad()
                    group.loss(torch.stack(losses)).backward()
                    optimizer.step()
            own = torch.cat([torch.cat([h.weight[0], h.bias]) for h in heads.values()])
            shared = torch.cat([torch.cat([w, b[None]]) for w, b in zip(head.weight, head.bias)])  # noqa: B905
            finals.append(shared if rows else own)
        torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", [*OPTIMIZERS, "coupled"])
    def test_rows_outside_hold_with_their_state(self, kind, monkeypatch):
        monkeypatch.setitem(
            OPTIMIZERS, "coupled", lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)
        )
        encoder, head, _, optimizer = self.make(kind)
        groups = fixed_groups()
        groups.attach(optimizer, self.named(head))
        for n in range(4):
            x, target = data(n)
            for group in groups:
                losses = (head(encoder(x)) - target[:, :, 0].T).square().mean(0)
                optimizer.zero_grad()
                group.loss(losses).backward()
                before = [p.detach().clone() for p in head.parameters()]
                states = [
                    {name: s.clone() for name, s in optimizer.state[p].items()}
                    for p in head.parameters()
                ]
                optimizer.step()
                for p, old, state in zip(head.parameters(), before, states, strict=True):
                    for k, task in enumerate(TASKS):
                        inside = task in group.tasks
                        assert torch.equal(p[k], old[k]) != inside
                        for name, value in optimizer.state[p].items():
                            if value.shape != p.shape or inside:
                                continue
                            kept = state[name][k] if name in state else torch.zeros_like(value[k])
                            assert torch.equal(value[k], kept), (name, task)

    def test_slices_views_and_unnamed_rows(self):
        """Blocks of a transposed convolution's channels-last weight; the last one is nobody's."""
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 7, 3).to(memory_format=torch.channels_last)
        named = {t: [layer.weight[2 * k : 2 * k + 2], layer.bias[2 * k : 2 * k + 2]]
                 for k, t in enumerate(TASKS)}  # fmt: skip
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        groups = tg.TaskGroups(TASKS, grouping=tg.Singletons())
        groups.attach(optimizer, named)
        x = torch.randn(2, 2, 5, 5)
        for group in groups:
            out = layer(x)
            losses = torch.stack([out[:, 2 * k : 2 * k + 2].square().mean() for k in range(3)])
            optimizer.zero_grad()
            (group.loss(losses) + out[:, 6].sum()).backward()
            before = layer.weight.detach().clone()
            optimizer.step()
            changed = (layer.weight != before).flatten(1).any(1)
            k = TASKS.index(group.tasks[0])
            assert changed.tolist() == [j // 2 == k or j == 6 for j in range(7)]

    def test_what_cannot_be_held_is_refused(self):
        _, head, _, optimizer = self.make("sgd")
        groups = fixed_groups()
        for heads, said in (
            (dict.fromkeys(TASKS, head), "'a' and 'b' share the parameter 'weight'.*head.weight"),
            ({t: [head.weight] for t in TASKS}, "'a' and 'b' share.*a part of the encoder"),
            ({t: [head.weight[0]] for t in TASKS}, "'a' and 'b' share"),
            ({"a": [head.weight[:2]], "b": [head.weight[1:]], "c": []}, "'a' and 'b' share"),
            ({"a": [head.weight], "b": [head.weight[1]], "c": []}, "'a' and 'b' share"),
            ({t: [head.weight.data[k]] for k, t in enumerate(TASKS)}, "not in the optimizer"),
        ):
            with pytest.raises(ValueError, match=said):
                groups.attach(optimizer, heads)
        groups.attach(optimizer, {"a": [head.weight, head.weight[0]], "b": [], "c": []})

    def test_an_optimizer_that_mixes_rows_is_named(self):
        encoder, head, _, _ = self.make("sgd")
        optimizer = torch.optim.Adafactor([*encoder.parameters(), *head.parameters()])
        groups = fixed_groups()
        groups.attach(optimizer, self.named(head))
        x, target = data(0)
        group = next(iter(groups))
        group.loss((head(encoder(x)) - target[:, :, 0].T).square().mean(0)).backward()
        with pytest.raises(RuntimeError, match=r"Adafactor keeps.*element by element"):
            optimizer.step()


class Table(nn.Module):
    """A head with an embedding of its own, as in a recommender."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=sparse)
        self.out = nn.Linear(8, 1)

    def forward(self, features):
        items, shared = features
        return self.out(torch.cat([self.table(items), shared], 1))


class Items(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=sparse)

    def forward(self, items):
        return items, self.table(items)


TAKE_SPARSE_GRADIENTS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch's Adagrad
class TestSparseGradients:
    """Embeddings with ``sparse=True``, in an optimizer of their own or not."""

    def trained(self, sparse, outside, tables, named=True):
        torch.manual_seed(0)
        model = tg.MultiTaskModel(Items(sparse), {task: Table(sparse) for task in TASKS})
        embeddings = [own for name, own in model.named_parameters() if "table" in name]
        others = [own for name, own in model.named_parameters() if "table" not in name]
        optimizers = [tables(embeddings), torch.optim.Adam(others, lr=0.1)]
        groups = fixed_groups()
        groups.attach(optimizers, model.heads if named else None, outside)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            items = torch.randint(7, (3,), generator=generator)
            for group in groups:
                outputs = model(items, group=group)
                losses = {t: (own - 1).square().mean() for t, own in outputs.items()}
                model.zero_grad()
                group.loss(losses).backward()
                before = snapshot(model)
                for optimizer in optimizers:
                    optimizer.step()
                if outside == "hold":
                    assert moved(model, before) == set(group.tasks)
        return snapshot(model)

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("outside", ["hold", "coast"])
    @pytest.mark.parametrize("kind", TAKE_SPARSE_GRADIENTS)
    def test_the_steps_are_those_of_dense_gradients(self, kind, outside, named):
        sparse = self.trained(True, outside, TAKE_SPARSE_GRADIENTS[kind], named)
        dense = self.trained(False, outside, TAKE_SPARSE_GRADIENTS[kind], named)
        for name, value in dense.items():
            torch.testing.assert_close(sparse[name], value, msg=name)

    def test_under_sparse_adam_no_row_coasts(self):
        """It moves the rows that have a gradient, and no others."""

        def sparse_adam(parameters):
            return torch.optim.SparseAdam(parameters, lr=0.1)

        hold, coast = (self.trained(True, o, sparse_adam) for o in ("hold", "coast"))
        tables = [name for name in hold if "heads" in name and "table" in name]
        own = self.trained(True, "hold", EveryTableApart)  # by the definition of SparseAdam
        assert len(tables) == 3
        for name in tables:
            torch.testing.assert_close(hold[name], own[name])
        assert any(not torch.equal(hold[name], coast[name]) for name in hold)


class EveryTableApart(torch.optim.SparseAdam):
    """SparseAdam in the words of its paper, one row at a time."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state.setdefault(parameter, {"step": 0})
            state["step"] += 1
            gradient = parameter.grad.coalesce()
            for row, value in zip(gradient.indices()[0].tolist(), gradient.values(), strict=True):
                m, v = state.get(row, (torch.zeros(4), torch.zeros(4)))
                m, v = 0.9 * m + 0.1 * value, 0.999 * v + 0.001 * value.square()
                state[row] = m, v
                n = state["step"]
                rate = 0.1 * (1 - 0.999**n) ** 0.5 / (1 - 0.9**n)
                parameter[row] -= rate * m / (v.sqrt() + 1e-8)
