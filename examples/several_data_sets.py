"""Three data sets with different tasks: all of them in every step, or one at a time in turns.

python examples/several_data_sets.py                            # add --turns for one at a time
torchrun --nproc-per-node 2 examples/several_data_sets.py       # on two processes
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from weather import end_ranks

import taskgroup as tg

TASKS_OF = {"stations": ["wind", "rain"], "satellite": ["heat"], "sensors": ["smoke"]}
TASKS = [task for tasks in TASKS_OF.values() for task in tasks]
SIGN = {"wind": 1, "rain": 1, "heat": -1, "smoke": -1}  # tasks with the same sign help each other


def stream(name, rank):
    """Endless mini-batches of one data set: readings [16, 8], targets {task: [16, 1]}."""
    generator = torch.Generator().manual_seed(100 * rank + len(name))
    direction = torch.linspace(-1, 1, 8)
    while True:
        x = torch.randn(16, 8, generator=generator)
        yield x, {task: (SIGN[task] * x @ direction).tanh()[:, None] for task in TASKS_OF[name]}


class SeveralDataSets(nn.Module):
    """One call for all data sets of a step, as DistributedDataParallel needs it."""

    def __init__(self, encoder, heads):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs, group):
        outputs = {}
        for name, x in inputs.items():
            needed = [task for task in TASKS_OF[name] if task in group.observed]
            if not needed:
                continue  # no task of this data set is in the group
            features = self.encoder(x)
            for task in needed:
                with torch.set_grad_enabled(task in group.graph):
                    outputs[task] = self.heads[task](features)
        return outputs


def train(turns=False, steps=300, rank=0, wrap=lambda model: model):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
    model = wrap(SeveralDataSets(encoder, {task: nn.Linear(32, 1) for task in TASKS}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    grouping = tg.Fixed(TASKS_OF.values()) if turns else None  # None: learned
    affinity = tg.ProximalAffinity(decay=0.05)
    groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=grouping, warmup=50)
    streams = {name: stream(name, rank) for name in TASKS_OF}
    for step in range(steps):
        # In turns, every rank takes the same data set, because all ranks step on the same groups.
        names = [list(TASKS_OF)[step % len(TASKS_OF)]] if turns else list(TASKS_OF)
        batches = {name: next(streams[name]) for name in names}
        targets = {task: y for _, own in batches.values() for task, y in own.items()}
        for group in groups.batch(targets.keys()):
            outputs = model({name: x for name, (x, _) in batches.items()}, group)
            losses = {task: (y - targets[task]).square().mean() for task, y in outputs.items()}
            optimizer.zero_grad()
            group.loss(losses).backward()
            optimizer.step()
    return groups


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", action="store_true", help="one data set in each step")
    settings = vars(parser.parse_args())
    if dist.is_torchelastic_launched():
        dist.init_process_group()
        settings |= {
            "rank": dist.get_rank(),
            "wrap": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        }
    groups = train(**settings)
    if settings.get("rank", 0) == 0:
        print(f"groups {groups.partition}", flush=True)
    end_ranks()
