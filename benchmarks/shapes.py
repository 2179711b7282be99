"""Gradients with the shapes of a vision transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTHS = {"ViT-T": 192, "ViT-S": 384, "ViT-B": 768}
PATCH = 16
IMAGE = 224
BLOCKS = 12


def parameter_shapes(model: str) -> list[tuple[int, ...]]:
    """The shapes of the shared parameters: the whole encoder, from the patches to the last norm.

    Example:
        >>> for model in WIDTHS:
        ...     shapes = parameter_shapes(model)
        ...     print(model, len(shapes), sum(math.prod(shape) for shape in shapes))
        ViT-T 150 5524416
        ViT-S 150 21665664
        ViT-B 150 85798656
    """
    d = WIDTHS[model]
    tokens = (IMAGE // PATCH) ** 2 + 1
    embedding = [(1, 1, d), (1, tokens, d), (d, 3, PATCH, PATCH), (d,)]
    norm = [(d,), (d,)]
    attention = [(3 * d, d), (3 * d,), (d, d), (d,)]
    mlp = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return embedding + (norm + attention + norm + mlp) * BLOCKS + norm


def parameter_count(model: str) -> int:
    """The number of elements of all shared parameters."""
    return sum(math.prod(shape) for shape in parameter_shapes(model))


def random_gradients(
    model: str, n_tasks: int, dtype: torch.dtype, device: torch.device
) -> list[list[Tensor]]:
    """Random gradients ``[K][T]``; each tensor has its own memory, as autograd makes them."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        [
            torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
            for shape in parameter_shapes(model)
        ]
        for _ in range(n_tasks)
    ]
