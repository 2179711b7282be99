"""Two ranks that see different data take the same decisions."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import taskgroup as tg
from tests.planted import Planted

WORLD = 2


def spawn(function):
    """What ``function(rank)`` returns on each of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, args=(port, results, function), nprocs=WORLD)
        return [results[rank] for rank in range(WORLD)]


def on_rank(rank, port, results, function):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    try:
        results[rank] = function(rank)
    finally:
        dist.destroy_process_group()


def train(rank):
    planted = Planted([2, 2], -0.5, seed=0)
    planted._generator.manual_seed(100 + rank)  # each rank its own batches
    groups = tg.TaskGroups(planted.tasks, warmup=5, affinity=tg.ProximalAffinity(decay=0.1))
    trace = []
    for _ in range(20):
        batch = planted.batch()
        for group in groups:
            (gradient,) = torch.autograd.grad(group.loss(planted.losses(batch)), planted.x)
            dist.all_reduce(gradient)
            planted.x.data.sub_(1e-3 * gradient / WORLD)
            trace.append(group.tasks)
        trace.append(groups.partition)
    return trace, groups.affinity.matrix.tolist(), planted.x.tolist()


def measure_gradients(rank):
    """A half of the batch on each rank; task b reaches the bias from rank 1 alone."""
    matrix = gradient_affinity(halves=[rank])
    return matrix.tolist()


def gradient_affinity(halves):
    weight = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    frozen = torch.zeros(2, dtype=torch.float64)
    data = torch.arange(12.0, dtype=torch.float64).view(2, 2, 3).square()  # [half, sample, 3]
    groups = tg.TaskGroups(
        ["a", "b"], affinity=tg.GradientAffinity([weight, frozen, bias], decay=1.0)
    )
    for group in groups:
        a = torch.stack([(data[h] @ weight - 1).square().mean() for h in halves]).mean()
        b = [(data[h] @ weight + (bias if h == 1 else 0)).square().mean() for h in halves]
        group.loss({"a": a, "b": torch.stack(b).mean()})
    return groups.affinity.matrix


@pytest.mark.slow
def test_ranks_with_different_data_decide_alike():
    first, second = spawn(train)
    assert first == second
    assert len(first[0][-1]) == 2  # and the planted groups are found


@pytest.mark.slow
def test_gradients_are_averaged_before_their_inner_products():
    first, second = spawn(measure_gradients)
    assert first == second
    whole = gradient_affinity(halves=[0, 1])
    torch.testing.assert_close(torch.tensor(first), whole, rtol=1e-6, atol=0)
