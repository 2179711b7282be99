"""A step of a joint method on eleven tasks, forward and backward: ours and TorchJD's engine.

TorchJD computes its Jacobians with ``mtl_backward``, for all tasks at once (vmap) or one by one,
and makes one gradient of them with ``jac_to_grad``. The limit is the time of the K backward passes
alone. A plain step on the sum of the losses is another peer. Attention on the CPU has no batching
rule in torch, so there vmap runs its backward pass task by task.
"""

import itertools

import pytest
import torch
from torch import nn

import taskgroup as tg
from taskgroup.lab.train.memory import peak_bytes

TASKS = [f"task{k}" for k in range(11)]
METHODS = ["UPGrad", "PCGrad", "MGDA"]
VMAP = "TorchJD, all tasks at once"
SEQUENTIAL = "TorchJD, task by task"
JOINT = "sum of the losses, backward"


class Tokens(nn.Module):
    """A small ViT after the patch embedding: ``[B, N, D]`` to ``[B, D]``."""

    def __init__(self, width, depth):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 3, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x):
        return self.blocks(x).mean(1)


def mlp():
    widths = [256, 512, 512, 1024]
    layers = [(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain.from_iterable(layers)), torch.randn(64, 256), 1024


def vit():
    return Tokens(192, 4), torch.randn(8, 17, 192), 192


MODELS = {"MLP, 0.9M": mlp, "ViT, 1.8M": vit}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_step(record, device, model, method):
    torch.manual_seed(0)
    encoder, x, width = MODELS[model]()
    heads = nn.ModuleList(nn.Linear(width, 8) for _ in TASKS)
    targets = torch.randn(len(TASKS), len(x), 8).to(device)
    encoder, heads, x = encoder.to(device), heads.to(device), x.to(device)
    shared = list(encoder.parameters())
    parameters = [*shared, *heads.parameters()]
    try:
        joint = getattr(tg.methods, method)(encoder, TASKS)
    except ImportError as error:  # the solver is TorchJD's
        pytest.skip(str(error))

    def forward():
        for parameter in parameters:
            parameter.grad = None
        features = encoder(x)
        outputs = [head(features) for head in heads]
        losses = [(out - y).square().mean() for out, y in zip(outputs, targets, strict=True)]
        return features, losses

    def ours():
        joint.backward(dict(zip(TASKS, forward()[1], strict=True)))

    def summed():
        torch.stack(forward()[1]).sum().backward()

    def passes():
        tg.task_gradients(forward()[1], parameters)

    sides = {"ours": ours, **torchjd_sides(forward, shared, method), JOINT: summed, "limit": passes}
    found = {}
    for name, side in sides.items():
        if name not in (JOINT, "limit") and not isinstance(side, str):
            torch.manual_seed(0)
            side()
            found[name] = [parameter.grad for parameter in parameters]
            torch.testing.assert_close(found[name], found["ours"], rtol=1e-2, atol=1e-4)
    least = record.least_seconds(sides)
    record.add(
        f"step of {method}",
        len(TASKS),
        least["ours"],
        {name: least[name] for name in sides if name not in ("ours", "limit")},
        model=model,
        limit=least["limit"],
        share=record.share("ours", lambda seconds: seconds["limit"]),
    )
    peaks = {}
    for name, side in sides.items():
        if name != "limit" and not isinstance(side, str):
            encoder.zero_grad()
            heads.zero_grad()
            peaks[name] = f"{peak_bytes(side, device) / 1e6:.0f} MB"
    gradients = sum(parameter.nbytes for parameter in shared) * len(TASKS) / 1e6
    said = "; ".join(f"{name} {peak}" for name, peak in peaks.items())
    record.remark(f"peak memory, {method} on {model} (K x P: {gradients:.0f} MB): {said}")


def torchjd_sides(forward, shared, method):
    """The same step with TorchJD, or why it is not run."""
    try:
        from torchjd import aggregation
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError:
        return dict.fromkeys((VMAP, SEQUENTIAL), "not installed")
    aggregator = getattr(aggregation, method)()

    def step(chunk):
        features, losses = forward()
        mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator)

    return {VMAP: lambda: step(None), SEQUENTIAL: lambda: step(1)}
