"""MultiTaskModel runs the heads a step needs, with a graph where it needs one."""

import copy
import enum
import io
import multiprocessing
import pickle

import numpy as np
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


@pytest.mark.parametrize("how", [tg.MultiTaskModel, lambda _, heads: tg.BatchedHeads(heads)])
def test_heads_that_are_not_named(how):
    layers = [nn.Linear(4, 1), nn.Linear(4, 1)]
    words = r"heads must be \{task: module\}, with tasks named by strings .*, got "
    for heads, got in [
        (nn.ModuleList(layers), "ModuleList"),
        (layers, "list"),
        (nn.Sequential(*layers), "Sequential"),
        (nn.Linear(4, 2), "Linear"),
        (None, "NoneType"),
        (dict(enumerate(layers)), "the task 0"),
        ({("a", "b"): layers[0]}, r"the task \('a', 'b'\)"),
        ({"": layers[0]}, "the task ''"),
    ]:
        with pytest.raises(TypeError, match=words + got):
            how(nn.Identity(), heads)


def test_names_are_plain_strings():
    class Task(str, enum.Enum):
        EDGES = "edges"

    model = tg.MultiTaskModel(
        nn.Identity(), {np.str_("depth"): nn.Linear(4, 1), Task.EDGES: nn.Linear(4, 1)}
    )
    assert [type(task) for task in model.heads] == [str, str]
    assert list(model(torch.ones(2, 4))) == ["depth", "edges"]
    assert next(iter(model.state_dict())) == "heads.depth.weight"
    of_torch = tg.MultiTaskModel(nn.Identity(), nn.ModuleDict(model.heads))
    assert list(of_torch.heads) == ["depth", "edges"]
    assert of_torch.heads["depth"] is model.heads["depth"]


def test_the_encoder_is_a_module():
    with pytest.raises(TypeError, match="encoder must be a module, got dict"):
        tg.MultiTaskModel({"a": nn.Linear(4, 1)}, nn.Identity())


class Field(nn.Module):
    """Features beside the place that they are of."""

    def __init__(self, how=None):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 4), how

    def forward(self, place):
        if self.how == "in the encoder":
            place = place.detach().requires_grad_()
        return {"features": self.layer(place).tanh(), "place": place}


class Energy(nn.Module):
    """An energy, or the forces: its derivative."""

    def __init__(self, forces, norm=nn.Identity):
        super().__init__()
        self.out, self.forces, self.norm = nn.Linear(4, 1), forces, norm()

    def forward(self, given):
        with (
            torch.enable_grad() if self.forces else torch.set_grad_enabled(torch.is_grad_enabled())
        ):
            energy = self.out(self.norm(given["features"]))
            if not self.forces:
                return energy
            return -torch.autograd.grad(energy.sum(), given["place"], create_graph=True)[0]


def places(how):
    """Coordinates, or what has been made of them, and what a derivative is taken of."""
    leaf = torch.randn(5, 3)
    if how == "in the encoder":
        return leaf, leaf
    leaf.requires_grad_()
    return (torch.cat([leaf[:, :1], leaf[:, 1:] * 2], 1) if how == "on the way" else leaf), leaf


def learn(model, run, stacked, attach):
    """Two batches in groups of one; only the parameters of the group may get gradients."""
    groups = tg.TaskGroups(list(model.heads), grouping=tg.Singletons(), seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    if attach:
        groups.attach(optimizer)
    for _ in range(2):
        for group in groups:
            losses = run(model, group)
            assert list(losses) == list(group.observed)
            optimizer.zero_grad()
            group.loss(torch.stack([*losses.values()]) if stacked else losses).backward()
            for task, head in model.heads.items():
                gradients = [p.grad for p in head.out.parameters()]
                assert all(g is None for g in gradients) == (task not in group.tasks)
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("how", ["a leaf", "on the way", "in the encoder"])
def test_heads_that_take_derivatives(how, stacked):
    """The same as called whole and held, and statistics of outer heads move once per batch."""
    torch.manual_seed(0)
    start = tg.MultiTaskModel(
        Field(how), {"charge": Energy(False, lambda: nn.BatchNorm1d(4)), "forces": Energy(True)}
    )
    trained = []
    for whole in (False, True):
        torch.manual_seed(1)
        model = copy.deepcopy(start)

        def run(model, group, whole=whole):
            place, _ = places(how)
            outputs = model(place) if whole else model(place, group=group)
            if whole:
                outputs = {
                    task: output if task in group.tasks else output.detach()
                    for task, output in outputs.items()
                }
            return {task: (output - 1).square().mean() for task, output in outputs.items()}

        trained.append(learn(model, run, stacked, attach=False))
        if not whole:
            assert model.heads["charge"].norm.num_batches_tracked == 2
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("how", ["a leaf", "on the way"])
def test_criteria_that_take_derivatives(how, batched):
    """A physics-informed loss: by itself it learns as by hand, one task after the other."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.act = nn.Linear(4, 1), nn.Tanh()

        def forward(self, x):
            return self.act(self.out(x))

    model = tg.MultiTaskModel(encoder, {task: Head() for task in "uv"})
    by_hand = copy.deepcopy(model)
    if batched:
        model = tg.MultiTaskModel(model.encoder, tg.BatchedHeads(dict(model.heads)))
    order = []

    def losses_of(outputs, leaf):
        return {
            task: torch.autograd.grad(output.sum(), leaf, create_graph=True)[0].square().mean()
            for task, output in outputs.items()
        }

    def run(model, group):
        order.append(group.tasks)
        place, leaf = places(how)
        return losses_of(model(place, group=group), leaf)

    torch.manual_seed(1)
    trained = learn(model, run, stacked=False, attach=False)
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    for n, (task,) in enumerate(order):
        if n % 2 == 0:
            state = torch.get_rng_state()
        torch.set_rng_state(state)  # as replay_rng does
        place, leaf = places(how)
        optimizer.zero_grad()
        losses_of(by_hand(place), leaf)[task].backward()
        optimizer.step()
    for one, other in zip(trained, by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_of_a_network_in_front_keep_the_cheap_path():
    """They require a gradient as well, of parameters alone."""
    front = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = tg.MultiTaskModel(nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in "ab"})
    for group in tg.TaskGroups(["a", "b"]):
        outputs = model(front(torch.randn(5, 3)), group=group)
        assert {t for t, output in outputs.items() if output.requires_grad} == set(group.tasks)
        group.skip()


@pytest.mark.parametrize("heads", [dict, tg.BatchedHeads])
def test_a_derivative_of_what_nobody_sees_names_the_cure(heads):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 1)

        def forward(self, x):
            slope = torch.autograd.grad(self.out(x).sum(), x, create_graph=True)[0]
            return slope.sum()

    model = tg.MultiTaskModel(nn.Linear(3, 4), heads({task: Inner() for task in "ab"}))
    group = next(iter(tg.TaskGroups(["a", "b"])))
    with pytest.raises(RuntimeError, match=r"derivative.*whole, model\(x\)|plain dict"):
        model(torch.randn(5, 3), group=group)


def test_other_errors_of_outer_heads_are_their_own():
    model = tg.MultiTaskModel(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(5, 1)})
    group = next(group for group in tg.TaskGroups(["a", "b"]) if group.skip() or "a" in group.tasks)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(2, 3), group=group)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_torch]


def build(heads=dict):
    torch.manual_seed(0)
    return tg.MultiTaskModel(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh()), heads({task: nn.Linear(4, 2) for task in TASKS})
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler
@pytest.mark.parametrize("twin", COPIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("heads", [dict, tg.BatchedHeads])
def test_a_copy_in_the_middle_of_training(heads, compiled, twin):
    model = build(heads)
    if compiled:
        model.compile(backend="eager")
    x = torch.randn(2, 3)
    for group in tg.TaskGroups(TASKS):
        outputs = model(x, group=group)
        group.loss({t: out.square().sum() for t, out in outputs.items()}).backward()
        other = twin(model)
        assert list(other.state_dict()) == list(model.state_dict())
        expected = {task: output.clone() for task, output in model(x).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for task, output in other(x).items():  # with its own weights
            torch.testing.assert_close(output, expected[task])
        model.load_state_dict(other.state_dict())


def outputs_of(models, x):
    return [
        {task: output.detach().numpy() for task, output in model(x).items()} for model in models
    ]


def test_a_spawned_process():
    models = [build(), build(tg.BatchedHeads)]
    x = torch.ones(2, 3)
    expected = outputs_of(models, x)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(outputs_of, (models, x))
    for here, there in zip(expected, found, strict=True):
        for task in TASKS:
            np.testing.assert_allclose(there[task], here[task], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler
def test_what_is_set_on_a_module_is_compiled_in_place_of_its_class():
    """As Accelerate does for mixed precision; it stays when the call is over."""
    model = build()
    head = model.heads["depth"]
    head.forward = lambda x: nn.functional.linear(x, head.weight) + 5
    patch = vars(head)["forward"]
    model.compile(backend="eager")
    x = torch.randn(2, 3)
    features = model.encoder(x)
    for _ in range(2):
        torch.testing.assert_close(model(x)["depth"], features @ head.weight.T + 5)
        assert vars(head)["forward"] is patch
    other = model.heads["keys"]
    other.forward = lambda x: x[:, :2]  # after it was compiled
    torch.testing.assert_close(model(x)["keys"], features[:, :2])
    assert "forward" not in vars(model.heads["type"])


@pytest.mark.parametrize("heads", [dict, tg.BatchedHeads])
def test_other_defaults_of_torch(heads):
    """Nothing is made on the default device, or in the default dtype, by accident."""
    model = build(heads)
    x = torch.randn(2, 3)
    expected = model(x)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = tg.MultiTaskModel(model.encoder, heads(dict(model.heads)))
            found = again(x)
            sum(output.square().sum() for output in found.values()).backward()
    finally:
        torch.set_default_dtype(before)
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task])
        assert model.heads[task].weight.grad.device.type == "cpu"


class Asked:
    """A step that counts how often it is asked for its tasks."""

    def __init__(self, tasks):
        self.all, self.times = tuple(tasks), 0

    def _tasks(self, n):
        self.times += 1
        return self.all[:n]

    tasks = graph = property(lambda self: self._tasks(1))
    observed = property(lambda self: self._tasks(None))

    def runs_first(self, module):
        return True

    def ran(self, model):
        pass


@pytest.mark.parametrize("heads", [dict, tg.BatchedHeads])
def test_a_step_is_asked_equally_often_for_few_heads_and_many(heads):
    """It lists up to K tasks each time, so asking for every head would take K^2 operations."""
    times = []
    for n_tasks in (3, 30):
        tasks = [f"task{k}" for k in range(n_tasks)]
        model = tg.MultiTaskModel(
            nn.BatchNorm1d(4), heads({task: nn.Linear(4, 1) for task in tasks})
        )
        step = Asked(tasks)
        assert [*model(torch.randn(5, 4), group=step)] == tasks
        times.append(step.times)
    assert times[0] == times[1] <= 6
