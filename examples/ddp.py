"""The plain loop on several processes, each with a part of every batch.

torchrun --nproc-per-node 2 examples/ddp.py    # run it again to continue a stopped run exactly
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from weather import end_ranks, labelled, losses_of, make_groups, make_loader, make_model

import taskgroup as tg


def train(checkpoint, epochs):
    rank = dist.get_rank()
    loader = make_loader(rank, dist.get_world_size())
    model = make_model()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    groups = make_groups()
    parts = {"model": model, "optimizer": optimizer, "groups": groups}
    done = 0
    if checkpoint.exists():
        state = tg.checkpoint.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["epochs"]

    for epoch in range(done, epochs):
        loader.sampler.set_epoch(epoch)
        for batch, (x, y) in enumerate(loader):
            torch.manual_seed(1000 * epoch + 10 * batch + rank)  # dropout continues exactly
            for group in groups.batch(labelled(y)):
                losses = losses_of(ddp(x, group=group), y)
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()
        if rank == 0:  # the state is the same on every rank
            state = {name: part.state_dict() for name, part in parts.items()}
            tg.checkpoint.save(checkpoint, {**state, "epochs": epoch + 1})
            print(f"epoch {epoch + 1}: groups {groups.partition}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/ddp.pt"))
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    dist.init_process_group()  # gloo on CPUs, NCCL and gloo on GPUs
    train(**vars(arguments))
    end_ranks()


if __name__ == "__main__":
    main()
