"""The networks of the published runs: a shared encoder and a light head per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

import taskgroup as tg
from taskgroup.lab.vision.backbones import ViTFeatures
from taskgroup.lab.vision.tasks import TASKONOMY

__all__ = ["dense_model", "vit"]


def dense_model(
    encoder: nn.Module,
    channels: Mapping[str, int],
    *,
    decoder: Literal["linear", "conv"] = "linear",
    width: int = 256,
) -> tg.MultiTaskModel:
    """A network for dense prediction: the encoder, then one head per task.

    A linear head is a 1x1 convolution. A conv head has a 3x3 convolution, BatchNorm and ReLU before
    it. Both end with bilinear upsampling by the encoder's stride (``align_corners=False``), so that
    outputs are as large as the images. The weights of the heads are drawn from torch's global
    generator, in the order of ``channels``.

    Args:
        encoder: A module that maps images [B, 3, H, W] to features [B, C, H / patch, W / patch] and
            has the attributes ``channels``, C, and ``patch``, such as
            :func:`~taskgroup.lab.vision.backbones.backbone` returns.
        channels: {task: number of output channels}.
        decoder: ``"linear"`` or ``"conv"``.
        width: Channels between the convolutions of a conv head.

    Returns:
        A model from images ``[B, 3, H, W]`` to ``{task: [B, channels[task], H, W]}``.

    Raises:
        ValueError: An unknown decoder, or an encoder without ``channels`` and ``patch``.

    Example:
        >>> import torch
        >>> from taskgroup.lab.vision.backbones import backbone
        >>> encoder = backbone("vit-t", size=(32, 48), weights="random", drop_path=0.15)
        >>> model = dense_model(encoder, {"depth": 1, "normal": 3}, decoder="conv", width=64)
        >>> {task: tuple(out.shape) for task, out in model(torch.zeros(2, 3, 32, 48)).items()}
        {'depth': (2, 1, 32, 48), 'normal': (2, 3, 32, 48)}
    """
    if decoder not in ("linear", "conv"):
        raise ValueError(f"unknown decoder {decoder!r}: take 'linear' or 'conv'.")
    features, patch = getattr(encoder, "channels", None), getattr(encoder, "patch", None)
    if not isinstance(features, int) or not isinstance(patch, int):
        raise ValueError(
            f"the encoder ({type(encoder).__name__}) does not say what the heads get: give it the "
            "attributes channels, the number of its features, and patch, its stride."
        )
    heads = {}
    for task, outputs in channels.items():
        layers: list[nn.Module] = []
        if decoder == "conv":
            layers.append(nn.Conv2d(features, width, kernel_size=3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.Conv2d(width if layers else features, outputs, kernel_size=1))
        layers.append(nn.Upsample(scale_factor=patch, mode="bilinear", align_corners=False))
        heads[task] = nn.Sequential(*layers)
    return tg.MultiTaskModel(encoder, heads)


def vit(
    tasks: Iterable[str] = TASKONOMY,
    *,
    size: int | tuple[int, int] = 64,
    patch: int = 8,
    dim: int = 96,
    depth: int = 4,
    attention_heads: int = 4,
    dropout: float = 0.0,
) -> tg.MultiTaskModel:
    """A small network for Taskonomy's tasks: shared :class:`ViTFeatures`, then a head per task.

    A head is a 1x1 convolution and bilinear upsampling by the patch (``align_corners=False``), so
    that outputs are as large as the images. The weights are drawn from torch's global generator, in
    the order of ``tasks``; call ``torch.manual_seed`` first to make the network reproducible.

    By default the network is small enough to be trained from scratch on two CPU cores. For the
    published networks, pretrained ViT-T to ViT-L, use
    :func:`~taskgroup.lab.vision.models.dense_model` with
    :func:`~taskgroup.lab.vision.backbones.backbone`.

    Args:
        tasks: Names in :data:`~taskgroup.lab.vision.tasks.TASKONOMY`.
        size: Size of the images, see :class:`ViTFeatures`.
        patch: Side of a patch in pixels.
        dim: Width of a block.
        depth: Number of blocks.
        attention_heads: Attention heads of a block.
        dropout: Probability of dropout.

    Returns:
        A model from images ``[B, 3, H, W]`` to ``{task: [B, C, H, W]}``.

    Raises:
        ValueError: An unknown task, or sizes that do not fit.

    Example:
        >>> import torch
        >>> model = vit(["depth_zbuffer", "normal"], dim=16)
        >>> {task: tuple(out.shape) for task, out in model(torch.zeros(2, 3, 64, 64)).items()}
        {'depth_zbuffer': (2, 1, 64, 64), 'normal': (2, 3, 64, 64)}
    """
    tasks = list(tasks)
    if unknown := [task for task in tasks if task not in TASKONOMY]:
        raise ValueError(f"unknown tasks {unknown}: the tasks are {', '.join(TASKONOMY)}")
    encoder = ViTFeatures(size, patch, dim, depth, attention_heads, dropout)
    return dense_model(encoder, {task: TASKONOMY[task].channels for task in tasks})
