"""A recommender with forty tasks and two optimizers, recorded to a report and to TensorBoard.

python examples/recommender.py
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import taskgroup as tg

USERS, ITEMS = 400, 200
MARKETS = ["br", "de", "fr", "in", "jp", "mx", "uk", "us"]
ACTIONS = ["click", "like", "share", "skip", "buy"]
TASKS = [f"{action}/{market}" for action in ACTIONS for market in MARKETS]


def make_log(views=24_000):
    """Users, items [views], and what each user did [views, 40]: 1, 0 or NaN in other markets."""
    wants, trusts = (torch.randn(USERS, 4), torch.randn(USERS, 4))
    offers = torch.randn(ITEMS, 4)
    users, items = torch.randint(USERS, (views,)), torch.randint(ITEMS, (views,))
    taste, trust = ((of[users] * offers[items]).sum(1) for of in (wants, trusts))
    scores = torch.stack([taste, taste + trust, trust - 1, -taste, taste + trust - 2], 1)
    did = (torch.rand(views, len(ACTIONS)) < scores.sigmoid()).float()
    labels = torch.full((views, len(ACTIONS), len(MARKETS)), torch.nan)
    labels[torch.arange(views), :, users % len(MARKETS)] = did
    return users, items, labels.flatten(1)


class Encoder(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.users = nn.Embedding(USERS, width, sparse=True)
        self.items = nn.Embedding(ITEMS, width, sparse=True)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())

    def forward(self, users, items):
        return self.mlp(self.users(users) * self.items(items))


def criterion(outputs, labels):
    losses = {}
    for task, output in outputs.items():
        label = labels[:, TASKS.index(task)]
        known = ~label.isnan()
        losses[task] = F.binary_cross_entropy_with_logits(output[known, 0], label[known])
    return losses


torch.manual_seed(0)
torch.set_num_threads(1)
train, held_out = zip(*(column.split([20_000, 4_000]) for column in make_log()), strict=True)
model = tg.MultiTaskModel(Encoder(), {task: nn.Linear(32, 1) for task in TASKS})
tables = [model.encoder.users.weight, model.encoder.items.weight]
dense = [*model.encoder.mlp.parameters(), *model.heads.parameters()]
optimizers = [torch.optim.SparseAdam(tables, lr=1e-2), torch.optim.Adam(dense, lr=3e-3)]
groups = tg.TaskGroups(TASKS, groups_per_batch=4, observe_every=2, warmup=2)
groups.attach(optimizers)

writer = SummaryWriter("runs/recommender-tensorboard")
with writer, tg.Recorder(groups, "runs/recommender", log=writer) as recorder:
    for epoch in range(3):
        for batch in torch.randperm(20_000).split(500):
            users, items, labels = (column[batch] for column in train)
            for group in groups:
                losses = criterion(model(users, items, group=group), labels)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                group.loss(losses).backward()
                for optimizer in optimizers:
                    optimizer.step()
        with torch.no_grad():
            losses = criterion(model.eval()(*held_out[:2]), held_out[2])
        model.train()
        errors = {task: float(loss) for task, loss in losses.items()}
        print(f"epoch {epoch}, mean held-out loss {sum(errors.values()) / len(TASKS):.3f}")
        recorder.metrics(errors, better=dict.fromkeys(TASKS, "lower"))
print(len(groups.partition), "groups;", recorder.report())
