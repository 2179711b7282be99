"""Gradients of tasks from rows, against one backward pass per task."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import taskgroup as tg
from taskgroup.gradients import row_graph, row_rules

K = 4


class Tokens(nn.Module):
    """A ViT on patches: a class token, positions, attention."""

    def __init__(self, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.layers(x)[:, 0])


class Language(nn.Module):
    """A transformer whose output layer is tied to its embedding."""

    def __init__(self, sequence_first=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.position = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=not sequence_first)
        self.norm = nn.RMSNorm(8)
        self.sequence_first = sequence_first

    def forward(self, x):
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        x = x.transpose(0, 1) if self.sequence_first else x
        x = x + self.attention(self.norm(x), x, x, need_weights=False)[0]
        x = x.transpose(0, 1) if self.sequence_first else x
        return F.linear(x, self.embedding.weight)


class Recommender(nn.Module):
    """Embeddings of users and items, and products of them."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(9, 8), nn.Embedding(7, 8)
        self.bias = nn.Parameter(torch.randn(()))
        self.mlp = nn.Sequential(nn.Linear(16, 8), nn.PReLU(), nn.Linear(8, 1))

    def forward(self, x):
        user, item = self.users(x[:, 0]), self.items(x[:, 1])
        return self.mlp(torch.cat([user, item], 1)) + (user * item).sum(1, keepdim=True) + self.bias


class Residual(nn.Module):
    """Convolutions with GroupNorm, strides and groups, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = x + F.relu(self.norm(self.again(x)))
        return self.up(x) * self.scale


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, tokens that are joined, and weight norm."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.left, self.right = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(5))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        x = self.frozen(x) + F.linear(x, self.a @ self.b) + torch.cat([self.left, self.right])
        return self.normed(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x):
        return checkpoint(self.block, checkpoint(self.block, x, use_reentrant=False), use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(self.embedding(x))[0]


def images(n):
    return torch.randn(n, 3, 8, 8)


def words(n):
    return torch.randint(0, 11, (n, 6))


def vectors(n):
    return torch.randn(n, 8)


NETWORKS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), vectors),
    "ViT": (Tokens, images),
    "ViT, norm first": (lambda: Tokens(norm_first=True), images),
    "tied": (Language, words),
    "tied, sequence first": (lambda: Language(sequence_first=True), words),
    "recommender": (Recommender, lambda n: torch.randint(0, 7, (n, 2))),
    "residual": (Residual, images),
    "adapted": (Adapted, vectors),
    "checkpointed": (Checkpointed, vectors),
    "recurrent": (Recurrent, words),
    "1d": (lambda: nn.Sequential(nn.Conv1d(8, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()),
           lambda n: torch.randn(n, 8, 9)),
    "BatchNorm in eval mode": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), images),
    "BatchNorm of the input": (
        lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)), vectors),
    "positions of the rows' own": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Linear(2, 3), nn.Flatten(0, 1), nn.Linear(3, 2),
                              nn.Unflatten(0, (-1, 4))), vectors),
}  # fmt: skip


def setting(name, n=13, dtype=torch.float64, seed=0, in_order=False):
    torch.manual_seed(seed)
    make, inputs = NETWORKS[name]
    model, x = make().to(dtype), inputs(n)
    x = x.to(dtype) if x.is_floating_point() else x
    tasks = torch.randint(0, K, (n,))
    tasks[:K] = torch.arange(K)
    if in_order:
        tasks = tasks.sort().values
    return model, x, tasks


def row_losses(model, x):
    return model(x).flatten(1).square().mean(1)


def expected(losses, tasks, params, reduction="mean"):
    scalars = [getattr(losses[tasks == k], reduction)() for k in range(K)]
    return tg.task_gradients(scalars, params, retain_graph=True)


def assert_same(found, wanted, params, tolerance):
    """Relative to the length of the gradient of the parameter, over all tasks."""
    for t, parameter in enumerate(params):
        zero = torch.zeros_like(parameter)
        a = torch.stack([zero if own[t] is None else own[t] for own in found])
        b = torch.stack([zero if own[t] is None else own[t] for own in wanted])
        assert (a - b).norm() <= tolerance * b.norm(), f"parameter {t}"


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name, in_order):
    model, x, tasks = setting(name, in_order=in_order)
    params = list(model.parameters())
    for seed in range(2):  # the second time, where the rows lie is known
        torch.manual_seed(seed)
        losses = row_losses(model, x)
        found = tg.row_task_gradients(losses, tasks, model)
        wanted = expected(losses, tasks, params)
        assert_same(found, wanted, params, 1e-12)
        for own in found:
            for gradient, parameter in zip(own, params, strict=True):
                assert gradient is None or gradient.shape == parameter.shape
                assert gradient is None or gradient.stride() == parameter.stride()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gram(name, dtype, tolerance):
    model, x, tasks = setting(name, dtype=dtype)
    losses = row_losses(model, x)
    wanted = tg.task_gram(expected(losses, tasks, list(model.parameters())))
    found = tg.row_task_gram(losses, tasks, model)
    assert found.dtype == dtype
    length = wanted.diagonal().sqrt()
    assert ((found - wanted).abs() <= tolerance * length[:, None] * length).all()
