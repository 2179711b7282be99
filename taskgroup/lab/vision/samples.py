"""A batch for dense prediction: images, labels, and masks that say where labels are known."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Samples"]


class Samples(NamedTuple):
    """A batch, or a single sample without the dimension B.

    Attributes:
        images: [B, 3, H, W], float32, normalised as the data set says.
        labels: {task: [B, C, H, W]}, finite everywhere: float32 values, or with C = 1 uint8 class
            numbers or bool.
        masks: {task: [B, 1, H, W]}, bool: where the label is known.
    """

    images: Tensor
    labels: dict[str, Tensor]
    masks: dict[str, Tensor]
