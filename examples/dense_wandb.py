"""A ResNet with five dense heads on rendered scenes, recorded to a report and to W&B (offline).

python examples/dense_wandb.py
"""

import torch
import wandb
from torch import nn
from torch.nn import functional as F

import taskgroup as tg


def angular(output, normals):
    return 1 - F.cosine_similarity(output, normals).mean()


TASKS = {  # channels and loss
    "material": (4, F.cross_entropy),
    "depth": (1, F.l1_loss),
    "normals": (3, angular),
    "edges": (1, F.binary_cross_entropy_with_logits),
    "shading": (1, F.l1_loss),
}


def render(n, size=24):
    """Images [n, 3, H, W] of shaded spheres before a wall, and labels ``{task: [n, ...]}``."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    material = torch.zeros(n, size, size, dtype=torch.long)
    depth = torch.full((n, size, size), 2.0)
    normals = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).repeat(n, 1, size, size)
    for _ in range(3):
        dx, dy = x - torch.rand(n, 1, 1) * 2 + 1, y - torch.rand(n, 1, 1) * 2 + 1
        radius = 0.3 + 0.3 * torch.rand(n, 1, 1)
        height = (radius**2 - dx**2 - dy**2).clamp(min=0).sqrt()
        front = 1 + torch.rand(n, 1, 1) - height
        seen = (height > 0) & (front < depth)
        depth = torch.where(seen, front, depth)
        material = torch.where(seen, torch.randint(1, 4, (n, 1, 1)), material)
        of_sphere = torch.stack([dx, dy, height], 1) / radius[:, None]
        normals = torch.where(seen[:, None], of_sphere, normals)
    shading = (normals * torch.tensor([-0.5, -0.5, 0.7]).view(1, 3, 1, 1)).sum(1).clamp(min=0.1)
    edges = (F.max_pool2d(depth, 3, 1, 1) + F.max_pool2d(-depth, 3, 1, 1) > 0.2).float()
    colours = torch.tensor([[0.6, 0.6, 0.6], [0.9, 0.3, 0.2], [0.2, 0.7, 0.3], [0.2, 0.4, 0.9]])
    images = colours[material].movedim(-1, 1) * shading[:, None]
    labels = (material, depth[:, None], normals, edges[:, None], shading[:, None])
    return images + 0.05 * torch.randn_like(images), dict(zip(TASKS, labels, strict=True))


def norm(width):
    return nn.BatchNorm2d(width, momentum=0.3)  # there are few batches


class Block(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, inside, width, stride):
        super().__init__()
        first = nn.Conv2d(inside, width, 3, stride, padding=1, bias=False)
        second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.layers = nn.Sequential(first, norm(width), nn.ReLU(), second, norm(width))
        self.skip = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), norm(width))

    def forward(self, x):
        return F.relu(self.layers(x) + self.skip(x))


def head(channels):
    layers = nn.Conv2d(48, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 1)
    return nn.Sequential(*layers, nn.Upsample(scale_factor=4, mode="bilinear"))


def criterion(outputs, labels):
    return {task: TASKS[task][1](output, labels[task]) for task, output in outputs.items()}


torch.manual_seed(0)
torch.set_num_threads(1)
images, labels = render(192)
held_out = render(48)
encoder = nn.Sequential(Block(3, 16, 2), Block(16, 32, 1), Block(32, 48, 2), Block(48, 48, 1))
model = tg.MultiTaskModel(encoder, {task: head(channels) for task, (channels, _) in TASKS.items()})
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
groups = tg.TaskGroups(list(TASKS), warmup=5, affinity=tg.ProximalAffinity(decay=0.05))

run = wandb.init(project="scenes", mode="offline")
with run, tg.Recorder(groups, "runs/scenes", log=run, log_every=1) as recorder:
    for epoch in range(4):
        for batch in torch.randperm(192).split(32):
            for group in groups:
                outputs = model(images[batch], group=group)
                losses = criterion(outputs, {task: labels[task][batch] for task in TASKS})
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()
        with torch.no_grad():
            losses = criterion(model.eval()(held_out[0]), held_out[1])
        model.train()
        errors = {task: round(float(loss), 3) for task, loss in losses.items()}
        print(f"epoch {epoch}, held-out losses {errors}")
        recorder.metrics(errors, better=dict.fromkeys(TASKS, "lower"))
print(groups.partition, recorder.report())
