"""What a batch costs on a real model besides its steps, from 11 tasks to a thousand.

The demo's ViT, batches of 8 images of 64 x 64 pixels, and K linear heads. The peer of the first
kind is the batch without what lies outside the model, the losses, the backward pass and the
optimizer; that of the second the same batch with the tracking and clustering of the published code.
The groups are learned: about K / 4 planted clusters, which stay.
"""

import time

import torch
from torch import nn

import taskgroup as tg
from benchmarks.published import PublishedTaskAffinity
from benchmarks.test_scaling import DECAY, planted_affinity
from taskgroup.vision.models import ViTFeatures

INSIDE = "model, losses, backward, optimizer"
PUBLISHED = "the same with the published tracking"
GOALS = {11: 0.99, 100: 0.99, 1000: 0.95}
BATCH, SIDE = 8, 64
ONE_GROUP = {"groups_per_batch": 1, "observe_every": 10}


class Pooled(nn.Module):
    """The demo's encoder, and the mean over its patches: [B, 3, H, W] to [B, 256]."""

    def __init__(self):
        super().__init__()
        self.features = ViTFeatures(SIDE, patch=8, dim=64, depth=4, attention_heads=4)

    def forward(self, images):
        return self.features(images).mean((2, 3))


class Training:
    """A model of K tasks, its batch, and the seconds that steps took."""

    def __init__(self, n_tasks, device):
        torch.manual_seed(0)
        self.tasks = [f"task{k}" for k in range(n_tasks)]
        heads = {task: nn.Linear(256, 1) for task in self.tasks}
        self.model = tg.MultiTaskModel(Pooled(), heads).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.images = torch.randn(BATCH, 3, SIDE, SIDE, device=device)
        self.labels = {task: torch.randn(BATCH, 1, device=device) for task in self.tasks}
        self.inside = []  # seconds

    def losses(self, group=None):
        start = time.perf_counter()
        outputs = self.model(self.images, group=group)
        losses = {t: (out - self.labels[t]).square().mean() for t, out in outputs.items()}
        self.inside.append(time.perf_counter() - start)
        return losses

    def step(self, loss):
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.inside.append(time.perf_counter() - start)


class Ours:
    """Batches with :class:`taskgroup.TaskGroups`."""

    def __init__(self, training, **options):
        self.training = training
        affinity = tg.ProximalAffinity(decay=DECAY)
        self.groups = tg.TaskGroups(training.tasks, warmup=0, affinity=affinity, **options)
        affinity.matrix.copy_(planted_affinity(len(training.tasks))[0])
        # The round of singletons that even no warm-up begins with is not what is measured.
        state = self.groups.state_dict()
        self.groups.load_state_dict({**state, "rounds": 1})

    def batch(self):
        for group in self.groups:
            self.training.step(group.loss(self.training.losses(group)))


class Published:
    """Batches with the tracking and clustering of the published code, all heads with a graph."""

    def __init__(self, training):
        self.training = training
        groups = {task: [task] for task in training.tasks}
        self.tracking = PublishedTaskAffinity(training.tasks, groups, DECAY)
        self.tracking.affinity_map.copy_(planted_affinity(len(training.tasks))[0])

    def batch(self):
        self.tracking.init_pre_loss()
        groups = self.tracking.next_groups()
        for name in self.tracking.order():
            losses = self.training.losses()
            self.training.step(torch.stack([losses[t] for t in groups[name]]).sum())
            self.tracking.update(name, losses)
