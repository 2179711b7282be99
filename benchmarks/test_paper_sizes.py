"""Memory and time of a step at the sizes of the paper's runs, ViT-T to ViT-L.

Random weights and pixels: neither depends on what they are. The peak is that of torch's allocator
over a step of all tasks, and, beside it, of the dearest step on a single task, with what stands
besides: parameters, gradients and Adam's moments. By default one image a batch and ViT-T; with
``--full`` the eight of the paper, and the larger networks.
"""

from __future__ import annotations

import time

import torch

from taskgroup.experiment.memory import peak_bytes
from taskgroup.vision.backbones import backbone
from taskgroup.vision.losses import criterion
from taskgroup.vision.models import dense_model
from taskgroup.vision.tasks import NYUD, PASCAL, TASKONOMY

DATA = {
    "NYUD-v2": (NYUD, (448, 576)),
    "PASCAL-Context": (PASCAL, (512, 512)),
    "Taskonomy": (TASKONOMY, (256, 256)),
}
FULL = [(data, vit) for vit in ("vit-t", "vit-s", "vit-b", "vit-l") for data in DATA]


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    metafunc.parametrize(("data", "vit"), FULL if full else FULL[: len(DATA)])


def labels_of(tasks, n_images, size):
    labels = {}
    for name, task in tasks.items():
        if task.kind == "values":
            labels[name] = torch.rand(n_images, task.channels, *size)
        else:
            labels[name] = torch.zeros(n_images, 1, *size, dtype=torch.uint8)
    return labels, {name: torch.ones(n_images, 1, *size, dtype=torch.bool) for name in tasks}


def test_step(record, device, data, vit):
    tasks, size = DATA[data]
    # Of the largest network on the largest images eight would not fit into 24 GiB of a host.
    n_images = 1 if not record.full else 8 if vit != "vit-l" or device.type == "cuda" else 2
    encoder = backbone(vit, size=size, weights="random", drop_path=0.15)
    model = dense_model(encoder, {name: task.channels for name, task in tasks.items()}).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5, fused=True)
    images = torch.rand(n_images, 3, *size, device=device)
    labels, masks = (
        {name: tensor.to(device) for name, tensor in given.items()}
        for given in labels_of(tasks, n_images, size)
    )

    def step(stepped):
        features = model.encoder(images)
        outputs = {name: model.heads[name](features) for name in stepped}
        losses = criterion(outputs, labels, masks, tasks)
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()

    def seconds(stepped):
        started = time.perf_counter()
        step(stepped)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step(tasks)  # which makes gradients and moments
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    # Of the gradients that stand before a step the peak is without.
    standing = 3 * parameters
    optimizer.zero_grad()
    every = peak_bytes(lambda: step(tasks), device)
    dearest = max(tasks, key=lambda name: tasks[name].channels)
    optimizer.zero_grad()
    one = peak_bytes(lambda: step([dearest]), device)
    joint, single = seconds(tasks), seconds([dearest])
    record.add(
        f"a joint step, batch {n_images}",
        len(tasks),
        joint,
        {"a step on one task": single},
        model=f"{data}, {vit}",
    )
    n_parameters = parameters / 4e6
    moved = 4e6 * n_parameters  # the gradients, which both peaks hold
    record.remark(
        f"{data}, {vit}, batch {n_images}: {n_parameters:.1f}M parameters, {standing / 1e9:.2f} GB "
        f"standing (parameters, moments), {every / 1e9:.2f} GB on top at the peak of a joint step, "
        f"{one / 1e9:.2f} GB of a step on one task; without the gradients "
        f"{(every - moved) / n_images / 1e9:.2f} and {(one - moved) / n_images / 1e9:.2f} an image."
    )
    assert one <= every
