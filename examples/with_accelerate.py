"""The plain loop with Hugging Face Accelerate.

accelerate launch examples/with_accelerate.py    # run it again to continue a stopped run exactly
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from weather import end_ranks, labelled, losses_of, make_groups, make_loader, make_model


def train(folder, epochs):
    # Not gradient_accumulation_steps: accelerator.accumulate() would mix the groups.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
    rank = accelerator.process_index
    loader = make_loader(rank, accelerator.num_processes)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    groups = make_groups()
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(groups)
    saved = sorted(folder.glob("epoch-*"))
    if saved:
        accelerator.load_state(saved[-1])

    for epoch in range(len(saved), epochs):
        loader.sampler.set_epoch(epoch)
        for batch, (x, y) in enumerate(loader):
            torch.manual_seed(1000 * epoch + 10 * batch + rank)  # dropout
            for group in groups.batch(labelled(y)):
                losses = losses_of(model(x, group=group), y)
                optimizer.zero_grad()
                accelerator.backward(group.loss(losses))
                optimizer.step()
        accelerator.save_state(folder / "partial")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # written whole or not at all
            (folder / "partial").rename(folder / f"epoch-{epoch:03}")
        accelerator.print(f"epoch {epoch + 1}: groups {groups.partition}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=10)
    train(**vars(parser.parse_args()))
    end_ranks()
