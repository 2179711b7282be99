"""A recommender with five tasks, which predict what a user does: joint and selective training.

python examples/tabular.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import taskgroup as tg

USERS, ITEMS = 100, 80
TASKS = ["click", "like", "share", "skip", "minutes"]  # all but the last one are yes or no


def make_log(views=20_000):
    """Users and items [views], labels [views, 5] from made-up tastes; a missing label is NaN."""
    generator = torch.Generator().manual_seed(0)
    tastes = [torch.randn(n, 4, generator=generator) for n in (USERS, ITEMS)]
    users, items = (torch.randint(n, (views,), generator=generator) for n in (USERS, ITEMS))
    match = 2 * tastes[0][users] * tastes[1][items]
    wants, trusts = match[:, :3].sum(1), match[:, 2:].sum(1)
    scores = torch.stack([wants, wants + trusts, trusts - 1, -wants], 1)
    labels = (torch.rand(views, 4, generator=generator) < scores.sigmoid()).float()
    minutes = F.softplus(wants)
    minutes[labels[:, 0] == 0] = torch.nan  # minutes are known only after a click
    return users, items, torch.cat([labels, minutes[:, None]], 1)


class Encoder(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())

    def forward(self, users, items):
        return self.mlp(self.users(users) * self.items(items))


def losses_of(outputs, labels):
    losses = {}
    for task, output in outputs.items():
        label = labels[:, TASKS.index(task)]
        known = ~label.isnan()
        error = F.mse_loss if task == "minutes" else F.binary_cross_entropy_with_logits
        each = error(output[:, 0], label.nan_to_num(), reduction="none")
        losses[task] = (each * known).sum() / known.sum().clamp(min=1)
    return losses


def train(groups, epochs):
    """The held-out loss of each task."""
    torch.manual_seed(0)
    model = tg.MultiTaskModel(Encoder(), {task: nn.Linear(32, 1) for task in TASKS})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    log, held_out = zip(*(column.split([16_000, 4_000]) for column in make_log()), strict=True)
    for _ in range(epochs):
        for batch in torch.randperm(16_000).split(200):
            users, items, labels = (column[batch] for column in log)
            for group in groups:
                losses = losses_of(model(users, items, group=group), labels)
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()
    with torch.no_grad():
        return losses_of(model.eval()(*held_out[:2]), held_out[2])


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower on a network this small
    joint = train(tg.TaskGroups(TASKS, grouping=tg.Together()), epochs=10)
    # One group per batch costs about as much as joint training, for any number of tasks.
    groups = tg.TaskGroups(TASKS, groups_per_batch=1, observe_every=5, warmup=10)
    selective = train(groups, epochs=10)
    print(f"held-out loss    joint  selective   groups: {groups.partition}")
    for task in TASKS:
        print(f"{task:12} {joint[task]:9.4f}  {selective[task]:9.4f}")
