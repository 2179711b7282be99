"""Multilayer perceptrons: the encoder of a table, and the heads of tasks."""

from __future__ import annotations

from torch import nn

__all__ = ["mlp"]


def mlp(
    inputs: int, width: int, depth: int, outputs: int | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """``depth`` layers of a width with ReLU, and dropout if any, before a linear layer if any.

    Args:
        inputs: number of input features.
        width: of every hidden layer.
        depth: number of hidden layers; may be 0.
        outputs: of the linear layer at the end; None adds none.
        dropout: probability after every hidden layer.

    Example:
        >>> mlp(103, 64, depth=1, outputs=1)
        Sequential(
          (0): Linear(in_features=103, out_features=64, bias=True)
          (1): ReLU()
          (2): Linear(in_features=64, out_features=1, bias=True)
        )
    """
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    if outputs is not None:
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)
