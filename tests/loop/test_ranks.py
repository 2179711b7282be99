"""Several ranks train as one process would, and say so where they cannot."""

import copy
import pickle
import re
import warnings
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import taskgroup as tg
from taskgroup.loop.ranks import Ranks
from tests.ranks import on_ranks

TASKS = ["a", "b", "c", "d"]
SAMPLES = 8  # of a batch, over all ranks
AFFINITIES = {
    "proximal": lambda model: tg.ProximalAffinity(decay=0.1),
    "gradient": lambda model: tg.GradientAffinity(model.encoder, decay=0.1),
}


class Regression:
    """Two pairs of tasks that pull apart; every sample has a label of each task."""

    def __init__(self, dtype=torch.float64, device="cpu"):
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, SAMPLES, 6, generator=generator).to(dtype)
        direction = torch.randn(6, 1, generator=generator).to(dtype)
        noise = torch.randn(60, SAMPLES, 4, generator=generator).to(dtype)
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)
        self.y = 2 * (self.x @ direction).tanh() * signs + 0.3 * noise

    def part(self, n, rank, world):
        """What rank sees of batch n."""
        own = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
        return self.x[n % 60, own].to(self.device), self.y[n % 60, own].to(self.device)


def make_model(dtype=torch.float64, batched=False):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    heads = {task: nn.Linear(8, 1) for task in TASKS}
    return tg.MultiTaskModel(encoder, tg.BatchedHeads(heads) if batched else heads).to(dtype)


# What is sharded by itself, besides the encoder and the whole.
SHARDED = {
    "fsdp": lambda model: model.heads.values(),
    "fsdp, heads with the whole": lambda model: (),
    "fsdp, batched": lambda model: (model.heads,),
}


def wrapped(model, how):
    if how in SHARDED:
        for part in (model.encoder, *SHARDED[how](model), model):
            fully_shard(part)
        return model
    return model if how is None else DistributedDataParallel(model, find_unused_parameters=True)


def losses_of(outputs, y):
    return {
        task: (output[:, 0] - y[:, TASKS.index(task)]).square().mean() + 0.1
        for task, output in outputs.items()
    }


def whole(tensor):
    """A copy of all of it, wherever its parts lie."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def same_everywhere(tensors):
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(flat, other) for other in everyone)


def train(
    rank,
    how=None,
    affinity="proximal",
    grouping=None,
    dtype=torch.float64,
    batches=60,
    call="group",
    outside=None,
    world=1,
    labels=None,
    device="cpu",
):
    """A run of the loop; what it did, and what it left."""
    data = Regression(dtype, device)
    model = make_model(dtype, batched="batched" in (how or "")).to(device)
    wrapper = wrapped(model, how)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    groups = tg.TaskGroups(
        TASKS,
        affinity=AFFINITIES[affinity](model),
        grouping=None if grouping is None else tg.Fixed(grouping),
        warmup=5,
    )
    if outside is not None:
        groups.attach(optimizer, model.heads, outside)
    trace, partitions = [], []
    for n in range(batches):
        x, y = data.part(n, rank, world)
        present = None if labels is None else labels(n, rank)
        for group in groups if labels is None else groups.batch(present):
            outputs = wrapper(x, group=group) if call == "group" else wrapper(x)
            losses = losses_of(outputs, y)
            if labels is not None:
                losses = {t: v if t in present else outputs[t].sum() * 0 for t, v in losses.items()}
            optimizer.zero_grad()
            if call == "stacked":
                losses = torch.stack([losses[task] for task in TASKS])
            group.loss(losses).backward()
            reached = [t for t in TASKS if model.heads[t].weight.grad is not None]
            optimizer.step()
            trace.append((group.tasks, reached))
        partitions.append(groups.partition)
        if how is not None and n % 10 == 9:
            assert same_everywhere([whole(p) for p in model.parameters()])
            assert same_everywhere([groups.affinity.matrix])
    return {
        "trace": trace,
        "partitions": partitions,
        "parameters": [whole(p).cpu() for p in model.parameters()],
        "matrix": groups.affinity.matrix.cpu(),
    }


def assert_alike(got, expected, tolerance):
    assert got["trace"] == expected["trace"]
    assert got["partitions"] == expected["partitions"]
    for one, other in zip(got["parameters"], expected["parameters"], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("how", "world", "affinity", "batches"),
    [
        ("ddp", 2, "proximal", 60),
        ("ddp", 2, "gradient", 60),
        ("ddp", 4, "proximal", 15),
        ("fsdp", 2, "proximal", 60),
        ("fsdp", 2, "gradient", 15),
        ("fsdp", 4, "proximal", 8),
        ("ddp, batched", 2, "gradient", 20),
        ("fsdp, batched", 2, "gradient", 15),
        ("fsdp, heads with the whole", 2, "gradient", 15),
    ],
)
def test_ranks_train_as_one_process(how, world, affinity, batches):
    """In float64, learned groups included, to 1e-9."""
    arguments = (affinity, None, torch.float64, batches)
    one = train(0, None, *arguments)
    ranks = on_ranks(train, how, *arguments, "group", None, world, world=world)
    assert any(1 < len(group) < 4 for group in one["partitions"][-1])  # it has learned
    for found in ranks:
        assert_alike(found, one, 1e-9)
        torch.testing.assert_close(found["matrix"], one["matrix"], rtol=1e-5, atol=1e-7)
        assert all(reached == list(group) for group, reached in found["trace"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_in_float32_with_fixed_groups(how):
    batches = 60 if how == "ddp" else 10
    arguments = ("proximal", [["a", "c"], ["b", "d"]], torch.float32, batches)
    one = train(0, None, *arguments)
    for found in on_ranks(train, how, *arguments, "group", None, 2):
        assert_alike(found, one, 1e-4)


@pytest.mark.parametrize("outside", ["hold", "coast"])
@pytest.mark.parametrize("call", ["plain", "stacked"])
def test_models_that_are_called_whole(call, outside):
    """All heads run; attach() decides what becomes of those outside the group."""
    arguments = ("proximal", None, torch.float64, 10)
    one = train(0, None, *arguments, call, outside)
    for found in on_ranks(train, "ddp", *arguments, call, outside, 2):
        assert found["partitions"] == one["partitions"]
        for got, expected in zip(found["parameters"], one["parameters"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# Which tasks have labels in the part of the batch that a rank sees. Over the batches: all of them;
# d on one rank; a on all but one; b and c nowhere; nothing on rank 0; nothing anywhere.
def labels_by_rank(n, rank):
    missing = {
        1: "" if rank == 1 else "d",
        2: "a" if rank == 0 else "",
        3: "bc",
        4: "abcd" if rank == 0 else "b",
        5: "abcd",
    }.get(n % 6, "")
    return {task for task in TASKS if task not in missing}


def train_by_hand(world, batches):
    """One process: the loss of a task is the mean over the ranks that have it."""
    data = Regression()
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=0.1), warmup=5)
    trace, partitions = [], []
    for n in range(batches):
        present = set().union(*(labels_by_rank(n, rank) for rank in range(world)))
        for group in groups.batch(present):
            parts: dict[str, list] = {task: [] for task in group.observed}
            for rank in range(world):
                x, y = data.part(n, rank, world)
                losses = losses_of(model(x, group=group), y)
                for task in labels_by_rank(n, rank) & set(group.observed):
                    parts[task].append(losses[task])
            optimizer.zero_grad()
            group.loss({t: torch.stack(part).mean() for t, part in parts.items()}).backward()
            optimizer.step()
            trace.append((group.tasks, list(group.tasks)))
        partitions.append(groups.partition)
    return {
        "trace": trace,
        "partitions": partitions,
        "parameters": [whole(p) for p in model.parameters()],
        "matrix": groups.affinity.matrix,
    }


def train_quietly(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an absent task never warns
        return train(*arguments, labels=labels_by_rank)


@pytest.mark.parametrize(("how", "world"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_a_task_is_averaged_over_the_ranks_that_have_it(how, world):
    batches = 40 if (how, world) == ("ddp", 2) else 12
    one = train_by_hand(world, batches)
    arguments = (how, "proximal", None, torch.float64, batches, "group", None, world)
    for found in on_ranks(train_quietly, *arguments, world=world):
        assert_alike(found, one, 1e-9)
        torch.testing.assert_close(found["matrix"], one["matrix"], rtol=1e-5, atol=1e-7)


def measure_partly_labelled(rank):
    """Gradients too are averaged over the ranks that have the label."""
    data = Regression()
    model = make_model()
    groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity(model.encoder, decay=1.0))
    x, y = data.part(0, rank, 2)
    present = TASKS if rank == 1 else ["a", "b", "c"]
    for group in groups.batch(present):
        outputs = model(x, group=group)
        losses = losses_of(outputs, y)
        group.loss({t: losses[t] if t in present else outputs[t].sum() * 0 for t in losses})
    return groups.affinity.matrix


def test_gradients_are_averaged_over_the_ranks_that_have_the_label():
    first, second = on_ranks(measure_partly_labelled)
    assert torch.equal(first, second)
    model, data = make_model(), Regression()
    halves = [losses_of(model(x), y) for x, y in (data.part(0, rank, 2) for rank in range(2))]
    losses = {t: (halves[0][t] + halves[1][t]) / 2 for t in "abc"} | {"d": halves[1]["d"]}
    gram = tg.task_gram(tg.task_gradients(losses, model.encoder.parameters()))
    expected = gram / torch.stack([losses[task].detach() for task in TASKS])
    torch.testing.assert_close(first, expected.float(), rtol=1e-6, atol=1e-8)


def measure_rows(rank, partly):
    """Each rank has rows of its own, and with ``partly`` the first one none of the last task."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    affinity = tg.GradientAffinity(model, decay=1.0)
    groups = tg.TaskGroups(TASKS, affinity=affinity)
    x, rows = rows_of(rank, partly)
    for group in groups.batch([TASKS[k] for k in sorted({*rows.tolist()})]):
        group.loss(model(x).squeeze(1).square(), rows=rows).backward()
    return affinity.matrix, [parameter.detach() for parameter in model.parameters()]


def rows_of(rank, partly):
    torch.manual_seed(rank)
    n_tasks = len(TASKS) - (partly and rank == 0)
    rows = torch.cat([torch.arange(n_tasks), torch.randint(n_tasks, (3 + rank,))])
    return torch.randn(len(rows), 3, dtype=torch.float64), rows


@pytest.mark.parametrize("partly", [False, True])
def test_gradients_of_rows_are_averaged_over_the_ranks(partly):
    (first, params), (second, _) = on_ranks(measure_rows, partly)
    assert torch.equal(first, second)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    model.load_state_dict(dict(zip(("weight", "bias"), params, strict=True)))
    losses = {}
    for k, task in enumerate(TASKS):
        own = [(x, rows == k) for x, rows in (rows_of(rank, partly) for rank in range(2))]
        means = [model(x).squeeze(1)[here].square().mean() for x, here in own if here.any()]
        losses[task] = torch.stack(means).mean()  # over the ranks that have rows of it
    gram = tg.task_gram(tg.task_gradients(losses, model.parameters()))
    expected = gram / torch.stack([losses[task].detach() for task in TASKS])
    torch.testing.assert_close(first, expected.float(), rtol=1e-6, atol=1e-8)


def accumulate(rank, how, world):
    """Two micro-batches to a step, of which the last alone is exchanged."""
    data, model = Regression(), make_model()
    wrapper = wrapped(model, how)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=0.1), warmup=3)
    exchanges = []
    for n in range(12):
        x, y = data.part(n, rank, world)
        for group in groups:
            optimizer.zero_grad()
            for micro in range(2):
                later = how == "ddp" and micro == 0
                with wrapper.no_sync() if later else nullcontext():
                    own = slice(micro, None, 2)
                    losses = losses_of(wrapper(x[own], group=group), y[own])
                    with counted(exchanges):
                        loss = group.loss(losses, share=0.5)
                    loss.backward()
            optimizer.step()
    sizes = [size for _, size in exchanges]
    return [whole(p) for p in model.parameters()], groups.partition, sizes


@contextmanager
def counted(exchanges):
    """Notes every exchange of numbers within."""
    kinds = ("all_reduce", "all_gather", "broadcast", "reduce")
    originals = {name: getattr(dist, name) for name in kinds}

    def noting(name):
        def call(tensor, *args, **kwargs):
            exchanges.append((name, tensor.numel()))
            return originals[name](tensor, *args, **kwargs)

        return call

    for name in kinds:
        setattr(dist, name, noting(name))
    try:
        yield
    finally:
        for name in kinds:
            setattr(dist, name, originals[name])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accumulation_exchanges_losses_once_a_step(how):
    parameters, partition, none = accumulate(0, None, 1)
    assert none == []
    for got, learned, sizes in on_ranks(accumulate, how, 2):
        assert learned == partition
        for one, other in zip(got, parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        # One exchange for each of four groups in the batches before they are learned.
        assert sizes[:16] == [15] * 16
        assert set(sizes) == {15}


def said(function, *arguments):
    """The sentence it raises."""
    try:
        function(*arguments)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def mistakes(rank):
    """What every rank is told, by the mistake made."""
    found = {}
    x, y = Regression().part(0, rank, 2)

    def steps(groups, model=None, present=TASKS, poison=False, leave_out=()):
        model = make_model() if model is None else model
        for group in groups.batch(present):
            outputs = model(x, group=group)
            losses = losses_of(outputs, y)
            for task in set(losses) - set(present):
                losses[task] = outputs[task].sum() * (float("nan") if poison else 0)
            group.loss({t: v for t, v in losses.items() if t not in leave_out}).backward()

    groups = tg.TaskGroups(TASKS, grouping=tg.Together())
    found["leaf"] = None
    for group in groups.batch(TASKS if rank else ["b", "c", "d"]):
        losses = losses_of(make_model()(x), y)
        if rank == 0:
            losses["a"] = torch.zeros((), dtype=torch.float64, requires_grad=True)
            found["leaf"] = said(group.loss, losses)
            found["number"] = said(group.loss, {**losses, "a": 0.0})
        break

    ddp = DistributedDataParallel(make_model())
    found["flag"] = said(steps, tg.TaskGroups(TASKS), ddp)
    static = DistributedDataParallel(make_model(), static_graph=True)
    found["static"] = said(steps, tg.TaskGroups(TASKS), static)
    together = tg.TaskGroups(TASKS, grouping=tg.Together())
    found["together"] = said(steps, together, ddp)  # every head has a gradient: nothing is missing

    found["seed"] = said(steps, tg.TaskGroups(TASKS, seed=rank))
    found["tasks"] = said(steps, tg.TaskGroups(TASKS[: 2 + rank]), None, ["a"])
    found["settings"] = said(steps, tg.TaskGroups(TASKS, observe_every=1 + rank))
    median = tg.AffinityPropagation(preference=0.1 * rank)
    found["settings of the grouping"] = said(steps, tg.TaskGroups(TASKS, grouping=median))
    sampled = tg.GradientAffinity([torch.ones(1)], sample=2 + rank)
    found["settings of the affinity"] = said(steps, tg.TaskGroups(TASKS, affinity=sampled))
    found["weights"] = said(steps, tg.TaskGroups(TASKS, weights=[1, 1, 1, 1 + rank]))

    loaded = tg.TaskGroups(TASKS)
    state = loaded.state_dict()
    state["affinity"]["matrix"] += rank
    loaded.load_state_dict(state)
    found["state"] = said(steps, loaded)

    drifted = tg.TaskGroups(TASKS)
    steps(drifted)
    drifted._rounds.partition = [(0, 1), (2, 3)] if rank else [(0, 2), (1, 3)]
    found["drift"] = said(steps, drifted)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(tg.TaskGroups(TASKS), None, TASKS if rank else ["b", "c", "d"], True)
    found["poison"] = [str(warning.message) for warning in caught]

    sharded = make_model()
    for part in (sharded.encoder, *sharded.heads.values(), sharded):
        fully_shard(part)
    groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity(sharded.encoder))
    found["heads"] = said(lambda: [g.loss(losses_of(sharded(x), y)) for g in groups])
    found["batched"] = said(
        lambda: tg.task_gradients(
            losses_of(sharded(x), y), sharded.encoder.parameters(), batched=True
        )
    )
    found["batched heads"] = said(wrapped(make_model(batched=True), "fsdp"), x)

    groups = tg.TaskGroups(TASKS)
    if rank == 0:  # it does not get as far as the exchange of losses, which the other would wait in
        found["missing"] = said(steps, groups, None, ["b"], False, "a")
    else:
        next(groups.batch(TASKS))
    return found


def out_of_step(rank, how, settings, present):
    """One rank passes over a group, in a batch that need not be observed."""
    model = make_model()
    ddp = wrapped(model, "ddp")
    groups = tg.TaskGroups(TASKS, **SETTINGS[settings](model))
    x, y = Regression().part(0, rank, 2)

    def loop():
        for n in range(6):
            for group in groups if present is None else groups.batch(present):
                if rank == 0 and n == 2 and (group.first if how == "first" else group.last):
                    group.skip()
                    continue
                model.zero_grad()
                group.loss(losses_of(ddp(x, group=group), y)).backward()

    return said(loop)


SETTINGS = {
    "observed": lambda model: {},
    "seldom observed": lambda model: {"observe_every": 4},
    "fixed": lambda model: {"grouping": tg.Fixed([["a", "b"], ["c", "d"]]), "groups_per_batch": 1},
    "gradients": lambda model: {"affinity": tg.GradientAffinity(model.encoder, every=10)},
}


@pytest.mark.parametrize(
    ("how", "settings", "present"),
    [
        ("last", "observed", TASKS),  # the other is at its next exchange of labels meanwhile
        ("last", "seldom observed", None),
        ("first", "fixed", None),
        ("first", "gradients", None),
    ],
)
def test_a_rank_out_of_step_is_told_on_every_rank(how, settings, present):
    for sentence in on_ranks(out_of_step, how, settings, present):
        assert re.search("another place of the loop|step on different groups", sentence)
        assert "Loop over the same TaskGroups on every rank" in sentence


def measure_a_part(rank, how):
    """Whether measuring the gradients on a part of the encoder leaves those of the step alone."""
    found = []
    for measures in (True, False):
        model = wrapped(make_model(), how)
        shared = list(model.encoder.parameters())[1:]
        affinity = tg.GradientAffinity(shared) if measures else tg.ProximalAffinity()
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        x, y = Regression().part(0, rank, 2)
        for group in groups:
            group.loss(losses_of(model(x, group=group), y)).backward()
        found.append([whole(p.grad) for p in model.parameters()])
    return found


def test_measuring_a_part_of_sharded_parameters():
    for measured, plain in on_ranks(measure_a_part, "fsdp"):
        for got, expected in zip(measured, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def compiled(rank):
    """Graphs, and outputs, of sharded heads of twelve sizes."""
    from torch._dynamo.testing import CompileCounter  # which every rank of every test would import

    model = tg.MultiTaskModel(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()), {f"t{k}": nn.Linear(8, 1 + k) for k in range(12)}
    )
    for part in (model.encoder, *model.heads.values(), model):
        fully_shard(part)
    counter = CompileCounter()
    x = torch.ones(2, 6)
    expected = {task: output.detach() for task, output in model(x).items()}
    model.compile(backend=counter)
    for group in tg.TaskGroups(list(model.heads), seed=1):
        outputs = model(x, group=group)
        group.loss({t: output.square().mean() + 1 for t, output in outputs.items()}).backward()
        assert all(torch.equal(outputs[task], expected[task]) for task in outputs)
    return counter.frame_count


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_sharded_models_compile():
    assert on_ranks(compiled) == [25, 25]


def mixed_dtypes(rank):
    """Labels of another dtype on one rank make its losses float64."""
    groups = tg.TaskGroups(["a", "b"])
    x = torch.ones((), requires_grad=True)
    for group in groups:
        scale = torch.tensor(2.0, dtype=torch.float64 if rank else torch.float32)
        group.loss({t: x * scale[None].sum() for t in group.observed})
        x.data.mul_(0.5)
    return groups.affinity.matrix


def test_losses_of_another_dtype_on_one_rank():
    first, second = on_ranks(mixed_dtypes)
    assert torch.equal(first, second)
    assert first.any()


def test_every_mistake_is_told_on_every_rank():
    for rank, found in enumerate(on_ranks(mistakes)):
        assert "wrap the model with find_unused_parameters=True." in found["flag"]
        assert "static_graph=True" in found["static"]
        assert found["together"] is None
        for part in ("seed", "tasks", "settings", "weights", "state"):
            assert f"The ranks differ in the {part}" in found[part], part
            assert "same arguments on every rank" in found[part]
        for part in ("grouping", "affinity"):
            assert "The ranks differ in the settings" in found[f"settings of the {part}"]
        assert f"The ranks step on different groups; rank {rank} steps on" in found["drift"]
        if rank == 0:
            assert "task 'a' depends on no output: without a label" in found["leaf"]
            assert "task 'a' must be a floating-point scalar tensor, got float" in found["number"]
            assert "task 'a' is missing: without a label on this rank" in found["missing"]
            assert "output.sum() * 0" in found["missing"]
            (sentence,) = found["poison"]
            assert "task 'a' is nan: on a rank where it has no label" in sentence
        else:
            assert found["poison"] == []
        assert "call the MultiTaskModel with group=group" in found["heads"]
        assert "without batched=True" in found["batched"]
        assert "fully_shard(model.heads)" in found["batched heads"]


def gradients_of_shards(rank):
    """Sharded gradients of single tasks; what was in .grad of the shared parameters stays."""
    model = wrapped(make_model(), "fsdp")
    x, y = Regression().part(0, rank, 2)
    shared = list(model.encoder.parameters())
    sum(losses_of(model(x), y).values()).backward()
    kept = [whole(p.grad) for p in shared]
    gradients = tg.task_gradients(losses_of(model(x), y), shared)
    assert all(torch.equal(whole(p.grad), k) for p, k in zip(shared, kept, strict=True))
    assert all(isinstance(gradient, DTensor) for own in gradients for gradient in own)
    return tg.task_gram(gradients), [whole(g) for g in tg.combine(gradients, [1.0, 2.0, 3.0, 4.0])]


def test_processes_may_be_joined_and_parted_between_batches(monkeypatch):
    ranks = Ranks(None)
    assert not ranks.changed()
    for joined, number in ((True, 3), (False, 1), (True, 2)):
        monkeypatch.setattr(dist, "is_initialized", lambda joined=joined: joined)
        monkeypatch.setattr(dist, "get_world_size", lambda group, number=number: number)
        monkeypatch.setattr(dist, "get_rank", lambda group: 0)
        assert ranks.changed()
        ranks.join()
        assert ranks.number == number
        assert not ranks.changed()


def test_gradients_of_sharded_parameters():
    model = make_model()
    x, y = Regression().part(0, 0, 1)
    gradients = tg.task_gradients(losses_of(model(x), y), model.encoder.parameters())
    for gram, combined in on_ranks(gradients_of_shards):
        torch.testing.assert_close(gram, tg.task_gram(gradients), rtol=1e-9, atol=1e-12)
        expected = tg.combine(gradients, [1.0, 2.0, 3.0, 4.0])
        torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-12)


def two_models(rank):
    """Four ranks train two models, two ranks each."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = tg.TaskGroups(TASKS, process_group=pairs[rank // 2], seed=rank // 2)
    x = torch.zeros(1, requires_grad=True)
    for _ in range(2):
        for group in groups.batch(["a", "b", "cd"[rank // 2]]):
            losses = {t: (x + rank + 1).square().sum() for t in group.observed}
            x.grad = None
            group.loss(losses).backward()
            x.data.sub_(0.01)
    return groups.affinity.matrix


def test_a_process_group_of_some_of_the_ranks():
    matrices = on_ranks(two_models, world=4)
    assert torch.equal(matrices[0], matrices[1])
    assert torch.equal(matrices[2], matrices[3])
    assert matrices[0][3, 3] == 0 < matrices[0][2, 2]
    assert matrices[2][2, 2] == 0 < matrices[2][3, 3]


def joined(rank, batches, how):
    """Data that end earlier on one rank, under DDP's join()."""
    data, model = Regression(), make_model()
    ddp = wrapped(model, "ddp")
    groups = tg.TaskGroups(TASKS)

    def loop(number, calls=ddp):
        for n in range(number):
            x, y = data.part(n, rank, 2)
            for group in groups.batch(TASKS):
                model.zero_grad()
                group.loss(losses_of(calls(x, group=group), y)).backward()

    found = {}
    if how == "later":  # the groups have met without join()
        loop(1)
    with counted(exchanges := []):
        with suppress(RuntimeError), ddp.join():
            found["inside"] = said(loop, batches[rank])
            if found["inside"] is not None:
                raise RuntimeError  # as it would have left the context
        found["exchanges"] = len(exchanges)
    if how == "leaves":
        return found
    found["after"] = said(loop, 2)
    with ddp.join(enable=False):
        found["disabled"] = said(loop, 2)
    with suppress(RuntimeError), ddp.join():
        found["again"] = said(loop, 2)
        raise RuntimeError
    return found


@pytest.mark.parametrize("how", ["first", "later"])
def test_join_is_refused_on_every_rank(how):
    """Before an exchange meets one of DDP's, which ends the process in C++."""
    for found in on_ranks(joined, (2, 4), how):
        assert "join() cannot work with TaskGroups" in found["inside"]
        assert "Give every rank as many batches" in found["inside"]
        assert found["exchanges"] == 0
        assert (
            found["after"] is found["disabled"] is None
        )  # though DDP's settings stay as in join()
        assert found["again"] == found["inside"]


def test_join_where_a_rank_has_no_data_at_all():
    """That one waits in join() for the other, whose end it is told of."""
    first, second = on_ranks(joined, (0, 2), "leaves")
    assert first["inside"] is None
    assert "join() cannot work" in second["inside"]


def uneven(rank, present):
    """One rank has a batch less, and ends."""
    data, model = Regression(), make_model()
    groups = tg.TaskGroups(TASKS)

    def loop():
        for n in range(2 + rank):
            x, y = data.part(n, rank, 2)
            for group in groups if present is None else groups.batch(present):
                group.loss(losses_of(model(x, group=group), y)).backward()

    return said(loop)


@pytest.mark.parametrize("present", [None, TASKS])
def test_a_rank_that_ends_early_is_told_of(present):
    ended, other = on_ranks(uneven, present)
    assert ended is None
    assert "Rank 1 waited for another rank in vain (" in other
    assert "has fewer batches. Give every rank as many batches" in other


def test_ranks_are_copied_with_their_process_group(monkeypatch):
    class ProcessGroup:
        def __reduce__(self):
            raise TypeError("cannot pickle")

    monkeypatch.setattr(dist, "ProcessGroup", ProcessGroup)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    ranks = Ranks(ProcessGroup())
    ranks.join()
    copied = copy.deepcopy(ranks)
    assert copied._process_group is ranks._process_group
    assert copied.number == 3
    assert not copied.changed()
    with pytest.raises(TypeError, match="make the TaskGroups in the process that uses it"):
        pickle.dumps(ranks)


def test_unpickled_ranks_find_those_of_their_process(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    ranks = Ranks(None)
    ranks.join()
    other = pickle.loads(pickle.dumps(ranks))
    assert other.changed()
    other.join()
    assert other.number == 3


def copied_while_training(rank):
    """A copy goes on as the original does, on the same ranks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = tg.TaskGroups(TASKS, process_group=pairs[rank // 2], warmup=1)

    def steps(groups):
        x = torch.zeros(1, requires_grad=True)
        for _ in range(2):
            for group in groups.batch(TASKS):
                group.loss({t: (x + rank + k).square().sum() for k, t in enumerate(TASKS, 1)})
                x.data.sub_(0.01)
        return groups.affinity.matrix

    steps(groups)
    other = copy.deepcopy(groups)
    return torch.equal(steps(groups), steps(other))


def test_copies_while_several_ranks_train():
    assert all(on_ranks(copied_while_training, world=4))
