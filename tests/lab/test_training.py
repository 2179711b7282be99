"""Where people train: each is the same as the group steps written by hand."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import taskgroup as tg
from tests.nn.test_outside import TASKS, data, losses_of

# Of torch's own making, when it compiles a module whose input has a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PARTITION = [["a", "c"], ["b"]]
DROPOUT = 0.3


def make_model(wrap=lambda part: part):
    torch.manual_seed(0)
    part = wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(DROPOUT)))
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), part)
    return tg.MultiTaskModel(encoder, {task: nn.Linear(8, 2) for task in TASKS})


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def make_groups(**settings):
    settings = {"grouping": tg.Fixed(PARTITION), "affinity": tg.ProximalAffinity(0.2), **settings}
    return tg.TaskGroups(TASKS, **settings)


def steps_by_hand(model, batches=6, autocast=None, change=lambda: None, after=lambda: None):
    """The group steps in the order that make_groups() deals them; ``change`` takes the step."""
    groups = make_groups()
    for n in range(batches):
        x, target = data(n)
        torch.manual_seed(n)
        state = torch.get_rng_state()
        for group in groups:
            torch.set_rng_state(state)
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                losses = losses_of(model(x), target)
            model.zero_grad()
            sum(losses[task].float() for task in group.tasks).backward()
            change()
            group.skip()
        after()


def assert_equal(model, other):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("around", ["the forward", "the batch"])
def test_autocast(around):
    """Around a whole batch too: no forward uses weights from before the last step."""
    model = make_model()
    optimizer = adam(model)
    groups = make_groups()

    def autocast(where):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == around)

    for n in range(6):
        x, target = data(n)
        torch.manual_seed(n)
        with autocast("the batch"):
            for group in groups:
                with autocast("the forward") if around == "the forward" else autocast("the batch"):
                    losses = losses_of(model(x, group=group), target)
                optimizer.zero_grad()
                with torch.autocast("cpu", enabled=False):
                    group.loss(losses).backward()
                optimizer.step()
    other = make_model()
    by_hand = adam(other)
    steps_by_hand(other, autocast=torch.bfloat16, change=by_hand.step)
    assert_equal(model, other)
    assert groups.affinity.matrix.dtype == torch.float32
    assert (groups.affinity.matrix.diagonal() != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_in_half_precision_are_observed_in_float32(dtype):
    """A relative gain of one in a thousand does not get lost in bfloat16."""
    groups = tg.TaskGroups(["a", "b"], affinity=tg.ProximalAffinity(decay=1.0))
    x = torch.tensor(1.0, requires_grad=True)
    for group in groups:
        value = group.loss({t: (x * 2).to(dtype) for t in ("a", "b")})
        assert value.dtype == torch.float32
        with torch.no_grad():
            x.mul_(0.5)
    first = groups.affinity.matrix.abs().sum(1).argmax()
    assert groups.affinity.matrix[first].tolist() == [0.5, 0.5]


@pytest.mark.learned
def test_step_skipped_by_a_grad_scaler_is_not_observed():
    model = make_model()
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
    groups = make_groups()
    scale = scaler.get_scale()
    counts = {True: 0, False: 0}
    for n in range(40):
        x, target = data(n)
        for group in groups:
            losses = losses_of(model(x, group=group), target)
            matrix = groups.affinity.matrix.clone()
            loss = group.loss(losses) * 1e9  # so that scaled gradients overflow at first
            observed = not torch.equal(matrix, groups.affinity.matrix)
            if not group.first:
                stepped = scaler.get_scale() == scale
                assert observed == stepped
                counts[stepped] += 1
            optimizer.zero_grad()
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert min(counts.values()) > 5


@pytest.mark.learned
def test_clipping():
    def clipped(model, optimizer):
        def step():
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            assert norm > 0.3  # it is clipped indeed
            optimizer.step()

        return step

    model, other = make_model(), make_model()
    train(model, step=clipped(model, adam(model)))
    steps_by_hand(other, change=clipped(other, adam(other)))
    assert_equal(model, other)


def train(model, step, batches=6, after=lambda: None, groups=None):
    """The loop with a ``step`` of one's own, and what comes after a batch."""
    groups = make_groups() if groups is None else groups
    for n in range(batches):
        x, target = data(n)
        torch.manual_seed(n)
        for group in groups:
            losses = losses_of(model(x, group=group), target)
            model.zero_grad()
            group.loss(losses).backward()
            step()
        after()
    return groups


def test_schedule_and_averaged_weights_once_per_batch():
    model, other = make_model(), make_model()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=6, power=0.9)
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]

    def after():
        scheduler.step()
        for average in averages:
            average.update_parameters(model)

    train(model, optimizer.step, after=after)

    by_hand = adam(other)
    trail = []

    def note():
        trail.append(copy.deepcopy(list(other.parameters())))
        by_hand.param_groups[0]["lr"] = 0.02 * (1 - len(trail) / 6) ** 0.9

    steps_by_hand(other, change=by_hand.step, after=note)
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    for k, _ in enumerate(other.parameters()):
        seen = torch.stack([parameters[k].detach() for parameters in trail])
        ema = seen[0]
        for value in seen[1:]:
            ema = 0.9 * ema + 0.1 * value
        swa, got = (list(average.module.parameters())[k] for average in averages)
        torch.testing.assert_close(swa, nn.Parameter(seen.mean(0)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, nn.Parameter(ema), rtol=1e-5, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)


def test_activation_checkpointing():
    """The same masks in the recomputation, the same steps, the same affinity."""
    model, other = make_model(Checkpointed), make_model()
    groups = train(model, adam(model).step, groups=make_groups(grouping=None, warmup=1))
    expected = train(other, adam(other).step, groups=make_groups(grouping=None, warmup=1))
    assert_equal(model, other)
    assert torch.equal(groups.affinity.matrix, expected.affinity.matrix)
    assert groups.affinity.matrix.any()


@pytest.mark.parametrize("outside", [None, "hold", "coast"])
def test_an_optimizer_for_each_head(outside):
    """They do what one optimizer for all does."""
    model, other = make_model(), make_model()
    several = [torch.optim.Adam(part.parameters(), lr=0.02) for part in parts_of(model)]
    one = adam(other)
    groups, expected = make_groups(), make_groups()
    if outside is not None:
        groups.attach(several, model.heads, outside)
        expected.attach(one, other.heads, outside)

    def step_all():
        for optimizer in several:
            optimizer.step()

    train(model, step_all, groups=groups)
    train(other, one.step, groups=expected)
    assert_equal(model, other)


def parts_of(model):
    return [model.encoder, *model.heads.values()]


def test_only_the_optimizers_of_the_group():
    model, other = make_model(), make_model()
    trunk = torch.optim.Adam(model.encoder.parameters(), lr=0.02)
    heads = {t: torch.optim.Adam(head.parameters(), lr=0.02) for t, head in model.heads.items()}
    groups = make_groups()
    for n in range(6):
        x, target = data(n)
        torch.manual_seed(n)
        for group in groups:
            losses = losses_of(model(x, group=group), target)
            model.zero_grad()
            group.loss(losses).backward()
            trunk.step()
            for task in group.tasks:
                heads[task].step()
    train(other, adam(other).step)
    assert_equal(model, other)


def test_compiled_whole_and_called_with_the_group():
    """It is not what a user should write, but it works."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = tg.MultiTaskModel(encoder, {task: nn.Linear(8, 2) for task in TASKS})
    run = torch.compile(model, backend="eager")
    x, target = data(0)
    expected = losses_of(model(x), target)
    for group in make_groups():
        losses = losses_of(run(x, group=group), target)
        assert {t: v.item() for t, v in losses.items()} == {
            t: expected[t].item() for t in group.observed
        }
        group.loss(losses).backward()
    torch._dynamo.reset()


def test_copies_of_a_compiled_model_are_their_own():
    model = make_model()
    model.compile(backend="eager")
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    x, _ = data(0)
    assert not any(output.any() for output in copied(x).values())
    assert all(output.any() for output in model(x).values())
    assert "forward" not in vars(model.encoder)


HEADS = {
    "alike": lambda k: nn.Linear(8, 1),
    "of other sizes": lambda k: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1 + k)),
    "with other settings": lambda k: Scaled(k),
    "with other lists": lambda k: Scaled([k]),
    "with BatchNorm": lambda k: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 1 + k)),
}


class Scaled(nn.Module):
    """What sets two of them apart is a number."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(8, 1)

    def forward(self, x):
        scale = self.scale[0] if isinstance(self.scale, list) else self.scale
        return self.linear(x) * scale if scale % 2 else self.linear(x) + scale


@pytest.mark.filterwarnings("ignore:The last .* steps changed no loss")  # none is taken
@pytest.mark.parametrize("kind", HEADS)
def test_number_of_graphs(kind):
    """At most 1 + 2K over 50 random groups, and no part is left uncompiled."""
    torch._dynamo.reset()
    tasks = [f"t{k}" for k in range(12)]  # more than torch allows recompilations of one function
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = tg.MultiTaskModel(encoder, {task: HEADS[kind](k) for k, task in enumerate(tasks)})
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    model.compile(backend=counter)
    groups = tg.TaskGroups(tasks, grouping=tg.RandomGroups(5), observe_every=2)
    seen = 0
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        while seen < 50:
            x, _ = data(seen)
            for group in groups:
                outputs = model(x, group=group)
                for task, expected in plain(x).items():
                    if task in outputs:
                        torch.testing.assert_close(outputs[task], expected)
                model.zero_grad()
                group.loss({t: out.square().mean() + 1 for t, out in outputs.items()}).backward()
                seen += 1
    assert counter.frame_count == (3 if kind == "alike" else 1 + 2 * len(tasks))
    torch._dynamo.reset()
