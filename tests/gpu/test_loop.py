"""The loop on the GPU: the same decisions as on the host, and never a wait but the one it plans."""

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.planted import Planted

GPU = "cuda"
TASKS = [f"task{k}" for k in range(6)]


def make(affinity, *, device=GPU, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Dropout(dropout))
    model = tg.MultiTaskModel(encoder, {t: nn.Linear(64, 1) for t in TASKS}).to(device, dtype)
    kind = (
        tg.ProximalAffinity(decay=0.1)
        if affinity == "proximal"
        else tg.GradientAffinity(
            model.encoder, decay=0.1, sample=4 if affinity == "sampled gradient" else None
        )
    )
    groups = tg.TaskGroups(TASKS, affinity=kind, warmup=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 16, 32, generator=generator).to(device, dtype)
    y = torch.randn(40, 6, 16, 1, generator=generator).to(device, dtype)
    return model, groups, optimizer, x, y


def train(model, groups, optimizer, x, y, batches, stacked=False):
    trace = []
    for n in batches:
        for group in groups:
            outputs = model(x[n], group=None if stacked else group)
            losses = {t: (out - y[n, TASKS.index(t)]).square().mean() for t, out in outputs.items()}
            optimizer.zero_grad()
            group.loss(torch.stack(list(losses.values())) if stacked else losses).backward()
            optimizer.step()
            trace.append(group.tasks)
    return trace


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("affinity", ["proximal", "gradient", "sampled gradient"])
def test_nothing_synchronises(affinity, stacked):
    """Any operation that makes the host wait for the GPU raises; past warm-up and regrouping."""
    run = make(affinity, dropout=0.2)
    train(*run, range(3), stacked)  # the allocator and cuBLAS set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(*run, range(3, 40), stacked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run[1].partition) < len(TASKS)  # it has learned meanwhile


@pytest.mark.parametrize("affinity", ["proximal", "gradient"])
def test_takes_the_decisions_of_the_host(affinity):
    traces, ends = [], []
    for device in (GPU, "cpu"):
        run = make(affinity, device=device, dtype=torch.float64)
        traces.append(train(*run, range(30)))
        ends.append(torch.cat([p.detach().cpu().flatten() for p in run[0].parameters()]))
        matrix = run[1].affinity.matrix
        assert matrix.device.type == device
    assert traces[0] == traces[1]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_dropout_is_replayed():
    model, groups, _, x, _ = make("proximal", dropout=0.5)
    for group in groups:
        features = model.encoder(x[0])
        if group.first:
            first = features
        assert torch.equal(features, first)
        group.loss({t: (features.mean() * 0 + k + 1) for k, t in enumerate(TASKS)})


def test_finds_planted_groups():
    planted = Planted([3, 3], -0.5, seed=0)
    planted.x = planted.x.detach().to(GPU).requires_grad_()
    noisy = planted.batch
    planted.batch = lambda: noisy().to(GPU)
    groups = tg.TaskGroups(planted.tasks, affinity=tg.ProximalAffinity(decay=0.01), warmup=100)
    learned = planted.train(groups, 150)[101:]
    assert all(partition == planted.partition for partition in learned)


def test_resume_is_exact():
    whole, first = make("proximal"), make("proximal")
    train(*first, range(9))
    second = make("proximal")
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    tail = train(*second, range(9, 20))
    assert train(*whole, range(20))[-len(tail) :] == tail
    assert torch.equal(second[1].affinity.matrix, whole[1].affinity.matrix)


def test_bad_losses_are_told_a_batch_late():
    _, groups, *_ = make("proximal")
    x = torch.ones(6, device=GPU, requires_grad=True)
    for group in groups:
        group.loss(x * torch.tensor([1.0, -1, 1, 1, 1, 1], device=GPU))
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="task1"):
        next(iter(groups))
