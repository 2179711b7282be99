"""The plain loop in Lightning, with manual optimization because a batch has several steps.

python examples/with_lightning.py    # add --devices 2; run it again to continue
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from weather import end_ranks, labelled, losses_of, make_groups, make_loader, make_model

from taskgroup.integrations.lightning import GroupsCallback


class Forecast(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = make_model()
        self.groups = make_groups()

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), lr=1e-2)

    def training_step(self, batch, number):
        x, y = batch
        torch.manual_seed(1000 * self.current_epoch + 10 * number + self.global_rank)  # dropout
        optimizer = self.optimizers()
        for group in self.groups.batch(labelled(y)):
            losses = losses_of(self.model(x, group=group), y)
            optimizer.zero_grad()
            self.manual_backward(group.loss(losses))
            optimizer.step()

    def on_train_epoch_end(self):
        self.print(f"epoch {self.current_epoch + 1}: groups {self.groups.partition}", flush=True)


def train(folder, epochs, devices):
    module = Forecast()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_find_unused_parameters_true",
        max_epochs=epochs,  # max_steps would count the steps of the groups
        callbacks=[ModelCheckpoint(folder, save_last=True), GroupsCallback(module.groups)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = make_loader(trainer.global_rank, trainer.world_size)
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1)
    train(**vars(parser.parse_args()))
    end_ranks()
