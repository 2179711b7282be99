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

from benchmarks.test_figure2 import DATA_SETS, Case, Scale, Training
from taskgroup.lab.train.memory import peak_bytes

ON_A_HOST = {"vit-t": 8, "vit-s": 4, "vit-b": 2, "vit-l": 1}
FULL = [(data, vit) for vit in ("vit-t", "vit-s", "vit-b", "vit-l") for data in DATA_SETS]


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    metafunc.parametrize(("data", "vit"), FULL if full else FULL[: len(DATA_SETS)])


def test_step(record, device, data, vit):
    n_images = 1
    if record.full:  # on the CPU, as many images as fit into memory
        n_images = 8 if device.type == "cuda" else ON_A_HOST[vit]
    training = Training(Case(data, vit, "float32"), Scale((vit,), n_images, 0, 0), device)
    tasks, model = training.tasks, training.model
    optimizer = training.optimizer()

    def forward(stepped):
        features = model.encoder(training.images)
        return training.criterion({name: model.heads[name](features) for name in stepped})

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
    nowhere, pixels = copy.deepcopy(model).to("meta"), training.images.to("meta")
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
