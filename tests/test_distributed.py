"""Two ranks that see different data take the same decisions."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import taskgroup as tg
from tests.planted import Planted

WORLD = 2


def train(rank, port, shared):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    try:
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
        shared[rank] = (trace, groups.affinity.matrix.tolist(), planted.x.tolist())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_different_data_decide_alike():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(train, args=(port, shared), nprocs=WORLD)
        assert shared[0] == shared[1]
        assert len(shared[0][0][-1]) == 2  # and the planted groups are found
