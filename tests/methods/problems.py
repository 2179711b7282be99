"""Small problems on which every joint method runs."""

import pytest
import torch
from torch import nn

import taskgroup as tg

# Imported whole, before a test hides one of the packages that it imports.
pytest.importorskip("torchjd.aggregation")

NAMES = list(tg.methods.METHODS)


def gradient_space():
    """The names of the methods that look at every task's gradient."""
    return NAMES[NAMES.index("mgda") :]


def tasks_of(n_tasks):
    return [f"task{k}" for k in range(n_tasks)]


class Model(nn.Module):
    """A small shared network and K heads, with losses that conflict."""

    def __init__(self, n_tasks):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.shared = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
            self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(n_tasks))
            self.x = torch.randn(7, 4)
            self.targets = 2 * torch.randn(n_tasks, 7, 2)

    def losses(self, x):
        features = self.shared(x)
        outputs = [(head(features) - y) for head, y in zip(self.heads, self.targets, strict=True)]
        return {t: o.square().mean() for t, o in zip(tasks_of(len(outputs)), outputs, strict=True)}


def likelihood(losses):
    return {task: loss.neg().div(10).exp() for task, loss in losses.items()}


def made(name, model, shared=None, tasks=None):
    """The method with what it cannot do without."""
    options = {"dwa": {"epoch": 2}, "dtp": {"score": likelihood}}.get(name, {})
    shared = model.shared if shared is None else shared
    tasks = tasks_of(len(model.heads)) if tasks is None else tasks
    return tg.methods.find(name)(shared, tasks, **options)
