"""The gradients of K domains from one batch of mixed rows: one backward pass, and K of them.

Every side runs the model forward and gives the Gram matrix of the gradients on all parameters. The
limit is an ordinary step, forward and backward, on the mean of all losses.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import taskgroup as tg

ROWS = 104
ONE_BY_ONE = "K backward passes"
BATCHED = "one vectorised pass (batched=True)"
STREAMING = "streaming_task_gram"
SPLIT = "a pass forward and backward on each domain's rows"
STEP = "an ordinary step"


class Tokens(nn.Module):
    """A small transformer: ``[N, T, D]`` to ``[N, D]``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class GPT(nn.Module):
    """A language model with tied embeddings: token numbers ``[N, T]`` to the loss of each row."""

    def __init__(self, words: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(words, width), nn.Embedding(length, width)
        self.tokens = Tokens(width, depth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.tokens(self.embedding(x) + self.position.weight)
        logits = nn.functional.linear(features, self.embedding.weight)
        return nn.functional.cross_entropy(logits.mT, x.roll(-1, 1), reduction="none").mean(1)


def mlp():
    widths = [256, 512, 512, 512, 10]
    layers = [(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain.from_iterable(layers)), torch.randn(8 * ROWS, 256)


def vit():
    return Tokens(192, 4), torch.randn(ROWS, 17, 192)


def gpt():
    return GPT(1000, 128, 2, 32), torch.randint(0, 1000, (ROWS, 32))


MODELS = {"MLP, 0.7M": mlp, "ViT, 1.8M": vit, "GPT, 0.5M": gpt}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap
@pytest.mark.parametrize("n_tasks", [26, 2, 5, 11, 100])
@pytest.mark.parametrize("model", MODELS)
def test_gram(record, device, one_thread, request, model, n_tasks):
    if n_tasks != 26 and not request.config.getoption("full"):
        pytest.skip("one K is enough unless all are asked for, with --full")
    torch.manual_seed(0)
    network, x = MODELS[model]()
    network, x = network.to(device), x.to(device)
    rows = torch.randint(0, n_tasks, (len(x),), device=device)
    rows[:n_tasks] = torch.arange(n_tasks, device=device)
    params = list(network.parameters())

    def losses(some=slice(None)):
        outputs = network(x[some])
        return outputs if outputs.dim() == 1 else outputs.flatten(1).square().mean(1)

    own = [torch.nonzero(rows == k).flatten() for k in range(n_tasks)]

    def means():
        found = losses()
        return [found[some].mean() for some in own]

    def step():
        for parameter in params:
            parameter.grad = None
        losses().mean().backward()

    sides = {
        "ours": lambda: tg.row_task_gram(losses(), rows, params, n_tasks),
        ONE_BY_ONE: lambda: tg.task_gram(tg.task_gradients(means(), params)),
        BATCHED: lambda: tg.task_gram(tg.task_gradients(means(), params, batched=True)),
        STREAMING: lambda: tg.streaming_task_gram(means(), params),
        SPLIT: lambda: tg.task_gram(
            [list(torch.autograd.grad(losses(some).mean(), params)) for some in own]
        ),
        STEP: step,
    }
    if n_tasks > 26:
        for name in (BATCHED, STREAMING):
            sides[name] = "takes minutes"
    wanted = sides[ONE_BY_ONE]()
    for name in ("ours", SPLIT):
        found = sides[name]()
        length = wanted.diagonal().sqrt()
        assert ((found - wanted).abs() <= 1e-5 * length * length[:, None]).all(), name
    least = record.least_seconds(sides)
    record.add(
        "Gram matrix of rows",
        n_tasks,
        least["ours"],
        {name: least[name] for name in sides if name != "ours"},
        model=model,
        limit=least[STEP],
        share=record.share("ours", lambda seconds: seconds[STEP]),
        goals={ONE_BY_ONE: 15.0} if n_tasks == 26 else None,
    )
