"""The cost of batches of group steps, compared with as many joint steps and with the cost model.

The networks are the demo's, and one with heavy decoders (3x3 Conv-BN-ReLU, twice) on the same
encoder, with eleven tasks of the photograph in M groups. The cost model is the one of docs/cost.md.
It needs three times, measured in the same rounds: that of the encoder, and those of all heads
forward and backward.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import taskgroup as tg
from benchmarks.training import Training
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.vision import TASKONOMY

EVERY = 5  # batches; settings that do not observe every batch observe every fifth
MODEL = "the cost model"
TASKS = list(TASKONOMY)


class Costs(NamedTuple):
    """Seconds: e of the encoder, forward and backward; f and b of all heads, forward, backward."""

    e: float
    f: float
    b: float


# The predicted cost of a batch with M groups if every n-th batch is observed.
PREDICTED = {
    "all groups": lambda c, m, n: m * (c.e + c.f) + c.b,
    "all groups, observed every 5th": lambda c, m, n: m * c.e + c.f + c.b + (m - 1) * c.f / n,
    "one group, observed every 5th": lambda c, m, n: (
        (1 + 1 / n) * (c.e + (c.f + c.b) / m) + 2 * (1 - 1 / m) * c.f / n
    ),
}
OPTIONS = {
    "all groups": {},
    "all groups, observed every 5th": {"observe_every": EVERY},
    "one group, observed every 5th": {"observe_every": EVERY, "groups_per_batch": 1},
}
JOINT_STEPS = {"one group, observed every 5th": 1}  # joint steps to compare with; otherwise M


def decoder(channels, out):
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(channels, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, out, 1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )


def training_of(heads, device):
    torch.manual_seed(0)
    problem = make_problem(read_recipe("motorcycle"))
    model = problem.model(TASKS)
    if heads == "decoders":
        channels = model.encoder.channels
        own = {task: decoder(channels, TASKONOMY[task].channels) for task in TASKS}
        model = tg.MultiTaskModel(model.encoder, own)
    batch = tree_map(lambda tensor: tensor.to(device), next(problem.batches(8, 0)))
    losses_of = partial(problem.losses, batch=batch)
    return Training(model.to(device), problem.inputs(batch), losses_of, lr=1e-5)


def seconds_of(record, sides, cycles):
    """The seconds per batch of each side: the median over cycles, averaged over a cycle of batches.

    A shared machine is faster at some times than at others. The sides therefore take turns batch by
    batch, and the median counts: the minimum would favour short calls. On the CPU it measures the
    processor time of one thread.
    """
    for call in sides.values():
        for _ in range(EVERY):
            call()
    found = {name: [[] for _ in range(EVERY)] for name in sides}
    for _ in range(cycles):
        for place in range(EVERY):
            for name, call in sides.items():
                start = now(record.device)
                call()
                found[name][place].append(now(record.device) - start)
    return {
        name: statistics.mean(statistics.median(place) for place in places)
        for name, places in found.items()
    }


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("n_groups", [2, 4])
@pytest.mark.parametrize("heads", ["demo's", "decoders"])
def test_cost(record, device, heads, n_groups):
    training = training_of(heads, device)
    model, images = training.model, training.inputs
    labels = torch.arange(len(TASKS)) % n_groups
    settings = {
        name: tg.TaskGroups(TASKS, warmup=0, grouping=lambda matrix: labels, **options)
        for name, options in OPTIONS.items()
    }
    for groups in settings.values():  # skip the first round, in which every task is alone
        groups.load_state_dict({**groups.state_dict(), "rounds": 1})
    with torch.no_grad():
        features = model.encoder(images)

    @torch.no_grad()
    def heads_forward():
        training.losses_of({task: head(features) for task, head in model.heads.items()})

    sides = {
        "encoder": lambda: training.step(model.encoder(images).mean()),
        "heads": heads_forward,
        "joint": training.joint,
        **{name: partial(training.batch, groups) for name, groups in settings.items()},
    }
    seconds = seconds_of(record, sides, cycles=12 if record.full else 3)
    joint = seconds["joint"]
    costs = Costs(
        seconds["encoder"], seconds["heads"], joint - seconds["encoder"] - seconds["heads"]
    )
    for name, groups in settings.items():
        assert len(groups.partition) == n_groups
        steps = JOINT_STEPS.get(name, n_groups)
        record.add(
            f"M = {n_groups}, {name}",
            len(TASKS),
            seconds[name],
            {
                f"{steps} joint step{'s' * (steps > 1)}": steps * joint,
                MODEL: PREDICTED[name](costs, n_groups, EVERY),
            },
            goals={MODEL: 1.0},  # 15 percent off is acceptable
            model=heads,
        )
    shares = ", ".join(
        f"{part} {100 * value / joint:.0f}%" for part, value in costs._asdict().items()
    )
    record.remark(f"A joint step with {heads} heads takes {1e3 * joint:.0f} ms: {shares}.")
