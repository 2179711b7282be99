"""Memory and time of a step at the sizes of the paper's runs, ViT-T to ViT-L.

Weights and pixels are random, since neither time nor memory depends on them. Peaks are those of
torch's allocator, minus the parameters and Adam's moments. By default it runs ViT-T with one image
per batch; with ``--full`` also the larger networks, with up to the paper's eight images per batch.
"""

from __future__ import annotations

import copy
import time
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from taskgroup.lab.train.memory import peak_bytes
from taskgroup.lab.vision.backbones import backbone
from taskgroup.lab.vision.dense_losses import criterion
from taskgroup.lab.vision.models import dense_model
from taskgroup.lab.vision.tasks import NYUD, PASCAL, TASKONOMY

DATA = {
    "NYUD-v2": (NYUD, (448, 576)),
    "PASCAL-Context": (PASCAL, (512, 512)),
    "Taskonomy": (TASKONOMY, (256, 256)),
}
ON_A_HOST = {"vit-t": 8, "vit-s": 4, "vit-b": 2, "vit-l": 1}
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
    n_images = 1
    if record.full:  # on the CPU, as many images as fit into memory
        n_images = 8 if device.type == "cuda" else ON_A_HOST[vit]
    encoder = backbone(vit, size=size, weights="random", drop_path=0.15)
    model = dense_model(encoder, {name: task.channels for name, task in tasks.items()}).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5, fused=True)
    images = torch.rand(n_images, 3, *size, device=device)
    labels, masks = (
        {name: tensor.to(device) for name, tensor in given.items()}
        for given in labels_of(tasks, n_images, size)
    )

    def forward(stepped):
        features = model.encoder(images)
        outputs = {name: model.heads[name](features) for name in stepped}
        return criterion(outputs, labels, masks, tasks)

    def step(stepped):
        losses = forward(stepped)
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()

    def seconds(stepped):
        started = time.perf_counter()
        step(stepped)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step(tasks)  # this allocates gradients and moments
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    dearest = max(tasks, key=lambda name: tasks[name].channels)
    optimizer.zero_grad()  # existing gradients would not be part of the peak
    joint_peak, kept, kept_of_one = (
        peak_bytes(partial(function, stepped), device)
        for function, stepped in ((step, tasks), (forward, tasks), (forward, [dearest]))
    )
    joint, single = seconds(tasks), seconds([dearest])
    record.add(
        f"a joint step, batch {n_images}",
        len(tasks),
        joint,
        {"a step on one task": single},
        model=f"{data}, {vit}",
    )
    # Count on the meta device, since some attention kernels are not counted on the CPU.
    nowhere, pixels = copy.deepcopy(model).to("meta"), images.to("meta")
    with FlopCounterMode(display=False) as flops:
        torch.stack([output.sum() for output in nowhere(pixels).values()]).sum().backward()
    record.remark(
        f"{data}, {vit}, batch {n_images}: a joint step takes "
        f"{flops.get_total_flops() / 1e12 / n_images:.3f} TFLOP per image. Parameters "
        f"({parameters / 4e6:.1f}M) and two moments take {3 * parameters / 1e9:.2f} GB, and a "
        f"joint step takes {joint_peak / 1e9:.2f} GB more at its peak. A forward pass holds "
        f"{kept / n_images / 1e9:.3f} GB per image at its peak, and "
        f"{kept_of_one / n_images / 1e9:.3f} GB with the most expensive task alone."
    )
    assert kept_of_one <= kept <= joint_peak
