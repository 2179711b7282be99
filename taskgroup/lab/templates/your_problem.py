"""Four tasks of two kinds on made-up data, to replace with your own.

In the folder of this file:

    taskgroup train your_problem.py:YourProblem
    taskgroup compare your_problem.py:YourProblem --methods upgrad,selective --seeds 3
"""

from collections.abc import Mapping, Sequence
from typing import Any

import taskgroup as tg
import torch
from taskgroup import lab
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def make_data(n: int, seed: int) -> TensorDataset:
    """Inputs [n, 8] and labels [n, 4]: wind and rain have one cause, heat and smoke another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    causes = x.unflatten(1, (2, 4)).sum(2) / 2
    labels = causes.repeat_interleave(2, dim=1)
    return TensorDataset(x, labels + 0.3 * torch.randn(n, 4, generator=generator))


class YourProblem(lab.Problem):
    """Your data set, network, losses and metrics."""

    tasks = ("wind", "rain", "heat", "smoke")  # or {"wind": "Wind speed", ...}: names as shown
    better = "lower"  # or "higher", or {"wind": "lower", ...}
    metrics = "RMSE"  # as shown; or {"wind": "RMSE", ...}

    def __init__(self) -> None:  # with an argument, it gets the settings: --data DIR is its root
        self.train = make_data(512, seed=0)
        self.held_out = make_data(512, seed=1)

    def model(self, tasks: Sequence[str]) -> nn.Module:
        """Any module that returns {task: output} and has the layers of each task in heads."""
        encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        heads = {task: nn.Linear(32, 1) for task in tasks}
        for head in heads.values():  # at zero, tasks of one cause agree from the first step on
            nn.init.zeros_(head.weight)
        return tg.MultiTaskModel(encoder, heads)

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """The training data; it is seeded and repeated for you. batch[0] goes to the network."""
        return DataLoader(self.train, batch_size, shuffle=True, drop_last=True)

    def losses(self, outputs: Mapping[str, Tensor], batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """A scalar for each task in outputs, which may be some of the tasks."""
        return {task: self.errors(outputs, batch[1])[task].square().mean() for task in outputs}

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """A metric above zero for each task that the network is trained on."""
        x, labels = self.held_out.tensors
        device = next(model.parameters()).device
        errors = self.errors(model(x.to(device)), labels.to(device))
        return {task: error.square().mean().sqrt().item() for task, error in errors.items()}

    def errors(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The error of every sample."""
        place = {task: k for k, task in enumerate(self.tasks)}
        return {task: output[:, 0] - labels[:, place[task]] for task, output in outputs.items()}
