"""The network of the published runs in small: a ViT and one linear head per task."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import taskgroup as tg
from taskgroup.vision.tasks import TASKONOMY

__all__ = ["ViTFeatures", "vit"]


class ViTFeatures(nn.Module):
    """A vision transformer whose features are those of four blocks, evenly spaced, side by side.

    The model is ``transformers.ViTModel``, randomly initialised from torch's global generator. Each
    of the four states passes the final layer norm, so they meet the heads at one scale.

    Args:
        size: Side of the images that the position embeddings are made for, in pixels; for others
            they are interpolated.
        patch: Side of a patch in pixels.
        dim: Width D of a block.
        depth: Number of blocks, a multiple of 4; the features are those of blocks depth / 4 times
            1, 2, 3, 4.
        attention_heads: Attention heads of a block.
        dropout: Probability of dropout after the embedding and on both branches of each block.

    Raises:
        ValueError: ``depth`` is not a multiple of 4, or ``patch`` does not divide ``size``.
    """

    def __init__(
        self,
        size: int = 64,
        patch: int = 8,
        dim: int = 96,
        depth: int = 4,
        attention_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        # Importing transformers takes seconds, which data and metrics should not cost.
        from transformers import ViTConfig, ViTModel

        super().__init__()
        if depth < 4 or depth % 4:
            raise ValueError(
                f"features are taken from four blocks evenly spaced: depth={depth}; take a "
                "multiple of 4."
            )
        if size % patch:
            raise ValueError(
                f"patches of {patch} pixels do not tile an image of {size}; take a size that is a "
                "multiple of the patch."
            )
        self.patch = patch
        self.channels = 4 * dim
        self.vit = ViTModel(
            ViTConfig(
                image_size=size,
                patch_size=patch,
                hidden_size=dim,
                num_hidden_layers=depth,
                num_attention_heads=attention_heads,
                intermediate_size=4 * dim,
                hidden_dropout_prob=dropout,
            ),
            add_pooling_layer=False,
        )
        # Adam moves every weight of a head by about the learning rate, so at unit scale hundreds of
        # features shake an output by more than a depth label varies (a standard deviation of .02).
        nn.init.constant_(self.vit.layernorm.weight, 0.25)

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: [B, 3, H, W] in [-1, 1], H and W multiples of the patch.

        Returns:
            [B, 4 D, H / patch, W / patch].

        Raises:
            ValueError: The patches do not tile the image.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patches of {self.patch} pixels do not tile {height} x {width}; crop or pad the "
                "images to multiples of the patch."
            )
        states = self.vit(
            images, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
        step = (len(states) - 1) // 4  # the first state is the embedding
        blocks = [self.vit.layernorm(state[:, 1:]) for state in states[step::step]]
        grid = (len(images), height // self.patch, width // self.patch, self.channels)
        features: Tensor = torch.cat(blocks, dim=-1).view(grid).permute(0, 3, 1, 2)
        return features


def vit(
    tasks: Iterable[str] = TASKONOMY,
    *,
    size: int = 64,
    patch: int = 8,
    dim: int = 96,
    depth: int = 4,
    attention_heads: int = 4,
    dropout: float = 0.0,
) -> tg.MultiTaskModel:
    """The multi-task network: shared :class:`ViTFeatures`, then one head per task.

    A head is a 1x1 convolution and bilinear upsampling by the patch (``align_corners=False``), so
    outputs are as large as the images. Weights come from torch's global generator, in the order of
    ``tasks``: ``torch.manual_seed`` before the call makes the network reproducible.

    The published networks are pretrained ViT-T to ViT-L; the default here is sized to be trained
    from scratch on two CPU cores.

    Args:
        tasks: Names in :data:`~taskgroup.vision.tasks.TASKONOMY`.
        size: See :class:`ViTFeatures`, as for all that follow.
        patch: Side of a patch in pixels.
        dim: Width of a block.
        depth: Number of blocks.
        attention_heads: Attention heads of a block.
        dropout: Probability of dropout.

    Returns:
        ``model(images [B, 3, H, W])`` gives {task: [B, C, H, W]}.

    Raises:
        ValueError: An unknown task, or sizes that do not fit.

    Example:
        >>> model = vit(["depth_zbuffer", "normal"], dim=16)
        >>> {task: tuple(out.shape) for task, out in model(torch.zeros(2, 3, 64, 64)).items()}
        {'depth_zbuffer': (2, 1, 64, 64), 'normal': (2, 3, 64, 64)}
    """
    tasks = list(tasks)
    if unknown := [task for task in tasks if task not in TASKONOMY]:
        raise ValueError(f"unknown tasks {unknown}: the tasks are {', '.join(TASKONOMY)}")
    encoder = ViTFeatures(size, patch, dim, depth, attention_heads, dropout)
    heads = {
        task: nn.Sequential(
            nn.Conv2d(encoder.channels, TASKONOMY[task].channels, kernel_size=1),
            nn.Upsample(scale_factor=patch, mode="bilinear", align_corners=False),
        )
        for task in tasks
    }
    return tg.MultiTaskModel(encoder, heads)
