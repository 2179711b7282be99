"""step_costs on models whose parts take a known time, and what it leaves behind."""

import copy
import gc
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taskgroup as tg
from taskgroup.costs import measure
from tests.states import assert_same

TASKS = [f"task{k}" for k in range(6)]
ENCODER, HEAD, OPTIMIZER = (2.0, 5.0), (1.0, 3.0), 0.5  # seconds, forward and backward


class Clock:
    """A clock that only the parts below move on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Passes(torch.autograd.Function):
    """The identity, whose backward pass takes a time."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += ctx.seconds
        return gradient, None, None


class Part(nn.Module):
    """A layer that takes the given seconds, forward and backward."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.layer, self.clock, self.seconds = nn.Linear(2, 2), clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds[0]
        return Passes.apply(self.layer(x), self.clock, self.seconds[1])


class Step(torch.optim.SGD):
    def __init__(self, clock, parameters):
        super().__init__(parameters, lr=1e-3)
        self.clock = clock

    def step(self, closure=None):
        self.clock.now += OPTIMIZER
        super().step()


class Plain(nn.Module):
    """A model of the user's own, which runs all heads."""

    def __init__(self, encoder, heads):
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleDict(heads)

    def forward(self, x):
        features = self.encoder(x)
        return {task: head(features) for task, head in self.heads.items()}


def squares(outputs):
    return {task: output.square().mean() for task, output in outputs.items()}


def timed(kind, head=HEAD):
    clock = Clock()
    model = kind(Part(clock, ENCODER), {task: Part(clock, head) for task in TASKS})
    return model, Step(clock, model.parameters()), clock


def small(kind=tg.MultiTaskModel):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    heads = {task: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)) for task in "abc"}
    return kind(encoder, heads)


X = torch.arange(12.0).view(6, 2)


class TestTimes:
    @pytest.mark.parametrize("head", [HEAD, (0.0, 0.0), (40.0, 0.0)])
    def test_of_a_model_that_takes_the_group(self, head):
        model, optimizer, clock = timed(tg.MultiTaskModel, head)
        costs = tg.step_costs(model, X, squares, optimizer, clock=clock)
        assert costs.encoder == pytest.approx(sum(ENCODER) + OPTIMIZER)
        assert costs.heads_forward == pytest.approx(6 * head[0])
        assert costs.heads_backward == pytest.approx(6 * head[1])
        assert costs.skips_heads

    def test_of_a_plain_model(self):
        model, optimizer, clock = timed(Plain)
        costs = tg.step_costs(model, X, squares, optimizer, clock=clock)
        assert costs.encoder == pytest.approx(sum(ENCODER) + OPTIMIZER)
        assert costs.heads_forward == pytest.approx(6 * HEAD[0])
        assert costs.heads_backward == pytest.approx(6 * HEAD[1])
        assert not costs.skips_heads
        assert "does not take the group" in str(costs)

    def test_without_an_optimizer(self):
        model, _, clock = timed(tg.MultiTaskModel)
        assert tg.step_costs(model, X, squares, clock=clock).encoder == sum(ENCODER)

    def test_of_losses_count_as_the_heads(self):
        def losses(outputs):
            clock.now += len(outputs)
            return squares(outputs)

        for kind in (tg.MultiTaskModel, Plain):
            model, _, clock = timed(kind)
            costs = tg.step_costs(model, X, losses, clock=clock)
            assert costs.encoder == sum(ENCODER)
            assert costs.heads_forward == 6 * (HEAD[0] + 1)

    @pytest.mark.parametrize("named", [False, True])
    def test_of_heads_that_are_not_in_heads(self, named):
        model, _, clock = timed(Plain)
        heads = model.decoders = model.heads
        del model.heads
        model.forward = lambda x, own=model.encoder: _run(own, heads, x)
        costs = tg.step_costs(model, X, squares, heads=heads if named else None, clock=clock)
        assert costs.heads_backward == 6 * HEAD[1]
        assert costs.encoder + costs.heads_forward == sum(ENCODER) + 6 * HEAD[0]
        assert costs.heads_forward == (6 * HEAD[0] if named else 0)
        assert ("pass heads={task: module}" in " ".join(str(costs).split())) is not named

    def test_a_slow_moment_is_left_out(self):
        model, _, clock = timed(tg.MultiTaskModel)
        calls = 0

        def losses(outputs):
            nonlocal calls
            calls += 1
            clock.now += 1000 * (60 < calls < 90)
            return squares(outputs)

        assert tg.step_costs(model, X, losses, clock=clock).encoder == sum(ENCODER)

    @pytest.mark.parametrize("kind", [tg.MultiTaskModel, Plain])
    @pytest.mark.parametrize(
        ("groups", "observe_every", "groups_per_batch"),
        [(1, 3, None), (3, 1, None), (3, 3, None), (6, 3, 5), (2, 3, 1), (3, 1, 1), (3, 3, 2)],
    )
    def test_predict_those_of_a_loop(self, kind, groups, observe_every, groups_per_batch):
        model, optimizer, clock = timed(kind)
        costs = tg.step_costs(model, X, squares, optimizer, clock=clock)
        settings = {"observe_every": observe_every, "groups_per_batch": groups_per_batch}
        labels = torch.arange(6) % groups
        loop = tg.TaskGroups(TASKS, warmup=0, grouping=lambda matrix: labels, **settings)
        loop.load_state_dict({**loop.state_dict(), "rounds": 1})  # no warm-up
        start, batches = clock.now, 60
        for _ in range(batches):
            for group in loop:
                outputs = model(X) if kind is Plain else model(X, group=group)
                optimizer.zero_grad()
                group.loss(squares(outputs)).backward()
                optimizer.step()
        real = (clock.now - start) / batches / costs.joint
        assert costs.of(groups, **settings) == pytest.approx(real, rel=0.01)


def _run(encoder, heads, x):
    features = encoder(x)
    return {task: head(features) for task, head in heads.items()}


class TestModels:
    @pytest.mark.parametrize(
        "inputs", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"]
    )
    def test_inputs(self, inputs):
        model, _, clock = timed(Plain)
        assert tg.step_costs(model, inputs, squares, clock=clock).encoder == sum(ENCODER)

    def test_outputs_need_not_be_a_mapping(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 3)

            def forward(self, x):
                return self.layer(x)

        def losses(output):
            return {task: output[:, k].square().mean() for k, task in enumerate("abc")}

        assert tg.step_costs(Model(), X, losses).remark

    @pytest.mark.parametrize("kind", [dict, tg.BatchedHeads])
    def test_stacked_losses(self, kind):
        heads = kind({task: nn.Linear(2, 1) for task in TASKS})
        model = tg.MultiTaskModel(nn.Linear(2, 2), heads)

        def losses(outputs):
            return torch.stack([output.square().mean() for output in outputs.values()])

        costs = tg.step_costs(model, X, losses, torch.optim.Adam(model.parameters()))
        assert costs.n_tasks == 6
        assert costs.skips_heads

    def test_stacked_losses_of_a_plain_model_run_all_heads_backward(self):
        model, _, clock = timed(Plain)
        costs = tg.step_costs(
            model, X, lambda outputs: torch.stack([*squares(outputs).values()]), clock=clock
        )
        assert costs.of(3) == pytest.approx(3.0)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler
    def test_compiled(self):
        torch.compiler.reset()
        model = small()
        model.compile(backend="eager")
        assert tg.step_costs(model, X, squares).skips_heads
        costs = tg.step_costs(torch.compile(small(), backend="eager"), X, squares)
        assert not costs.skips_heads
        assert "compiled as a whole" in str(costs)
        torch.compiler.reset()

    def test_mixed_precision(self):
        model = small()
        with torch.autocast("cpu", torch.bfloat16):
            costs = tg.step_costs(model, X, squares, torch.optim.AdamW(model.parameters()))
        assert costs.joint > 0

    def test_gradients_off(self):
        with torch.no_grad():
            assert tg.step_costs(small(), X, squares).joint > 0
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            tg.step_costs(small(), X, squares)

    def test_the_time_on_an_accelerator_is_that_until_it_is_idle(self, monkeypatch):
        clock = Clock()
        waited = []

        def synchronize(device):
            waited.append(device)
            clock.now += 3

        monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
        device = torch.device("cuda", 1)
        watch = measure.Stopwatch(clock, [torch.device("cpu"), device])
        assert watch.seconds(lambda: None) == 3
        assert waited == [device, device]
        assert measure.Stopwatch(None, [device]).name == "on cuda:1"

    def test_clocks_of_the_host(self, monkeypatch):
        cpu = [torch.device("cpu")]
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert measure.Stopwatch(None, cpu).name == "processor time of one thread"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert measure.Stopwatch(None, cpu).name == "4 threads"


def everything(model, optimizer):
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "random": torch.get_rng_state(),
        }
    )


def hooks(model):
    return [
        len(own)
        for module in model.modules()
        for own in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]


class TestTraces:
    @pytest.mark.parametrize("kind", [tg.MultiTaskModel, Plain])
    @pytest.mark.parametrize("trained", [False, True])
    def test_none_is_left(self, kind, trained):
        model = small(kind)
        model.heads["a"].eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if trained:
            sum(squares(model(X)).values()).backward()
            optimizer.step()
        gradients = [p.grad for p in model.parameters()]
        before, hooked = everything(model, optimizer), hooks(model)
        tg.step_costs(model, X, squares, optimizer)
        assert_same(everything(model, optimizer), before)
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert hooks(model) == hooked

    @pytest.mark.parametrize("kind", [tg.MultiTaskModel, Plain])
    @pytest.mark.parametrize("failing", [1, 2, 5, 20])
    def test_none_is_left_by_losses_that_fail(self, kind, failing):
        model = small(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        before, hooked = everything(model, optimizer), hooks(model)
        calls = 0

        def losses(outputs):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError("no more labels")
            return squares(outputs)

        with pytest.raises(OSError, match="no more labels"):
            tg.step_costs(model, X, losses, optimizer)
        assert_same(everything(model, optimizer), before)
        assert hooks(model) == hooked

    @pytest.mark.parametrize("kind", [tg.MultiTaskModel, Plain])
    def test_no_graph_is_kept(self, kind):
        model, graphs = small(kind), []

        def losses(outputs):
            found = squares(outputs)
            graphs.extend(weakref.ref(loss) for loss in found.values())
            return found

        tg.step_costs(model, X, losses)
        gc.collect()
        assert graphs
        assert not any(graph() is not None for graph in graphs)

    def test_the_optimizer_is_used_as_it_is_attached(self):
        model = small()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        groups = tg.TaskGroups(list("abc"))
        groups.attach(optimizer, model.heads)
        before = everything(model, optimizer)
        tg.step_costs(model, X, squares, optimizer)
        assert_same(everything(model, optimizer), before)


def test_in_ddp_nothing_is_exchanged():
    """One rank can measure alone, also after a forward pass without a backward pass."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(small(), find_unused_parameters=True)
        exchanged = []

        def hook(state, bucket):
            exchanged.append(bucket)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp.register_comm_hook(None, hook)
        _ = ddp(X)  # its reducer now waits for gradients
        optimizer = torch.optim.Adam(ddp.parameters(), lr=0.1)
        before = everything(ddp, optimizer)
        assert tg.step_costs(ddp, X, squares, optimizer).skips_heads
        assert not exchanged
        assert_same(everything(ddp, optimizer), before)
        sum(squares(ddp(X)).values()).backward()
        assert exchanged
        del ddp, hook
    finally:
        dist.destroy_process_group()


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("changed", "error", "sentence"),
        [
            ({"model": squares}, TypeError, "takes a module, got function"),
            ({"model": small}, TypeError, "takes a module, got function"),
            ({"model": nn.Linear}, TypeError, "takes a module, got the class Linear"),
            ({"model": nn.ReLU()}, ValueError, "no parameter that requires a gradient"),
            ({"model": nn.LazyLinear(2)}, ValueError, "'weight' is not initialized yet"),
            ({"model": nn.DataParallel(small())}, ValueError, "pass the module inside"),
            ({"losses": {"a": torch.tensor(1.0)}}, TypeError, "lambda outputs: .* got dict"),
            ({"losses": lambda outputs: 1.0}, TypeError, "losses(outputs) returns must be"),
            ({"losses": lambda outputs: {}}, ValueError, "at least one task"),
            ({"losses": lambda o: {"a": o["a"].mean()}}, ValueError, "one task, 'a'"),
            ({"losses": lambda o: torch.ones(2) * o["a"].mean()}, ValueError, "a tensor of 2"),
            ({"losses": lambda outputs: outputs}, ValueError, "'a' must be a .* scalar"),
            (
                {"losses": lambda o: {**squares(o), "c": o["c"].sum() / 0}},
                ValueError,
                "The loss of task 'c' is -?(inf|nan)",
            ),
            (
                {"losses": lambda o: {t: v.detach() for t, v in squares(o).items()}},
                ValueError,
                "'a' has no graph, so no step can be taken",
            ),
            (
                {"losses": lambda o: {t: o[t].square().mean() for t in "abc"}},
                ValueError,
                "looks for the output of task '.', .* compute the losses of the tasks in outputs",
            ),
            (
                {"losses": lambda o: {t: v for t, v in squares(o).items() if len(o) == 3}},
                ValueError,
                "The loss of task '.' is missing",
            ),
            (
                {"losses": lambda o: {**squares(o), "d": o["a"].mean()} if "a" in o else {}},
                ValueError,
                "'d'",
            ),
            ({"optimizer": torch.optim.SGD}, TypeError, "got the class SGD"),
            (
                {"optimizer": torch.optim.SGD([nn.Parameter(X)], lr=0.1)},
                ValueError,
                "holds no parameter of the model",
            ),
        ],
    )
    def test_are_explained(self, changed, error, sentence):
        arguments = {"model": small(), "inputs": X, "losses": squares, **changed}
        sentence = sentence.replace("(outputs)", re.escape("(outputs)"))
        with pytest.raises(error, match=sentence):
            tg.step_costs(**arguments)

    def test_lbfgs(self):
        model = small()
        with pytest.raises(ValueError, match="LBFGS needs a closure"):
            tg.step_costs(model, X, squares, torch.optim.LBFGS(model.parameters()))

    @pytest.mark.parametrize(
        ("heads", "error", "sentence"),
        [
            ({"a": nn.ReLU()}, ValueError, "no module of task 'b'"),
            ([nn.ReLU()], TypeError, "{task: module}, got list"),
        ],
    )
    def test_heads_of_a_plain_model(self, heads, error, sentence):
        with pytest.raises(error, match=sentence):
            tg.step_costs(small(Plain), X, squares, heads=heads)

    def test_a_clock_that_stands_still(self):
        with pytest.raises(ValueError, match="takes 0 seconds"):
            tg.step_costs(small(), X, squares, clock=lambda: 0.0)
