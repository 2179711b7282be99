"""A method that weighs the losses inside the groups, against the same computed by hand."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import taskgroup as tg
from taskgroup._listeners import Listener
from tests.nn.test_outside import OPTIMIZERS, TASKS, data, losses_of, make_model
from tests.ranks import on_ranks

PARTITION = [["a", "c"], ["b"]]
WEIGHING = {n: m for n, m in tg.methods.METHODS.items() if issubclass(m, tg.methods.WeighingMethod)}


def made(name, shared, tasks=TASKS, **options):
    if name == "dwa":
        options.setdefault("epoch", 2)
    return WEIGHING[name](shared, tasks, **options)


class Run:
    """A model whose losses a method weighs, its optimizer and its groups."""

    def __init__(self, name, optimizer="sgd", outside="hold", attach=True, **settings):
        self.model = make_model()
        self.method = made(name, self.model.encoder)
        own = [*self.model.parameters(), *self.method.parameters()]
        self.optimizer = OPTIMIZERS[optimizer](own)
        settings.setdefault("grouping", tg.Fixed(PARTITION))
        self.groups = tg.TaskGroups(TASKS, weights=self.method, **settings)
        if attach:
            self.groups.attach(self.optimizer, self.model.heads, outside)

    def train(self, batches, stacked=False, parts=1):
        """``[(tasks, loss)]`` of the steps."""
        trace = []
        for n in range(batches):
            x, target = data(n)
            for group in self.groups:
                self.optimizer.zero_grad()
                total = 0.0
                for _ in range(parts):
                    losses = losses_of(self.model(x, group=group), target)
                    losses = torch.stack(list(losses.values())) if stacked else losses
                    loss = group.loss(losses, share=1 / parts)
                    loss.backward()
                    total += loss.item()
                self.optimizer.step()
                trace.append((group.tasks, total))
        return trace


# What a step on a group minimises, from its losses and what it has learned of their tasks.
OBJECTIVES = {
    "gd": lambda loss, s: loss,
    "si": lambda loss, s: loss.log(),
    "uw": lambda loss, s: 0.5 * (-s).exp() * loss + 0.5 * s,
    "imtl-l": lambda loss, s: s.exp() * loss - s,
}


def by_hand(name, steps, reduction="sum"):
    """The same steps with one parameter per task, which has no gradient outside its group."""
    model = make_model()
    learned = {task: nn.Parameter(torch.zeros(())) for task in TASKS}
    optimizer = OPTIMIZERS["sgd"]([*model.parameters(), *learned.values()])
    trace = []
    for place, group in enumerate(steps):
        x, target = data(place // 2)
        losses = losses_of(model(x), target)
        terms = [OBJECTIVES[name](losses[task], learned[task]) for task in group]
        loss = sum(terms) / (len(terms) if reduction == "mean" else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.append((group, loss.item()))
    return trace, model, torch.stack([*learned.values()])


@pytest.mark.parametrize(
    ("stacked", "parts", "reduction"),
    [(False, 1, "sum"), (True, 1, "sum"), (False, 2, "sum"), (False, 1, "mean")],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_minimises_the_terms_of_its_group(name, stacked, parts, reduction):
    """Momentum and weight decay leave what is learned of the other tasks alone."""
    run = Run(name, reduction=reduction)
    trace = run.train(6, stacked, parts)
    expected, model, learned = by_hand(name, [tasks for tasks, _ in trace], reduction)
    assert [loss for _, loss in trace] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for found in run.method.parameters():
        torch.testing.assert_close(found, learned, rtol=1e-5, atol=1e-7)
        assert found.abs().min() > 0


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("outside", ["hold", "coast"])
@pytest.mark.parametrize("name", ["uw", "imtl-l"])
def test_what_is_learned_obeys_the_rule_for_heads(name, outside, heads):
    """Under Adam, too, and with a MultiTaskModel whose heads attach() was not given."""
    run = Run(name, "adam", attach=False, warmup=0)
    run.groups.attach(run.optimizer, run.model.heads if heads else None, outside)
    (learned,) = run.method.parameters()
    stepped = torch.zeros(3, dtype=torch.bool)
    for n in range(3):
        x, target = data(n)
        for group in run.groups:
            run.optimizer.zero_grad()
            group.loss(losses_of(run.model(x, group=group), target)).backward()
            before = learned.detach().clone()
            run.optimizer.step()
            coasting = stepped if outside == "coast" else torch.zeros_like(stepped)
            assert torch.equal(learned != before, group.mask | coasting)
            stepped |= group.mask


@pytest.mark.parametrize("name", WEIGHING)
def test_the_affinity_and_the_listeners_see_the_losses_unweighted(name):
    class Ears(Listener):
        def __init__(self):
            self.heard = []

        def losses(self, members, values):
            self.heard.append([*values.tolist()])

    run, ears = Run(name, warmup=0), Ears()
    run.groups.listen(ears)
    again = tg.ProximalAffinity()
    again.start(TASKS)
    expected = []
    for n in range(4):
        x, target = data(n)
        before = None
        for group in run.groups:
            losses = losses_of(run.model(x, group=group), target)
            expected.append([loss.item() for loss in losses.values()])
            plain = torch.tensor(expected[-1])
            if before is not None:
                again.observe(before[0], plain, before[1])
            before = plain, group.mask
            run.optimizer.zero_grad()
            group.loss(losses).backward()
            run.optimizer.step()
    assert ears.heard == expected
    torch.testing.assert_close(run.groups.affinity.matrix, again.matrix)
    assert run.groups.affinity.matrix.abs().max() > 0


def fixed_losses(groups, values, x):
    """A batch in which the losses are given: ``values[step][task]``. The weights of each step."""
    found = []
    for step, group in enumerate(groups):
        now = values[min(step, len(values) - 1)]
        losses = {task: loss + 0 * x.sum() for task, loss in zip(TASKS, now, strict=True)}
        leaves = {task: loss.detach().requires_grad_() for task, loss in losses.items()}
        gradients = torch.autograd.grad(group.loss(leaves), [leaves[t] for t in group.tasks])
        found.append((group.tasks, [g.item() for g in gradients]))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"grouping": lambda: tg.Fixed(PARTITION)},
        {"grouping": lambda: tg.Fixed(PARTITION), "observe_every": 3},
        {"grouping": lambda: lambda matrix: torch.zeros(3, dtype=torch.int64), "warmup": 0},
    ],
    ids=["all groups", "now and then", "the same group twice"],
)
def test_dwa_counts_the_losses_of_a_batch_once(settings):
    """Before the first step on their task, whatever the losses are in later steps."""
    x = nn.Parameter(torch.ones(2))
    method = tg.methods.DWA([x], TASKS, epoch=2, temperature=1.5)
    settings = {**settings, "grouping": settings["grouping"]()}
    groups = tg.TaskGroups(TASKS, weights=method, **settings)
    counted, weights = [], []
    for n in range(6):
        first = [1.0 + n, 2.0 / (n + 1), 3.0]
        then = [0.5, 0.25 * (n + 1), 2.0]
        found = fixed_losses(groups, [first, then], x)
        own = {}
        for step, (tasks, _) in enumerate(found):
            for task in tasks:
                own.setdefault(task, [first, then][step][TASKS.index(task)])
        counted.append([own[task] for task in TASKS])
        weights.append({t: w for tasks, ws in found for t, w in zip(tasks, ws, strict=True)})
    means = np.array(counted).reshape(3, 2, 3).mean(1)
    ratios = means[1] / means[0] / 1.5
    expected = 3 * np.exp(ratios) / np.exp(ratios).sum()
    for n in range(4):
        assert weights[n] == dict.fromkeys(TASKS, 1.0)
    for n in (4, 5):
        assert [weights[n][task] for task in TASKS] == pytest.approx(expected, rel=1e-5)


def test_dwa_keeps_the_mean_of_a_task_without_a_label():
    x = nn.Parameter(torch.ones(2))
    method = tg.methods.DWA([x], TASKS, epoch=1)
    groups = tg.TaskGroups(TASKS, weights=method, grouping=tg.Fixed(PARTITION))
    for values, present in (([8.0, 1, 1], "abc"), ([4.0, 2, 1], "abc"), ([9.0, 2, 1], "bc")):
        for group in groups.batch(list(present)):
            leaves = torch.tensor(values, requires_grad=True)
            group.loss({task: leaves[TASKS.index(task)] for task in present})
    (_, weights), (_, other) = sorted(fixed_losses(groups, [[1.0, 1.0, 1.0]], x))
    ratios = np.exp(np.array([4 / 8, 2 / 2, 1 / 1]) / 2)
    expected = 3 * ratios / ratios.sum()
    assert [weights[0], other[0], weights[1]] == pytest.approx(expected, rel=1e-5)


def test_rlw_draws_once_a_batch_for_all_tasks():
    x = nn.Parameter(torch.ones(2))
    groups = tg.TaskGroups(
        TASKS, weights=tg.methods.RLW([x], TASKS, seed=5), grouping=tg.Fixed(PARTITION)
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        expected = torch.randn(3, generator=generator).softmax(0)
        (ac, own), (b, other) = sorted(fixed_losses(groups, [[1.0, 2.0, 3.0]], x))
        assert (ac, b) == (("a", "c"), ("b",))
        assert [own[0], other[0], own[1]] == pytest.approx(expected.tolist(), rel=1e-5)


class FamoByHand:
    """FAMO in float64, one group and one task after the other."""

    def __init__(self, n_tasks, lr=0.025, weight_decay=1e-3):
        self.lr, self.decay = lr, weight_decay
        self.logits, self.mean, self.square, self.steps = np.zeros((4, n_tasks))

    def shares(self, at):
        z = np.exp(self.logits[at])
        return z / z.sum()

    def weights(self, losses, at):
        parts = self.shares(at) / losses[at]
        return parts / parts.sum() * len(at) / len(self.logits)

    def observe(self, before, after, at):
        fall = np.log(before[at]) - np.log(after[at])
        z = self.shares(at)
        gradient = (np.diag(z) - np.outer(z, z)) @ fall + self.decay * self.logits[at]
        self.steps[at] += 1
        self.mean[at] = 0.9 * self.mean[at] + 0.1 * gradient
        self.square[at] = 0.999 * self.square[at] + 0.001 * gradient**2
        mean = self.mean[at] / (1 - 0.9 ** self.steps[at])
        square = self.square[at] / (1 - 0.999 ** self.steps[at])
        self.logits[at] -= self.lr * mean / (np.sqrt(square) + 1e-8)


@pytest.mark.parametrize(("every", "partition"), [(1, PARTITION), (2, PARTITION), (1, None)])
def test_famo_learns_from_the_forward_passes_of_the_other_groups(every, partition):
    x = nn.Parameter(torch.ones(2))
    method = tg.methods.FAMO([x], TASKS)
    one = tg.TaskGroups(
        TASKS,
        weights=method,
        grouping=tg.Fixed(partition) if partition else lambda matrix: torch.zeros(3).long(),
        warmup=0,
        observe_every=every,
        seed=2,
    )
    hand = FamoByHand(3)
    random = np.random.default_rng(0)
    for n in range(9):
        values = random.uniform(0.5, 2.0, (2, 3))
        observes = n % every == 0
        found = fixed_losses(one, values.tolist(), x)
        assert len(found) == (2 if partition or observes else 1)
        for step, (tasks, weights) in enumerate(found):
            at = [TASKS.index(task) for task in tasks]
            if step > 0 and observes and len(last := found[0][0]) > 1:
                hand.observe(values[0], values[1], [TASKS.index(task) for task in last])
            expected = hand.weights(values[step], at)
            assert weights == pytest.approx(expected, rel=1e-4)
    assert np.abs(hand.logits).max() > 0.02
    torch.testing.assert_close(
        method.state_dict()["logits"].double(), torch.tensor(hand.logits), rtol=1e-4, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:The loss of task .* is (nan|inf):UserWarning")
def test_famo_learns_nothing_from_steps_that_were_skipped_or_not_finite():
    x = nn.Parameter(torch.ones(2))
    method = tg.methods.FAMO([x], TASKS)
    groups = tg.TaskGroups(TASKS, weights=method, grouping=tg.Fixed(PARTITION))
    start = method.state_dict()["logits"]
    bad = [1.0, math.inf, 1.0]
    for values in ([[1.0, 2, 3]], [[1.0, 2, 3], [math.nan, 1, math.inf]], [[math.inf] * 3, bad]):
        fixed_losses(groups, values, x)  # the first step changes nothing, the others are not finite
    for group in groups:
        losses = {task: torch.tensor(float(group.first) + 1, requires_grad=True) for task in TASKS}
        group.loss(losses)
        group.skip()
    assert torch.equal(method.state_dict()["logits"], start)
    for _ in range(8):  # the group of two tasks is first at least once
        fixed_losses(groups, [[3.0, 2.0, 1.0], [2.0, 1.0, 0.9]], x)
    assert not torch.equal(method.state_dict()["logits"], start)


@pytest.mark.parametrize("name", WEIGHING)
@pytest.mark.parametrize("stop", [1, 3])
def test_resumes_exactly(name, stop):
    settings = {"grouping": tg.AffinityPropagation(), "warmup": 1, "observe_every": 2}
    whole = Run(name, "adam", **settings).train(7)
    first = Run(name, "adam", **settings)
    trace = first.train(stop)
    file = io.BytesIO()
    parts = ("model", "optimizer", "groups")
    torch.save({part: getattr(first, part).state_dict() for part in parts}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    first.train(2)
    second = Run(name, "adam", **settings)
    second.train(2)
    for part in parts:
        getattr(second, part).load_state_dict(saved[part])
    for n in range(stop, 7):
        x, target = data(n)
        for group in second.groups:
            loss = group.loss(losses_of(second.model(x, group=group), target))
            second.optimizer.zero_grad()
            loss.backward()
            second.optimizer.step()
            trace.append((group.tasks, loss.item()))
    assert trace == whole


@pytest.mark.parametrize("name", WEIGHING)
def test_a_saved_state_does_not_change_later(name):
    run = Run(name)
    run.train(3)
    state = run.groups.state_dict()
    kept = repr(state)
    run.train(2)
    assert repr(state) == kept


def test_states_of_other_weights_are_refused():
    states = {n: Run(n).groups.state_dict() for n in ("uw", "si")}
    plain = tg.TaskGroups(TASKS, grouping=tg.Fixed(PARTITION))
    with pytest.raises(ValueError, match=r"saved with 'UW' as the weights.* have no method"):
        plain.load_state_dict(states["uw"])
    with pytest.raises(ValueError, match=r"saved with no method .* have 'UW'"):
        Run("uw").groups.load_state_dict(plain.state_dict())
    run = Run("uw")
    before = repr(run.groups.state_dict())
    with pytest.raises(ValueError, match="same method"):
        bad = {**states["uw"], "weights": {**states["uw"]["weights"], "method": "SI"}}
        run.groups.load_state_dict({**bad, "batches": 77})
    assert repr(run.groups.state_dict()) == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_is_attached_anew(way):
    run = Run("uw")
    run.train(2)
    other, refused = copy.copy(run), copy.copy(run)
    parts = ("model", "optimizer", "groups", "method")
    for copied in (other, refused):
        found = way([getattr(run, part) for part in parts])
        vars(copied).update(zip(parts, found, strict=True))
    with pytest.raises(RuntimeError, match="no attached optimizer"):
        refused.train(1)
    other.groups.attach(other.optimizer, other.model.heads)
    assert other.train(2) == run.train(2)
    assert other.method.parameters()[0] is not run.method.parameters()[0]


def test_the_settings_name_the_method():
    assert Run("uw").groups.settings["group_weights"] == "UW"
    assert "group_weights" not in tg.TaskGroups(TASKS).settings


def test_a_name_is_no_method():
    with pytest.raises(TypeError, match=r"a method such as tg.methods.UW\(.* got 'uw'"):
        tg.TaskGroups(TASKS, weights="uw")


class Mixer(tg.methods.JointMethod):
    """Like PCGrad, which mixes the gradients of all tasks."""


@pytest.mark.parametrize(
    ("weights", "error", "said"),
    [
        (lambda x: tg.methods.UW, TypeError, r"the class UW; call it, as in tg.methods.UW\("),
        (lambda x: Mixer([x], TASKS), TypeError, "GD, SI, RLW, UW, .* Mixer needs all tasks"),
        (
            lambda x: tg.methods.DTP([x], TASKS, score=dict),
            TypeError,
            r"DTP needs all tasks in one step; call DTP.backward\(losses\)",
        ),
        (lambda x: tg.methods.UW([x], ["b", "a", "c"]), ValueError, "the same order"),
    ],
)
def test_what_cannot_weigh_a_group_is_refused(weights, error, said):
    with pytest.raises(error, match=said):
        tg.TaskGroups(TASKS, weights=weights(nn.Parameter(torch.ones(2))))


def test_learned_weights_need_an_optimizer():
    run = Run("uw", attach=False)
    (learned,) = run.method.parameters()

    def refused():
        with pytest.raises(RuntimeError, match=r"pass method.parameters\(\) .* groups.attach"):
            run.train(1)
        assert all(p.grad is None for p in run.model.parameters())

    refused()
    run.groups.attach(torch.optim.Adam(run.model.parameters()), run.model.heads)
    refused()
    attachment = run.groups.attach(run.optimizer, run.model.heads)
    run.train(1)
    attachment.remove()
    run.optimizer.zero_grad()
    refused()
    assert learned.abs().min() > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"affinity": tg.GradientAffinity([nn.Parameter(torch.ones(2))])},
            "with GradientAffinity no batch compares them",
        ),
        ({"grouping": tg.Together()}, "a batch takes one step alone"),
        ({"grouping": tg.Fixed(PARTITION), "groups_per_batch": 1}, "a batch takes one step alone"),
    ],
)
def test_famo_is_refused_where_it_could_never_learn(settings, said):
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=said):
        tg.TaskGroups(TASKS, weights=tg.methods.FAMO([x], TASKS), **settings)
    tg.TaskGroups(TASKS, weights=tg.methods.FAMO([x], TASKS), groups_per_batch=1)
    tg.TaskGroups(["a"], weights=tg.methods.FAMO([x], ["a"]))  # which has nothing to learn


@pytest.mark.parametrize(("name", "loss"), [("si", 0.0), ("si", -1.0), ("famo", -1.0)])
def test_a_loss_without_a_logarithm_names_its_task(name, loss):
    run = Run(name)
    before = repr(run.groups.state_dict())
    parameters = [p.detach().clone() for p in run.model.parameters()]
    x, target = data(0)
    with pytest.raises(ValueError, match=rf"task '[abc]' is {loss}, .*losses must be positive"):
        for group in run.groups:
            good = losses_of(run.model(x, group=group), target)
            bad = {t: v + loss - v.detach() if t in group.tasks else v for t, v in good.items()}
            try:
                group.loss(bad)
            except ValueError:
                assert group.loss(good).isfinite()  # nothing has changed
                raise
    for ours, kept in zip(run.model.parameters(), parameters, strict=True):
        assert torch.equal(ours, kept)
    assert repr(run.groups.affinity.matrix) in before


@pytest.mark.filterwarnings("ignore:The loss of task .* is -1.0:UserWarning")
def test_losses_of_other_groups_need_no_logarithm():
    run = Run("si")
    for group in run.groups:
        losses = {t: torch.tensor(1.0 if t in group.tasks else -1.0) for t in TASKS}
        losses = {task: loss.requires_grad_() for task, loss in losses.items()}
        assert group.loss(losses).item() == 0.0


@pytest.mark.parametrize("name", WEIGHING)
def test_half_precision(name):
    """Scaled as any other loss; the weights are those of the losses that are not scaled."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=64.0)):
        run = Run(name)
        for n in range(3):
            x, target = data(n)
            for group in run.groups:
                losses = losses_of(run.model(x, group=group), target)
                loss = group.loss({task: loss.bfloat16() for task, loss in losses.items()})
                assert loss.dtype == torch.float32
                run.optimizer.zero_grad()
                if scaler is None:
                    loss.backward()
                    run.optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(run.optimizer)
                    scaler.update()
        found.append([*run.model.parameters(), *run.method.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHING)
def test_batched_heads(name):
    tasks = [f"t{k}" for k in range(6)]
    x, target = torch.randn(5, 4), torch.randn(6, 5, 2)
    found = []
    for batched in (False, True):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        heads = {task: nn.Linear(8, 2) for task in tasks}
        model = tg.MultiTaskModel(encoder, tg.BatchedHeads(heads) if batched else heads)
        method = made(name, encoder, tasks)
        optimizer = OPTIMIZERS["sgd"]([*model.parameters(), *method.parameters()])
        groups = tg.TaskGroups(tasks, weights=method, grouping=tg.Fixed([tasks[:3], tasks[3:]]))
        groups.attach(optimizer)
        for _ in range(4):
            for group in groups:
                outputs = model(x, group=group)
                losses = {t: (o - target[int(t[1:])]).square().mean() for t, o in outputs.items()}
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()
        found.append([*encoder.parameters(), *method.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def train_on_ranks(rank, name, world, parts=1):
    """DDP on the rows of a rank; without labels, the loss is the mean over the ranks that have it.

    Batch 1 has no label of ``a`` on rank 0.
    """
    torch.set_default_dtype(torch.float64)
    model = make_model()
    method = made(name, model.encoder)
    wrapper = model if world == 1 else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = OPTIMIZERS["sgd"]([*model.parameters(), *method.parameters()])
    groups = tg.TaskGroups(TASKS, weights=method, grouping=tg.Fixed(PARTITION))
    groups.attach(optimizer, model.heads)
    totals = []
    for n in range(5):
        x, target = (part.double() for part in data(n))
        halves = [slice(0, 3), slice(3, 6)]
        own = halves if world == 1 else [halves[rank]]
        present = [t for t in TASKS if not (n == 1 and t == "a" and world == 2 and rank == 0)]
        for group in groups.batch(present):
            optimizer.zero_grad()
            for part in range(parts):
                found = []
                for rows in own:
                    at = torch.arange(6)[rows][part::parts]
                    losses = losses_of(wrapper(x[at], group=group), target[:, at])
                    found.append({t: v if t in present else v * 0 for t, v in losses.items()})
                losses = {task: sum(half[task] for half in found) / len(found) for task in found[0]}
                if world == 1 and n == 1 and "a" in losses:
                    losses["a"] = found[1]["a"]
                loss = group.loss(losses, share=1 / parts)
                loss.backward()
                totals.append(loss.item())
            optimizer.step()
    state = method.state_dict()
    memory = [v.double() for v in state.values() if isinstance(v, torch.Tensor)]
    return [p.detach() for p in model.parameters()], memory, totals


def train_ways_on_ranks(rank, world):
    """In one pair of processes, since they take seconds to start."""
    ways = [("uw", 1), ("uw", 3), ("si", 1), ("dwa", 1), ("dwa", 3), ("famo", 1)]
    return {way: train_on_ranks(rank, way[0], world, way[1]) for way in ways}


def test_ranks_find_the_weights_of_one_process():
    """Of the mean losses: every rank the same, bit for bit, though each sees its own rows."""
    try:
        one = train_ways_on_ranks(0, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    ranks = on_ranks(train_ways_on_ranks, 2)
    for way, expected in one.items():
        first, second = (found[way] for found in ranks)
        for ours, theirs in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
            assert torch.equal(ours, theirs), way
        torch.testing.assert_close(first[:2], expected[:2], rtol=1e-5, atol=1e-6)
        mean = (torch.tensor(first[2]) + torch.tensor(second[2])) / 2
        torch.testing.assert_close(mean, torch.tensor(expected[2]), rtol=1e-5, atol=1e-6)


class Counted(TorchDispatchMode):
    """Counts the operations of torch."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WEIGHING)
def test_a_thousand_tasks_take_as_many_operations_as_ten(name):
    found = []
    for n_tasks in (10, 1000):
        tasks = [f"t{k}" for k in range(n_tasks)]
        x = nn.Parameter(torch.ones(n_tasks))
        method = made(name, [x], tasks)
        optimizer = torch.optim.SGD([x, *method.parameters()], lr=1e-3)
        halves = [tasks[: n_tasks // 2], tasks[n_tasks // 2 :]]
        groups = tg.TaskGroups(tasks, weights=method, grouping=tg.Fixed(halves))
        groups.attach(optimizer, {task: [] for task in tasks})
        counted = Counted()
        for n in range(3):
            for group in groups:
                optimizer.zero_grad()
                losses = x.square() + 1
                if n == 0:
                    group.loss(losses).backward()
                else:
                    with counted:
                        group.loss(losses).backward()
                optimizer.step()
        found.append(counted.number)
    assert found[0] == found[1]
