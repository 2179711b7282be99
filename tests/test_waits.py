"""The loop waits for the GPU once per batch: here for a fake GPU, in tests/gpu for a real one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.fake_gpu import FakeGPU

TASKS = [f"task{k}" for k in range(4)]
BATCHES = 8


class Way(NamedTuple):
    """A way to write the loop."""

    affinity: str = "proximal"
    model: bool = True  # called with the group; False: called whole
    stacked: bool = False
    heads: type = dict
    amp: torch.dtype | None = None
    attach: str | None = None
    shared_state: str = "all"
    rows: bool = False  # one layer for all heads
    labels: bool = False  # of some tasks only, in turns
    micro_batches: int = 1
    method: str | None = None  # that weighs the losses
    groups: dict = {}  # noqa: RUF012


WAYS = {
    "model": Way(),
    "without a model": Way(model=False),
    "stacked": Way(model=False, stacked=True),
    "model, stacked": Way(stacked=True),
    "gradient": Way("gradient"),
    "gradient, without a model": Way("gradient", model=False),
    "sampled gradient": Way("sampled gradient"),
    "batched heads": Way(heads=tg.BatchedHeads, stacked=True),
    "batched heads, gradient": Way("gradient", heads=tg.BatchedHeads),
    "bfloat16": Way(amp=torch.bfloat16),
    "bfloat16, batched heads": Way(amp=torch.bfloat16, heads=tg.BatchedHeads),
    "bfloat16, gradient": Way("gradient", amp=torch.bfloat16),
    "float16": Way(amp=torch.float16),
    "float16, hold": Way(amp=torch.float16, attach="hold"),
    "hold": Way(attach="hold"),
    "coast": Way(attach="coast"),
    "state of groups": Way(attach="hold", shared_state="group"),
    "float16, state of groups": Way(
        amp=torch.float16,
        attach="hold",
        shared_state="group",
        groups={"grouping": tg.RandomGroups(2)},
    ),
    "hold rows": Way(attach="hold", rows=True, model=False),
    "coast rows": Way(attach="coast", rows=True, model=False),
    "observed every third": Way(groups={"observe_every": 3}),
    "one group": Way(groups={"groups_per_batch": 1, "observe_every": 2}),
    "gradient, every second": Way("every second gradient", groups={"groups_per_batch": 1}),
    "some labels": Way(labels=True),
    "some labels, stacked": Way(labels=True, stacked=True),
    "some labels, gradient": Way("gradient", labels=True),
    "some labels, sampled gradient": Way("sampled gradient", labels=True),
    "micro-batches": Way(micro_batches=2),
    "weights": Way(groups={"weights": [1.0, 2.0, 0.5, 1.0], "reduction": "mean"}),
    **{
        f"weights of {name}": Way(method=name, attach="hold", micro_batches=1 + (name == "famo"))
        for name in ("si", "rlw", "uw", "dwa", "famo", "imtl-l")
    },
    "together": Way(groups={"grouping": tg.Together()}),
    "random groups": Way(groups={"grouping": tg.RandomGroups(2)}),
    "graph coloring": Way(groups={"grouping": tg.GraphColoring()}),
}


class Shared(nn.Module):
    """An encoder, and one layer that holds the heads of all tasks."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(16, len(TASKS))

    def forward(self, x):
        return dict(zip(TASKS, self.head(self.encoder(x)).split(1, 1), strict=True))


class Loop:
    """A small problem, trained in one of the ways.

    Args:
        way: how to write the loop.
        device: where to train.
        dtype: the dtype of the model and the data.
        dropout: the dropout probability in the encoder.
    """

    def __init__(self, way, device, dtype=torch.float32, dropout=0.1):
        torch.manual_seed(0)
        self.way, self.device = way, device
        encoder = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16)
        )
        heads = {task: nn.Linear(16, 1) for task in TASKS}
        if way.rows:
            self.model = Shared(encoder)
        else:
            self.model = tg.MultiTaskModel(encoder, way.heads(heads))
        self.model.to(device, dtype)
        kinds = {
            "proximal": lambda: tg.ProximalAffinity(decay=0.1),
            "gradient": lambda: tg.GradientAffinity(self.model.encoder, decay=0.1),
            "sampled gradient": lambda: tg.GradientAffinity(
                self.model.encoder, decay=0.1, sample=3
            ),
            "every second gradient": lambda: tg.GradientAffinity(
                self.model.encoder, decay=0.1, every=2
            ),
        }
        settings, learned = dict(way.groups), []
        if way.method is not None:
            options = {"epoch": 2} if way.method == "dwa" else {}
            method = tg.methods.find(way.method)(self.model.encoder, TASKS, **options)
            settings["weights"], learned = method, method.parameters()
        self.groups = tg.TaskGroups(TASKS, affinity=kinds[way.affinity](), warmup=2, **settings)
        # Fused, so that GradScaler need not know on the host whether a gradient is infinite.
        fused = {"fused": True} if way.amp is torch.float16 else {}
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *learned], lr=3e-3, **fused)
        if way.attach is not None and way.rows:
            head = self.model.head
            rows = {task: [head.weight[k], head.bias[k]] for k, task in enumerate(TASKS)}
            self.groups.attach(self.optimizer, rows, way.attach)
        elif way.attach is not None:
            self.groups.attach(
                self.optimizer, self.model.heads, way.attach, shared_state=way.shared_state
            )
        self.scaler = torch.amp.GradScaler(
            torch.device(device).type, enabled=way.amp is torch.float16, init_scale=2.0**10
        )
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(60, 16, 8, generator=generator).to(device, dtype)
        pull = torch.randn(8, 1, generator=generator).to(device, dtype)
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).to(device, dtype)
        self.y = (self.x @ pull).tanh() * signs
        self.batch = 0

    def train(self, batches):
        """Train, and return the group of every step."""
        return [group for _ in range(batches) for group in self._train_batch()]

    def _train_batch(self):
        n, self.batch = self.batch % len(self.x), self.batch + 1
        groups, stepped = self.groups, []
        for group in groups.batch(TASKS[n % 3 :]) if self.way.labels else groups:
            self.optimizer.zero_grad()
            for rows in torch.arange(16).tensor_split(self.way.micro_batches):
                at = slice(int(rows[0]), int(rows[-1]) + 1)
                losses = self._losses(group, self.x[n, at], self.y[n, at])
                loss = group.loss(losses, share=1 / self.way.micro_batches)
                self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            stepped.append(group.tasks)
        return stepped

    def _losses(self, group, x, y):
        way = self.way
        kind = torch.device(self.device).type
        with nullcontext() if way.amp is None else torch.autocast(kind, way.amp):
            outputs = self.model(x, group=group) if way.model else self.model(x)
        losses = {
            task: (out.float() if way.amp else out).sub(y[:, TASKS.index(task), None])
            for task, out in outputs.items()
        }
        losses = {task: error.square().mean() for task, error in losses.items()}
        return torch.stack([*losses.values()]) if way.stacked else losses


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_loop_waits_once_a_batch(way):
    with FakeGPU() as gpu:
        loop = Loop(way, "cuda")
        if way.heads is tg.BatchedHeads:  # which looks at the outputs of its first runs
            loop.train(2)
        gpu.waits.clear()
        gpu.planned = 0
        loop.train(BATCHES)
        assert gpu.waits == []
        assert gpu.planned <= BATCHES
        assert loop.groups.affinity.matrix.is_cuda


@pytest.mark.parametrize("way", ["together", "random groups"])
def test_groups_that_are_not_learned_wait_for_nothing(way):
    with FakeGPU() as gpu:
        loop = Loop(WAYS[way], "cuda")
        gpu.waits.clear()
        loop.train(BATCHES)
        assert gpu.waits == []
        assert gpu.planned == 0


@pytest.mark.parametrize("way", ["model", "without a model", "stacked", "batched heads"])
def test_a_step_starts_four_kernels(way):
    """They gather the losses, those of the group, and their sum, and update the affinity.

    The last step of a batch starts two more, to send the affinity to the host.
    """
    with FakeGPU() as gpu:
        loop = Loop(WAYS[way], "cuda")
        started, loss = [], tg.Group.loss

        def counted(group, losses, share=1.0):
            before = len(gpu.launches)
            value = loss(group, losses, share)
            started.append(gpu.launches[before:])
            assert len(started[-1]) <= (6 if group.last else 4), started[-1]
            return value

        loop.train(BATCHES // 2)  # until every entry of the affinity was observed
        with mock.patch.object(tg.Group, "loss", counted):
            steps = loop.train(BATCHES)
    assert len(started) == len(steps)
    assert any("taskgroup.affinity_update_" in kernels for kernels in started)


@pytest.mark.filterwarnings("ignore:The loss of task .* is -:UserWarning")
@pytest.mark.parametrize("name", ["si", "famo"])
def test_a_loss_that_cannot_be_weighed_is_told_once_it_has_arrived(name):
    with FakeGPU():
        loop = Loop(WAYS[f"weights of {name}"], "cuda", dropout=0.0)
        loop.train(1)
        losses = loop._losses
        loop._losses = lambda *args: {task: -loss for task, loss in losses(*args).items()}
        with pytest.raises(ValueError, match=r"task 'task\d' is -.*losses must be positive"):
            loop.train(3)


@pytest.mark.parametrize("way", ["model", "sampled gradient", "some labels", "micro-batches"])
def test_the_decisions_are_those_of_the_host(way):
    on_host = Loop(WAYS[way], "cpu")
    steps = on_host.train(BATCHES)
    with FakeGPU():
        on_gpu = Loop(WAYS[way], "cuda")
        assert on_gpu.train(BATCHES) == steps
        matrix = on_gpu.groups.affinity.matrix.cpu()
    assert torch.equal(matrix, on_host.groups.affinity.matrix)


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.cpu().numpy(),
    "to the host": lambda x: x.to("cpu"),
    "to the host, into memory that is not pinned": lambda x: x.to("cpu", non_blocking=True),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "an index on the host": lambda x: x[torch.tensor([0])],
    "assignment by a mask": lambda x: x.index_put_([x == 0], torch.tensor(1.0)),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "a tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "much, from memory that is not pinned": lambda x: torch.ones(2**15).to(
        x.device, non_blocking=True
    ),
    "written from the host": lambda x: x.copy_(torch.ones(4)),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
NOT_WAITING = {
    "arithmetic": lambda x: torch.where(x > 0, x, 0.0).add_(1).sum(),
    "factories": lambda x: (torch.zeros(3, device="cuda"), x.new_full((2,), 1.0)),
    "index": lambda x: x[torch.zeros(2, dtype=torch.int64).to(x.device, non_blocking=True)],
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "a little, from the host": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "much, from pinned memory": lambda x: (
        torch.ones(2**15).pin_memory().to(x.device, non_blocking=True)
    ),
    "into pinned memory": lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
    "the generator": lambda x: torch.cuda.set_rng_state(torch.cuda.get_rng_state()),
}


@pytest.mark.parametrize("call", WAITING.values(), ids=WAITING)
def test_what_waits_is_noted_with_its_line(call):
    with FakeGPU() as gpu:
        x = torch.zeros(4, device="cuda")
        call(x)
    assert len(gpu.waits) == 1
    assert f" at {__file__}:" in gpu.waits[0]


@pytest.mark.parametrize("call", NOT_WAITING.values(), ids=NOT_WAITING)
def test_what_does_not_wait_is_not_noted(call):
    with FakeGPU() as gpu:
        call(torch.zeros(4, device="cuda"))
    assert gpu.waits == []


def test_tensors_of_two_devices_do_not_mix():
    with FakeGPU(), pytest.raises(RuntimeError, match="on the host"):
        torch.zeros(4, device="cuda") + torch.ones(4)
