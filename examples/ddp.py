"""Several processes, labels missing here and there, a run that goes on where it was killed.

torchrun --nproc-per-node 2 examples/ddp.py    # the same command again goes on, exactly
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taskgroup as tg

TASKS = ["wind", "rain", "heat", "smoke"]


def sample(batch, rank):
    """What a rank sees of a batch: 16 samples; a label that is missing is NaN."""
    generator = torch.Generator().manual_seed(1000 * batch + rank)
    x = torch.randn(16, 8, generator=generator)
    direction = torch.linspace(-1, 1, 8)
    y = torch.stack([x @ direction, x @ direction, x @ -direction, x @ -direction], 1).tanh()
    y[torch.rand(16, 4, generator=generator) < 0.3] = torch.nan
    if (batch + rank) % 3 == 0:
        y[:, TASKS.index("smoke")] = torch.nan  # none at all
    return x, y


def masked_mean(output, target):
    """Zero where no label is, with a graph, and no NaN in the gradient."""
    known = ~target.isnan()
    error = (output[:, 0] - target.nan_to_num()).square() * known
    return error.sum() / known.sum().clamp(min=1)


def train(rank, checkpoint, batches, every):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
    model = tg.MultiTaskModel(encoder, {task: nn.Linear(32, 1) for task in TASKS})
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    groups = tg.TaskGroups(TASKS, warmup=20, affinity=tg.ProximalAffinity(decay=0.05))
    parts = {"model": model, "optimizer": optimizer, "groups": groups}
    done = 0
    if checkpoint.exists():
        state = tg.checkpoint.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["batch"]

    for batch in range(done + 1, batches + 1):
        x, y = sample(batch, rank)
        torch.manual_seed(1000 * batch + rank)  # dropout of its own, and nothing to save
        labelled = [task for k, task in enumerate(TASKS) if not y[:, k].isnan().all()]
        for group in groups.batch(labelled):
            outputs = ddp(x, group=group)
            losses = {t: masked_mean(outputs[t], y[:, TASKS.index(t)]) for t in group.observed}
            optimizer.zero_grad()
            group.loss(losses).backward()
            optimizer.step()
        if rank == 0 and (batch % every == 0 or batch == batches):
            # All of it is the same on every rank.
            state = {name: part.state_dict() for name, part in parts.items()}
            tg.checkpoint.save(checkpoint, {**state, "batch": batch})
            print(f"batch {batch}: groups {groups.partition}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/ddp.pt"))
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="batches between checkpoints")
    dist.init_process_group()  # gloo on CPUs, NCCL and gloo on GPUs
    train(dist.get_rank(), **vars(parser.parse_args()))
    dist.destroy_process_group()  # gloo may hang here while a DistributedDataParallel is left


if __name__ == "__main__":
    main()
