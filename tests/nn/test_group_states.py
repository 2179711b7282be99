"""Optimizer state per group: as one optimizer for every group, and the mean where groups change."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import taskgroup as tg
from taskgroup.nn.mean_state import mean_entry
from tests.loop.test_signals import handled
from tests.ranks import on_ranks
from tests.states import assert_same

TASKS = ["a", "b", "c", "d"]
FIXED = [["a", "b"], ["c"], ["d"]]
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.1),
    "momentum, foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "momentum, fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
}


class Model(nn.Module):
    """An encoder; a layer after it that only tasks a and c reach; a head for each task."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.some = nn.Linear(7, 7)
        self.heads = nn.ModuleDict({task: nn.Linear(7, 1) for task in TASKS})
        self.to(device, dtype)

    def forward(self, x):
        features = self.encoder(x)
        more = self.some(features)
        return {t: h(more if t in "ac" else features)[:, 0] for t, h in self.heads.items()}

    def shared(self):
        return [*self.encoder.parameters(), *self.some.parameters()]


def losses_of(model, n, own=slice(None)):
    """The losses of batch n, or of a part of it."""
    generator = torch.Generator().manual_seed(n)
    like = next(model.parameters())
    x = torch.randn(16, 5, generator=generator).to(like)[own]
    y = torch.randn(16, len(TASKS), generator=generator).to(like)[own]
    return {
        task: (output - y[:, TASKS.index(task)]).square().mean()
        for task, output in model(x).items()
    }


def same(model, other):
    return all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def scripted(*partitions, repeat=1, **settings):
    """Groups that change as named; the first partition holds during the warm-up."""
    rows = [p for p in partitions for _ in range(repeat)]
    labels = iter([[next(i for i, g in enumerate(p) if t in g) for t in TASKS] for p in rows])

    def grouping(matrix):
        return next((torch.tensor(row) for row in labels), None)

    return tg.TaskGroups(TASKS, grouping=grouping, **{"warmup": 0, **settings})


class Loop:
    """The loop of the README with a state for every group."""

    def __init__(
        self, kind="adam", groups=None, dtype=torch.float32, attach=True, device="cpu", **options
    ):
        self.model = Model(dtype, device)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.groups = groups or tg.TaskGroups(TASKS, grouping=tg.Fixed(FIXED))
        if attach:
            self.attach(**options)

    def attach(self, **options):
        options = {"shared_state": "group", **options}
        return self.groups.attach(self.optimizer, self.model.heads, **options)

    def train(self, batches):
        return [step for n in batches for step in self.batch(n)]

    def batch(self, n, present=TASKS):
        for group in self.groups.batch(present):
            self.optimizer.zero_grad()
            loss = group.loss(losses_of(self.model, n))
            loss.backward()
            self.optimizer.step()
            yield group.tasks, loss.item()

    def states(self):
        """How many states there are, that in the optimizer among them."""
        (own,) = self.groups.state_dict()["optimizers"]
        return len(own["states"])


class OneOptimizerEach:
    """The reference: every group of a fixed partition has an optimizer of its own."""

    def __init__(self, kind, device="cpu"):
        self.model = Model(device=device)
        heads = self.model.heads
        self.optimizers = {
            tuple(group): OPTIMIZERS[kind](
                [*self.model.shared(), *(p for task in group for p in heads[task].parameters())]
            )
            for group in FIXED
        }

    def step(self, n, tasks):
        self.model.zero_grad()
        losses = losses_of(self.model, n)
        sum(losses[task] for task in tasks).backward()
        self.optimizers[tasks].step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fixed_groups_are_as_one_optimizer_for_each(kind):
    """Also for parameters that some groups give no gradient."""
    loop, reference = Loop(kind), OneOptimizerEach(kind)
    for n in range(5):
        for tasks, _ in loop.batch(n):
            reference.step(n, tasks)
    assert same(loop.model, reference.model)
    if kind != "momentum, fused":  # torch steps on no parameter before or after its first step
        together = Loop(kind, shared_state="all")
        together.train(range(5))
        assert same(loop.model, together.model) == (kind == "sgd")


class HandAdam:
    """Adam on the shared parameters, which remembers estimates without bias for every task.

    With them it remembers the number of steps, for each parameter: a parameter without a gradient
    takes none.
    """

    LR, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8

    def __init__(self, parameters):
        self.parameters = parameters
        self.memory = {task: ("nobody", [None] * len(parameters)) for task in TASKS}

    @torch.no_grad()
    def step(self, group, gradients):
        names = {self.memory[task][0] for task in group}
        if names == {group}:
            state = self.memory[group[0]][1]
        else:
            state = [self.mean(i, group) for i in range(len(self.parameters))]
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            state[i] = self.after(state[i], gradient)
            first, second, _ = state[i]
            parameter -= self.LR * first / (second.sqrt() + self.EPS)
        for task in group:
            self.memory[task] = (group, list(state))

    def mean(self, i, group):
        known = [self.memory[task][1][i] for task in group if self.memory[task][1][i] is not None]
        if not known:
            return None
        return [sum(part) / len(known) for part in zip(*known, strict=True)]

    def after(self, state, gradient):
        estimates, count = [gradient, gradient**2], 0
        if state is not None:
            *before, count = state
            moments = [m * (1 - beta**count) for m, beta in zip(before, self.BETAS, strict=True)]
        else:
            moments = [torch.zeros_like(gradient)] * 2
        estimates = [
            (beta * m + (1 - beta) * new) / (1 - beta ** (count + 1))
            for m, new, beta in zip(moments, estimates, self.BETAS, strict=True)
        ]
        return [*estimates, count + 1]


PARTITIONS = (
    [["a"], ["b"], ["c"], ["d"]],
    [["a", "b"], ["c", "d"]],
    [["a", "b", "c"], ["d"]],  # two members with one state, one with another
    [["a", "c", "d"], ["b"]],
    [["a", "b", "c", "d"]],
    [["a", "b"], ["c", "d"]],  # both from one state
    [["a"], ["b", "c"], ["d"]],  # with partial labels, "a" takes no step as this group
    [["a", "b"], ["c", "d"]],
    [["a", "d"], ["b", "c"]],
)


@pytest.mark.parametrize("all_labels", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
def test_where_groups_change_it_is_adam_from_the_mean_of_the_members(all_labels, options):
    """With partial labels, the states differ in the number of their steps."""
    groups = scripted(*PARTITIONS, repeat=2)
    loop = Loop(groups=groups, dtype=torch.float64, attach=False)
    loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=HandAdam.LR, **options)
    loop.attach()
    other = Model(torch.float64)
    shared = other.shared()
    by_hand = HandAdam(shared)
    heads = torch.optim.Adam(other.heads.parameters(), lr=HandAdam.LR)
    changes = set()
    for n in range(2 * len(PARTITIONS)):
        present = TASKS
        if not all_labels:
            present = [t for k, t in enumerate(TASKS) if (n + k) % 3]
            present = [t for t in present if t != "a" or n not in (12, 13)]
        for tasks, _ in loop.batch(n, present):
            heads.zero_grad()
            losses = losses_of(other, n)
            sum(losses[task] for task in tasks).backward(retain_graph=True)
            total = sum(losses[task] for task in tasks)
            gradients = torch.autograd.grad(total, shared, allow_unused=True)
            (group,) = (g for g in groups.partition if tasks[0] in g)
            by_hand.step(group, gradients)
            heads.step()
        changes.add(tuple(groups.partition))
    assert len(changes) == len({str(p) for p in PARTITIONS})
    for one, two in zip(loop.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


def test_momentum_of_a_new_group_is_the_mean():
    loop = Loop("momentum", scripted([["a"], ["b"], ["c", "d"]], [["a", "c", "d"], ["b"]]))
    loop.train([0])
    (own,) = loop.groups.state_dict()["optimizers"]
    buffers = {}
    at = [id(p) for p in loop.model.parameters()].index(id(loop.model.encoder[0].weight))
    for group, state in zip(own["groups"], own["states"], strict=True):
        entry = state.get(at) or loop.optimizer.state[loop.model.encoder[0].weight]
        buffers[tuple(group)] = entry["momentum_buffer"].clone()
    before = loop.model.encoder[0].weight.detach().clone()
    for group in loop.groups:
        loop.model.zero_grad()
        group.loss(losses_of(loop.model, 1)).backward()
        before = loop.model.encoder[0].weight.detach().clone()
        gradient = loop.model.encoder[0].weight.grad.clone()
        loop.optimizer.step()
        moved = before - loop.model.encoder[0].weight.detach()
        mean = buffers[1,]
        if group.tasks == ("a", "c", "d"):
            mean = (buffers[0,] + 2 * buffers[2, 3]) / 3
        torch.testing.assert_close(moved, 0.01 * (0.9 * mean + 0.9 * gradient))


def test_a_momentum_that_has_not_begun_does_not_count_in_a_mean():
    """SGD of earlier versions of torch saved None for it."""
    begun = torch.tensor([1.0, -2.0])
    entries = [({"momentum_buffer": None}, 3), ({"momentum_buffer": begun}, 1)]
    mean = mean_entry(entries, None)["momentum_buffer"]
    assert torch.equal(mean, begun)
    assert mean is not begun


def test_states_are_exchanged_without_copies():
    loop = Loop()
    loop.train(range(2))

    def addresses():
        (own,) = loop.groups.state_dict()["optimizers"]
        entries = [entry for state in own["states"] for entry in state.values()]
        entries += loop.optimizer.state.values()
        return sorted(t.data_ptr() for entry in entries for t in entry.values())

    before = addresses()
    loop.train(range(2, 6))
    assert addresses() == before


def tensors_of(shape):
    """The number of tensors of this shape that there are."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)
    return sum(type(one) in kinds and one.shape == shape for one in gc.get_objects())


def test_memory_does_not_grow_with_regroupings():
    groups = tg.TaskGroups(TASKS, grouping=tg.RandomGroups(2, seed=1))
    loop = Loop(groups=groups)
    before = tensors_of((7, 5))  # the first weight has this shape
    partitions = set()
    for n in range(200):
        loop.train([n])
        partitions.add(tuple(groups.partition))
        assert loop.states() == 2  # once all groups of the partition have stepped
    assert len(partitions) > 4
    assert tensors_of((7, 5)) == before + 1 + 2 * 2  # the gradient, and two moments for each group


def test_there_are_as_many_states_as_groups_and_never_more_than_tasks():
    loop = Loop(groups=scripted(*PARTITIONS[1:], warmup=2))
    seen = []
    for n in range(2 + len(PARTITIONS[1:])):
        for _ in loop.batch(n):
            pass
        seen.append(loop.states())
        (own,) = loop.groups.state_dict()["optimizers"]
        named = {tuple(TASKS[k] for k in group) for group in own["groups"]}
        assert named == set(loop.groups.partition)
    assert seen == [4, 4, *(len(p) for p in PARTITIONS[1:])]


def test_it_starts_from_the_state_that_the_optimizer_has():
    """Attached in the middle of a training, or with a state that was loaded after it."""
    trained = Loop(shared_state="all")
    trained.train(range(3))
    saved = copy.deepcopy(trained.optimizer.state_dict())
    weights = copy.deepcopy(trained.model.state_dict())

    def loaded(loop):
        loop.model.load_state_dict(weights)
        loop.optimizer.load_state_dict(copy.deepcopy(saved))
        return loop

    late = loaded(Loop(attach=False))
    late.attach()
    early = loaded(Loop())
    reference = OneOptimizerEach("adam")
    reference.model.load_state_dict(weights)
    for optimizer in reference.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                at = [id(p) for p in reference.model.parameters()].index(id(parameter))
                if at in saved["state"]:
                    optimizer.state[parameter] = copy.deepcopy(saved["state"][at])
    for n in range(3, 7):
        for (tasks, _), _ in zip(late.batch(n), early.batch(n), strict=True):
            reference.step(n, tasks)
    assert same(late.model, reference.model)
    assert same(early.model, reference.model)


def test_without_the_option_nothing_is_saved_and_after_remove_the_state_is_shared_again():
    loop = Loop(shared_state="all")
    loop.train(range(2))
    assert "optimizers" not in loop.groups.state_dict()
    loop, other = Loop(attach=False), Loop(attach=False)
    handle = loop.attach()
    handle.remove()
    other.attach(shared_state="all")
    assert loop.train(range(4)) == other.train(range(4))
    assert "optimizers" not in loop.groups.state_dict()
    loop.attach()  # again


def saved(loop, path):
    tg.checkpoint.save(
        path,
        {
            "model": loop.model.state_dict(),
            "optimizer": loop.optimizer.state_dict(),
            "groups": loop.groups.state_dict(),
        },
    )
    return tg.checkpoint.load(path)


LOADS = {
    "optimizer first": ("attach", "optimizer", "groups"),
    "groups first": ("attach", "groups", "optimizer"),
    "attached last": ("groups", "optimizer", "attach"),
    "attached between": ("groups", "attach", "optimizer"),
}


@pytest.mark.parametrize("order", LOADS)
@pytest.mark.parametrize("kind", ["adamw, amsgrad", "adamw, fused", "momentum"])
@pytest.mark.parametrize("stop", [1, 5])
def test_resumed_it_goes_on_bitwise(order, kind, stop, tmp_path):
    def made(**options):
        groups = tg.TaskGroups(TASKS, warmup=3, affinity=tg.ProximalAffinity(decay=0.3))
        return Loop(kind, groups, **options)

    whole = made()
    expected = whole.train(range(12))
    first = made()
    trace = first.train(range(stop))
    state = saved(first, tmp_path / "checkpoint.pt")
    assert state["optimizer"].keys() == whole.optimizer.state_dict().keys()
    first.train(range(2))  # what happens after the checkpoint leaves no trace in it
    second = made(attach=False)
    second.model.load_state_dict(state["model"])
    for part in LOADS[order]:
        if part == "attach":
            second.attach()
        else:
            getattr(second, part).load_state_dict(state[part])
    trace += second.train(range(stop, 12))
    assert trace == expected
    assert same(second.model, whole.model)
    assert_same(second.groups.state_dict(), whole.groups.state_dict())
    assert_same(second.optimizer.state_dict(), whole.optimizer.state_dict())


def test_what_was_loaded_is_not_written_to():
    loop = Loop()
    loop.train(range(3))
    state = copy.deepcopy((loop.groups.state_dict(), loop.optimizer.state_dict()))
    weights = copy.deepcopy(loop.model.state_dict())
    ends = []
    for _ in range(2):
        loop.groups.load_state_dict(state[0])
        loop.optimizer.load_state_dict(copy.deepcopy(state[1]))
        loop.model.load_state_dict(weights)
        ends.append(loop.train(range(3, 6)))
    assert ends[0] == ends[1]


def test_a_state_without_those_of_groups_lets_them_start_from_the_optimizer():
    loop, other = Loop(), Loop(shared_state="all")
    loop.train(range(3))
    other.train(range(3))
    loop.groups.load_state_dict(other.groups.state_dict())
    assert loop.states() == 1


def test_a_state_that_does_not_fit_is_refused_whole():
    loop = Loop()
    loop.train(range(3))
    state = loop.groups.state_dict()
    (own,) = state["optimizers"]
    other_shape = copy.deepcopy(own)
    at = next(i for i, entries in enumerate(own["states"]) if entries)
    next(iter(other_shape["states"][at].values()))["exp_avg"] = torch.zeros(2)
    before = copy.deepcopy(loop.groups.state_dict())
    for wrong in (
        {**own, "of_task": own["of_task"][:-1]},
        {**own, "of_task": [9] * 4},
        {**own, "states": own["states"][:-1]},
        {**own, "states": [{99: {}}, *own["states"][1:]]},
        {name: part for name, part in own.items() if name != "current"},
        other_shape,
    ):
        with pytest.raises(ValueError, match="do not fit the Adam: attach optimizers of the same"):
            loop.groups.load_state_dict({**state, "optimizers": [wrong]})
        assert_same(loop.groups.state_dict(), before)
    two = Loop(attach=False)
    parts = [two.model.encoder, two.model.some, two.model.heads]
    optimizers = [torch.optim.Adam(part.parameters()) for part in parts]
    two.groups.attach(optimizers, two.model.heads, shared_state="group")
    with pytest.raises(ValueError, match="for 1 optimizers, and 3 are attached"):
        two.groups.load_state_dict(state)
    late = Loop(attach=False)
    late.groups.load_state_dict(state)
    with pytest.raises(
        RuntimeError, match=r"1 optimizers, and 0 are attached: call groups\.attach"
    ):
        late.train([0])
    assert_same(late.groups.state_dict()["optimizers"], state["optimizers"])
    with pytest.raises(ValueError, match="do not fit"):
        late.groups.attach(optimizers[0], {t: [] for t in TASKS}, shared_state="group")


def test_in_a_signal_handler_the_states_are_those_of_the_moment():
    """As is the optimizer, whose state is that of the group that stepped last."""
    loop, seen = Loop(), []

    def save(number, frame):
        seen.append((loop.groups.state_dict(), loop.optimizer.state_dict()))

    with handled(save) as send:
        for n in range(2):
            for group in loop.groups:
                loop.optimizer.zero_grad()
                group.loss(losses_of(loop.model, n)).backward()
                loop.optimizer.step()
                send()
                own = seen[-1][0]["optimizers"][0]
                stepped = [TASKS.index(task) for task in group.tasks]
                assert own["groups"][own["current"]] == stepped
                assert not own["states"][own["current"]]
    other = Loop()
    other.groups.load_state_dict(seen[-1][0])
    other.optimizer.load_state_dict(seen[-1][1])
    assert_same(other.groups.state_dict()["optimizers"], loop.groups.state_dict()["optimizers"])


def test_several_optimizers():
    loop = Loop(attach=False)
    kinds = ("adam", "momentum", "adam, fused")
    parts = (loop.model.encoder, loop.model.some, loop.model.heads)
    optimizers = [OPTIMIZERS[k](p.parameters()) for k, p in zip(kinds, parts, strict=True)]
    loop.groups.attach(optimizers, loop.model.heads, shared_state="group")
    other = Model()
    parts = (other.encoder, other.some)
    each = {
        tuple(group): [
            *(OPTIMIZERS[k](p.parameters()) for k, p in zip(kinds, parts, strict=False)),
            *(OPTIMIZERS["adam, fused"](other.heads[t].parameters()) for t in group),
        ]
        for group in FIXED
    }
    for n in range(6):
        for group in loop.groups:
            loop.model.zero_grad()
            group.loss(losses_of(loop.model, n)).backward()
            other.zero_grad()
            losses = losses_of(other, n)
            sum(losses[task] for task in group.tasks).backward()
            for optimizer in (*optimizers, *each[group.tasks]):
                optimizer.step()
    assert same(loop.model, other)
    assert len(loop.groups.state_dict()["optimizers"]) == 3


def test_parameters_that_are_added_later():
    loop, reference = Loop(attach=False), OneOptimizerEach("adam")
    loop.optimizer = torch.optim.Adam([*loop.model.encoder.parameters()], lr=0.01)
    loop.optimizer.add_param_group({"params": [*loop.model.heads.parameters()]})
    loop.attach()
    for optimizer in reference.optimizers.values():
        optimizer.param_groups[0]["params"] = [
            p for p in optimizer.param_groups[0]["params"] if not is_of(p, reference.model.some)
        ]
        optimizer.param_groups[0]["weight_decay"] = 0
    for n in range(6):
        if n == 3:
            loop.optimizer.add_param_group({"params": [*loop.model.some.parameters()]})
            for optimizer in reference.optimizers.values():
                optimizer.add_param_group(
                    {"params": [*reference.model.some.parameters()], "weight_decay": 0}
                )
        for tasks, _ in loop.batch(n):
            reference.step(n, tasks)
    assert same(loop.model, reference.model)


def is_of(parameter, module):
    return any(parameter is own for own in module.parameters())


@pytest.mark.parametrize("kind", ["adam", "adam, fused"])
def test_steps_that_a_grad_scaler_skips(kind):
    """Among them the first of a group, whose state is then of no steps."""
    loop, reference = Loop(kind), OneOptimizerEach(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    seen = set()
    for n in range(8):
        for group in loop.groups:
            factor = torch.inf if (group.tasks == ("c",) and n == 0) or n == 4 else 1.0
            seen.add(factor)
            loop.model.zero_grad()
            loss = group.loss(losses_of(loop.model, n))
            scaler.scale(loss * factor).backward()
            scaler.step(loop.optimizer)
            scaler.update(1.0)
            if factor == 1:
                reference.step(n, group.tasks)
    assert len(seen) == 2
    assert same(loop.model, reference.model)


def test_a_skipped_first_step_does_not_count_in_a_mean():
    partition = [["a"], ["b", "c", "d"]]
    loop = Loop("adam, fused", scripted(partition, [TASKS]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for group in loop.groups:
        loop.model.zero_grad()
        loss = group.loss(losses_of(loop.model, 0)) * (torch.inf if len(group.tasks) > 1 else 1)
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update(1.0)
    weight = loop.model.encoder[0].weight
    alone = copy.deepcopy(loop.optimizer.state[weight])  # or that of "a", below
    for state in loop.groups.state_dict()["optimizers"][0]["states"]:
        for entry in state.values():
            if entry["step"] > 0 and entry["exp_avg"].shape == weight.shape:
                alone = copy.deepcopy(entry)
    group = next(iter(loop.groups))
    loop.model.zero_grad()
    group.loss(losses_of(loop.model, 1)).backward()
    gradient = weight.grad.clone()
    loop.optimizer.step()
    assert group.tasks == tuple(TASKS)
    assert loop.optimizer.state[weight]["step"] == alone["step"] + 1 == 2
    torch.testing.assert_close(
        loop.optimizer.state[weight]["exp_avg"], 0.9 * alone["exp_avg"] + 0.1 * gradient
    )


@pytest.mark.parametrize("kind", ["sparse adam", "momentum"])
def test_sparse_gradients(kind):
    make = {
        "sparse adam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
        "momentum": OPTIMIZERS["momentum"],
    }[kind]
    torch.manual_seed(0)
    first = nn.Embedding(9, 3, sparse=True)
    second = copy.deepcopy(first)
    groups = tg.TaskGroups(["a", "b"], grouping=tg.Singletons())
    optimizer = make(first.parameters())
    groups.attach(optimizer, {"a": [], "b": []}, shared_state="group")
    each = {(task,): make(second.parameters()) for task in "ab"}

    def losses(table, n):
        rows = table(torch.tensor([n, n + 1, 3]))
        return {"a": (rows - 1).square().sum(), "b": (rows + 2).square().sum()}

    for n in range(5):
        for group in groups:
            optimizer.zero_grad()
            group.loss(losses(first, n)).backward()
            optimizer.step()
            second.zero_grad()
            losses(second, n)[group.tasks[0]].backward()
            each[group.tasks].step()
    assert same(first, second)


def test_members_whose_group_is_not_labelled_keep_its_state():
    """A group of which some tasks are labelled steps with the state of the whole group."""
    loop, reference = Loop(), OneOptimizerEach("adam")
    for n, present in enumerate([TASKS, ["a", "c"], ["b", "d"], ["a"], TASKS]):
        for tasks, _ in loop.batch(n, present):
            reference.model.zero_grad()
            losses = losses_of(reference.model, n)
            sum(losses[task] for task in tasks).backward()
            whole = next(group for group in reference.optimizers if tasks[0] in group)
            reference.optimizers[whole].step()
    assert same(loop.model, reference.model)


@pytest.mark.parametrize("way", ["positional", "keyword"])
def test_a_closure_makes_no_difference(way):
    plain, loop = Loop(), Loop()
    plain.train(range(5))
    for n in range(5):
        for group in loop.groups:

            def closure(group=group, n=n):
                loop.optimizer.zero_grad()
                loss = group.loss(losses_of(loop.model, n))
                loss.backward()
                return loss

            if way == "positional":
                loop.optimizer.step(closure)
            else:
                loop.optimizer.step(closure=closure)
    assert same(plain.model, loop.model)


@pytest.mark.parametrize("outside", ["hold", "coast"])
def test_heads_are_as_without_it(outside):
    """With plain SGD on the encoder, the state of the heads is all there is."""
    finals = []
    for shared_state in ("all", "group"):
        loop = Loop(attach=False)
        optimizers = [
            torch.optim.SGD(loop.model.shared(), lr=0.01),
            torch.optim.Adam(loop.model.heads.parameters(), lr=0.01),
        ]
        loop.groups.attach(optimizers, loop.model.heads, outside, shared_state)
        for n in range(5):
            for group in loop.groups:
                loop.model.zero_grad()
                group.loss(losses_of(loop.model, n)).backward()
                for optimizer in optimizers:
                    optimizer.step()
        finals.append(loop.model)
    assert same(*finals)


def test_heads_of_the_model_that_ran():
    """They are known at its first step; two models of one encoder have heads of their own."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
    models = [tg.MultiTaskModel(encoder, {t: nn.Linear(7, 1) for t in TASKS}) for _ in range(2)]
    parameters = dict.fromkeys(p for model in models for p in model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    groups = tg.TaskGroups(TASKS, grouping=tg.Fixed(FIXED))
    groups.attach(optimizer, shared_state="group")
    x = torch.randn(4, 5)
    for n in range(4):
        for group in groups:
            optimizer.zero_grad()
            outputs = models[n % 2](x, group=group)
            group.loss({t: out.square().mean() for t, out in outputs.items()}).backward()
            optimizer.step()
    (own,) = groups.state_dict()["optimizers"]
    kept = [entries for entries in own["states"] if entries]
    assert len(kept) == 2
    assert all(len(entries) == len([*encoder.parameters()]) for entries in kept)
    for model in models:
        for parameter in model.heads.parameters():
            assert optimizer.state[parameter]["step"] == 2


def test_lookahead_does_not_exchange_states():
    """Its steps are undone; inside the loop they could be taken for those of the group."""
    plain, loop = Loop(), Loop()
    for n in range(4):
        for run in (plain, loop):
            for group in run.groups:
                group.loss(losses_of(run.model, n))
                if run is loop:
                    tg.lookahead_affinity(
                        lambda n=n: losses_of(loop.model, n), loop.optimizer, loop.model.encoder
                    )
                run.optimizer.zero_grad()
                group.loss(losses_of(run.model, n), again=True).backward()
                run.optimizer.step()
    assert same(plain.model, loop.model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_step():
    ends = []
    for compiled in (False, True):
        x = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        groups = tg.TaskGroups(["a", "b"], grouping=tg.Singletons())
        groups.attach(optimizer, {"a": [], "b": []}, shared_state="group")
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            for group in groups:
                optimizer.zero_grad()
                losses = {"a": (x - 1).square().sum(), "b": (x + 3).square().sum()}
                group.loss(losses).backward()
                step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


class Elsewhere(torch.optim.Optimizer):
    """Keeps its state somewhere else, as wrappers do that shard it over ranks."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.inner = torch.optim.Adam(self.param_groups[0]["params"])

    def step(self, closure=None):
        self.inner.step()


class CountsElsewhere(torch.optim.Optimizer):
    """Adam with one number of steps for all parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, {"betas": (0.9, 0.999)})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            moments = {"exp_avg": parameter.grad, "exp_avg_sq": parameter.grad}
            self.state[parameter].update(moments)


class Sharp(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old_p"] = parameter.detach().clone()


REFUSED = {
    "RMSprop": (torch.optim.RMSprop, r"RMSprop keeps \['square_avg'\].*take Adam, AdamW or SGD"),
    "NAdam": (torch.optim.NAdam, r"NAdam keeps \['mu_product'\]"),
    "Adafactor": (torch.optim.Adafactor, r"Adafactor keeps \['col_var', 'row_var'\]"),
    "SAM": (Sharp, r"Sharp keeps \['old_p'\]"),
    "elsewhere": (Elsewhere, "Elsewhere has no state after its step"),
    "counts elsewhere": (CountsElsewhere, "CountsElsewhere does not count the steps"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_optimizers_are_refused_at_their_first_step(kind):
    make, said = REFUSED[kind]
    loop = Loop(attach=False)
    loop.optimizer = make(loop.model.parameters())
    handle = loop.attach()
    with pytest.raises(ValueError, match=said):
        loop.train([0])
    handle.remove()
    loop.train([1])
    if loop.optimizer.state:
        with pytest.raises(ValueError, match=said):
            loop.attach()


def test_bad_attach():
    loop = Loop(attach=False)
    with pytest.raises(ValueError, match="shared_state must be 'all' or 'group', got 'own'"):
        loop.attach(shared_state="own")
    with pytest.raises(ValueError, match="LBFGS"):
        loop.groups.attach(torch.optim.LBFGS(loop.model.parameters()), shared_state="group")
    handle = loop.attach()
    for again in (loop.optimizer, [loop.optimizer]):
        with pytest.raises(ValueError, match=r"Adam is attached with .* already: call remove\(\)"):
            loop.groups.attach(again, loop.model.heads, shared_state="group")
    handle.remove()
    twice = [loop.optimizer, loop.optimizer]
    with pytest.raises(ValueError, match="already"):
        loop.groups.attach(twice, loop.model.heads, shared_state="group")
    loop.attach()
    loop.train(range(2))


def test_copies_are_not_attached():
    loop = Loop()
    loop.train(range(3))
    for copied in (copy.deepcopy, lambda groups: pickle.loads(pickle.dumps(groups))):
        assert "optimizers" not in copied(loop.groups).state_dict()
    assert loop.states() == 3


def on_rank(rank, world):
    """Train on a part of every batch; the parameters at the end."""
    torch.manual_seed(0)
    loop = Loop(groups=scripted(*PARTITIONS, warmup=2), dtype=torch.float64)
    model = loop.model
    if world > 1:
        loop.model = DistributedDataParallel(model, find_unused_parameters=True)
    own = slice(rank * 16 // world, (rank + 1) * 16 // world)
    for n in range(8):
        for group in loop.groups:
            loop.optimizer.zero_grad()
            group.loss(losses_of(loop.model, n, own)).backward()
            loop.optimizer.step()
    (saved,) = loop.groups.state_dict()["optimizers"]
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        x = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        groups = tg.TaskGroups(TASKS)
        with pytest.raises(ValueError, match=r"SGD holds .* shape \[4\] .*FSDP2, DTensor"):
            groups.attach(torch.optim.SGD([x]), {t: [] for t in TASKS}, shared_state="group")
    return [p.detach() for p in model.parameters()], saved


def test_all_ranks_keep_the_same_states():
    one, two = on_ranks(on_rank, 2)
    assert_same(one, two)
    alone, _ = on_rank(0, 1)
    for parameter, expected in zip(one[0], alone, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9)
