"""The plain loop in the Hugging Face Trainer.

python examples/with_trainer.py    # run it again to continue a stopped run exactly
"""

import argparse
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from weather import as_columns, end_ranks, labelled, losses_of, make_groups, make_loader, make_model

from taskgroup.integrations.transformers import GroupTrainer


class WeatherTrainer(GroupTrainer):
    """The Trainer with the batches of the other examples."""

    def get_train_dataloader(self):
        rank, world = self.args.process_index, self.args.world_size
        return make_loader(rank, world, collate_fn=as_columns)


class LikeTheOthers(TrainerCallback):
    """Shuffle the batches and draw dropout as the other examples do."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **_):
        self.epoch = round(state.epoch)
        train_dataloader.sampler.set_epoch(self.epoch)

    def on_step_begin(self, args, state, control, train_dataloader, **_):
        batch = state.global_step - self.epoch * len(train_dataloader)
        torch.manual_seed(1000 * self.epoch + 10 * batch + args.process_index)


def train(folder, epochs):
    model = make_model()
    trainer = WeatherTrainer(
        model,
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            save_strategy="epoch",
            save_total_limit=2,
            label_names=["y"],
            max_grad_norm=0,  # the other examples do not clip
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        groups=make_groups(),
        losses=lambda outputs, inputs: losses_of(outputs, inputs["y"]),
        labelled=lambda inputs: labelled(inputs["y"]),
        optimizers=(torch.optim.Adam(model.parameters(), lr=1e-2), None),
        callbacks=[LikeTheOthers()],
    )
    last = get_last_checkpoint(folder) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        print(f"groups {trainer.groups.partition}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--epochs", type=int, default=10)
    train(**vars(parser.parse_args()))
    end_ranks()
