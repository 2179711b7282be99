"""Code that the examples share: made-up weather data with missing labels."""

import gc

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group: see end_ranks()
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import taskgroup as tg

TASKS = ["wind", "rain", "heat", "smoke"]


def make_loader(rank=0, world=1, collate_fn=None):
    """Batches of 16 samples: readings [16, 8], targets [16, 4], where a missing label is NaN.

    ``loader.sampler.set_epoch(epoch)`` shuffles; every rank sees a part of its own. ``collate_fn``
    makes a batch of a list of samples.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 8, generator=generator)
    direction = torch.linspace(-1, 1, 8)
    y = torch.stack([x @ direction, x @ direction, x @ -direction, x @ -direction], 1).tanh()
    known = torch.tensor([0.7, 0.7, 0.7, 0.12])  # smoke is labelled in about one sample of eight
    y[torch.rand(320, 4, generator=generator) > known] = torch.nan
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data, world, rank)
    return DataLoader(data, batch_size=16, sampler=sampler, collate_fn=collate_fn)


def as_columns(samples):
    """A batch as the Hugging Face Trainer takes it: columns by name.

    ``"input"`` is the name of the argument of ``nn.Sequential.forward``.
    """
    x, y = zip(*samples, strict=True)
    return {"input": torch.stack(x), "y": torch.stack(y)}


def make_model():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
    return tg.MultiTaskModel(encoder, {task: nn.Linear(32, 1) for task in TASKS})


def make_groups():
    return tg.TaskGroups(TASKS, warmup=20, affinity=tg.ProximalAffinity(decay=0.05))


def labelled(targets):
    """The tasks for which at least one sample has a label."""
    return [task for k, task in enumerate(TASKS) if not targets[:, k].isnan().all()]


def losses_of(outputs, targets):
    return {
        task: masked_mean(output, targets[:, TASKS.index(task)]) for task, output in outputs.items()
    }


def masked_mean(output, target):
    """The loss of the labelled samples; zero without any, with a graph and finite gradients."""
    known = ~target.isnan()
    error = (output[:, 0] - target.nan_to_num()).square() * known
    return error.sum() / known.sum().clamp(min=1)


def end_ranks():
    """Destroy the process group, if there is one; call it last in a program on several ranks.

    Gloo runs collectives in threads of its own, which end with the last reference to the process
    group. A thread that still runs while Python ends may abort the process ("terminate called
    without an active exception"). Two things keep a reference: a DistributedDataParallel, and the
    default arguments in torch.distributed.nn, where the first import of that module (by the first
    optimizer, at the latest) comes after init_process_group().
    """
    gc.collect()  # trainers keep their DistributedDataParallel in cycles
    if dist.is_initialized():
        dist.destroy_process_group()
