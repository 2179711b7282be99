"""What batches of group steps cost against as many joint steps, and against the cost model.

The demo's network, and one with heavy decoders (3x3 Conv-BN-ReLU, twice) on the same encoder;
eleven tasks of the photograph in M groups. The cost model is that of docs/cost.md, from three times
measured in the same rounds: the encoder's, and those of all heads forth and back.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import taskgroup as tg
from taskgroup.experiment.problem import make_problem
from taskgroup.experiment.recipe import read_recipe
from taskgroup.vision import TASKONOMY

EVERY = 10  # batches, of the settings that do not observe all
JOINT, MODEL = "M joint steps", "the cost model"
TASKS = list(TASKONOMY)


class Costs(NamedTuple):
    """Seconds: e of the encoder, forth and back; f and b of all heads, forth and back."""

    e: float
    f: float
    b: float


# Of a batch, by the setting; M groups, observed every n-th batch.
PREDICTED = {
    "all groups": lambda c, m, n: m * (c.e + c.f) + c.b,
    "all groups, observed every 10th": lambda c, m, n: m * c.e + c.f + c.b + (m - 1) * c.f / n,
    "one group, observed every 10th": lambda c, m, n: (
        (1 + 1 / n) * (c.e + (c.f + c.b) / m) + 2 * (1 - 1 / m) * c.f / n
    ),
}
OPTIONS = {
    "all groups": {},
    "all groups, observed every 10th": {"observe_every": EVERY},
    "one group, observed every 10th": {"observe_every": EVERY, "groups_per_batch": 1},
}
STEPS = {"one group, observed every 10th": 1}  # in the place of M


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


class Network:
    """A network, a batch, and an optimizer."""

    def __init__(self, heads, device):
        torch.manual_seed(0)
        recipe = read_recipe("motorcycle")
        self.problem = make_problem(recipe)
        model = self.problem.model(TASKS)
        if heads == "decoders":
            channels = model.encoder.channels
            heads = {task: decoder(channels, TASKONOMY[task].channels) for task in TASKS}
            model = tg.MultiTaskModel(model.encoder, heads)
        self.model = model.to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        batch = self.problem.sample(8, torch.Generator().manual_seed(0))
        self.batch = tree_map(lambda tensor: tensor.to(device), batch)
        self.images = self.problem.inputs(self.batch)

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def joint_step(self):
        losses = self.problem.losses(self.model(self.images), self.batch)
        self.step(torch.stack([*losses.values()]).sum())

    def encoder_step(self):
        self.step(self.model.encoder(self.images).mean())

    def heads_forward(self, features):
        with torch.no_grad():
            outputs = {task: head(features) for task, head in self.model.heads.items()}
            self.problem.losses(outputs, self.batch)

    def batches(self, groups, number):
        """So many batches of group steps."""
        for _ in range(number):
            for group in groups:
                outputs = self.model(self.images, group=group)
                self.step(group.loss(self.problem.losses(outputs, self.batch)))


@pytest.mark.parametrize("n_groups", [2, 4])
@pytest.mark.parametrize("heads", ["demo's", "decoders"])
def test_cost(record, device, heads, n_groups):
    network = Network(heads, device)
    labels = torch.arange(len(TASKS)) % n_groups
    settings = {
        name: tg.TaskGroups(TASKS, warmup=0, grouping=lambda matrix: labels, **options)
        for name, options in OPTIONS.items()
    }
    for groups in settings.values():  # past the singletons that they begin with
        groups.load_state_dict({**groups.state_dict(), "rounds": 1})
    with torch.no_grad():
        features = network.model.encoder(network.images)
    sides = {
        "encoder": network.encoder_step,
        "heads": lambda: network.heads_forward(features),
        "joint": network.joint_step,
    }
    for name, groups in settings.items():
        number = EVERY if "every" in name else 1  # whole cycles
        sides[name] = lambda groups=groups, number=number: network.batches(groups, number)
    least = record.least_seconds(sides)
    joint = least["joint"]
    costs = Costs(least["encoder"], least["heads"], joint - least["encoder"] - least["heads"])
    for name, groups in settings.items():
        assert len(groups.partition) == n_groups
        seconds = least[name] / (EVERY if "every" in name else 1)
        record.add(
            f"M = {n_groups}, {name}",
            len(TASKS),
            seconds,
            {
                JOINT: STEPS.get(name, n_groups) * joint,
                MODEL: PREDICTED[name](costs, n_groups, EVERY),
            },
            model=heads,
        )
    shares = ", ".join(
        f"{part} {100 * value / joint:.0f}%" for part, value in costs._asdict().items()
    )
    record.remark(f"Of a joint step with {heads} heads, {1e3 * joint:.0f} ms: {shares}.")
