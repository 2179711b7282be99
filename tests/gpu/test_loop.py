"""The loop on the GPU: the same decisions as on the host, and never a wait but the one it plans."""

import functools
import io
import warnings
from contextlib import contextmanager

import pytest
import torch

import taskgroup as tg
from tests.gpu.device import GPU, needs_cuda
from tests.nn import test_group_states as states
from tests.planted import Planted
from tests.test_waits import TASKS, WAYS, Loop

BATCHES = 20


@contextmanager
def no_waiting():
    """What makes the host wait for the GPU raises; tests/test_waits.py looks for it on the CPU."""
    if GPU != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_synchronises(way):
    loop = Loop(way, GPU)
    loop.train(3)  # cuBLAS sets itself up, and BatchedHeads looks at its first outputs
    with no_waiting():
        loop.train(BATCHES)
    assert loop.groups.affinity.matrix.isfinite().all()


@needs_cuda
def test_a_wait_would_be_seen():
    x = torch.ones(3, device=GPU)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("way", ["model", "gradient", "sampled gradient", "some labels", "hold"])
def test_takes_the_decisions_of_the_host(way):
    here, host = (Loop(WAYS[way], device, torch.float64, dropout=0.0) for device in (GPU, "cpu"))
    steps = here.train(30)
    assert steps == host.train(30)
    assert any(len(group) > 1 for group in steps)
    assert here.groups.affinity.matrix.device.type == GPU
    for ours, expected in zip(here.model.parameters(), host.model.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "adam, fused", "capturable", "momentum"])
def test_states_of_groups(kind, monkeypatch):
    """As one optimizer for every group; and where groups change, as on the host."""
    capturable = {"lr": 0.01, "capturable": GPU == "cuda"}  # the host does not take it
    make = functools.partial(torch.optim.Adam, **capturable)
    monkeypatch.setitem(states.OPTIMIZERS, "capturable", make)
    loop, reference = states.Loop(kind, device=GPU), states.OneOptimizerEach(kind, GPU)
    for n in range(5):
        for tasks, _ in loop.batch(n):
            reference.step(n, tasks)
    assert states.same(loop.model, reference.model)

    ends = []
    for device in (GPU, "cpu"):
        groups = states.scripted(*states.PARTITIONS)
        host = "adam, foreach" if kind == "capturable" else kind
        loop = states.Loop(kind if device == GPU else host, groups, torch.float64, device=device)
        loop.train(range(2))
        file = io.BytesIO()
        torch.save((loop.groups.state_dict(), loop.optimizer.state_dict()), file)
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        loop.groups.load_state_dict(state[0])
        loop.optimizer.load_state_dict(state[1])
        loop.train(range(2, 8))
        ends.append([parameter.cpu() for parameter in loop.model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_dropout_is_replayed():
    loop = Loop(WAYS["model"], GPU, dropout=0.5)
    loop.train(1)  # which tells the groups of the GPU's generator
    for group in loop.groups:
        features = loop.model.encoder(loop.x[0])
        if group.first:
            first = features
        assert torch.equal(features, first)
        group.loss({task: features.mean() * 0 + k + 1 for k, task in enumerate(TASKS)})


def test_finds_planted_groups():
    planted = Planted([3, 3], -0.5, seed=0)
    planted.x = planted.x.detach().to(GPU).requires_grad_()
    noisy = planted.batch
    planted.batch = lambda: noisy().to(GPU)
    groups = tg.TaskGroups(planted.tasks, affinity=tg.ProximalAffinity(decay=0.01), warmup=100)
    learned = planted.train(groups, 150)[101:]
    assert all(partition == planted.partition for partition in learned)


def test_resume_is_exact():
    whole, first, second = (Loop(WAYS["model"], GPU, dropout=0.0) for _ in range(3))
    first.train(9)
    for part in ("model", "groups", "optimizer"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    second.batch = first.batch
    tail = second.train(11)
    assert whole.train(20)[-len(tail) :] == tail
    assert torch.equal(second.groups.affinity.matrix, whole.groups.affinity.matrix)


@needs_cuda
def test_bad_losses_are_told_a_batch_late():
    groups = tg.TaskGroups(TASKS)
    x = torch.ones(len(TASKS), device=GPU, requires_grad=True)
    for group in groups:
        group.loss(x * torch.tensor([1.0, -1, 1, 1], device=GPU))
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="task1"):
        next(iter(groups))
