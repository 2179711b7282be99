"""A plain loop with missing labels, which continues where it was killed.

python examples/plain.py    # run it again to continue a stopped run exactly
"""

import argparse
from pathlib import Path

import torch
from weather import labelled, losses_of, make_groups, make_loader, make_model

import taskgroup as tg


def train(checkpoint, epochs):
    loader = make_loader()
    model = make_model()
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
            torch.manual_seed(1000 * epoch + 10 * batch)  # dropout continues exactly
            for group in groups.batch(labelled(y)):
                losses = losses_of(model(x, group=group), y)
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()
        state = {name: part.state_dict() for name, part in parts.items()}
        tg.checkpoint.save(checkpoint, {**state, "epochs": epoch + 1})
        print(f"epoch {epoch + 1}: groups {groups.partition}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/plain.pt"))
    parser.add_argument("--epochs", type=int, default=10)
    train(**vars(parser.parse_args()))
