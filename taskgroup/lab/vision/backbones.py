"""Encoders for dense prediction: features of four depths of one network, side by side."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskgroup.lab.words import listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ViTConfig, ViTModel

__all__ = ["StochasticDepth", "ViTFeatures", "backbone", "save_config"]

T = TypeVar("T")
M = TypeVar("M", bound="PreTrainedModel")

_PATCH = 16
# Width, depth, attention heads, and where the Hugging Face hub has the ImageNet weights.
_VITS = {
    "vit-t": (192, 12, 3, "WinKawaks/vit-tiny-patch16-224"),
    "vit-s": (384, 12, 6, "WinKawaks/vit-small-patch16-224"),
    "vit-b": (768, 12, 12, "google/vit-base-patch16-224"),
    "vit-l": (1024, 24, 16, "google/vit-large-patch16-224"),
}


def backbone(
    name: str, *, size: tuple[int, int], weights: str | None = None, drop_path: float = 0.0
) -> nn.Module:
    """An encoder of images, pretrained on ImageNet unless told otherwise.

    ====================  ==========================================================================
    name                  network
    ====================  ==========================================================================
    ``"vit-t"``           ViT of width D = 192, 12 blocks, 3 attention heads, patches of 16 pixels
    ``"vit-s"``           D = 384, 12 blocks, 6 heads
    ``"vit-b"``           D = 768, 12 blocks, 12 heads
    ``"vit-l"``           D = 1024, 24 blocks, 16 heads
    ``"timm:NAME"``       any model of timm that has ``features_only``; needs timm
    a folder or hub id    a ViT, or any model that ``transformers.AutoBackbone`` knows: ResNet,
                          Swin, ConvNeXt, DINOv2, BEiT, ...
    ====================  ==========================================================================

    The features of a ViT are the states of four evenly spaced blocks, the last one after the final
    layer norm, as in the published code of Jeong & Yoon (ICLR 2025): blocks 3, 6, 9, 12 of 12, and
    C = 4 D. Those of the others are the maps of the last four stages, or of four evenly spaced
    blocks where all maps have one size, brought to the size of the finest by bilinear
    interpolation. Images are scaled as the weights want them: for the four ViTs to [-1, 1].

    Args:
        name: See the table.
        size: Height and width of the images in pixels. Others will do, as far as the network takes
            them; position embeddings of a ViT are interpolated.
        weights: None for those that belong to the name (the hub has to be in reach, or to have
            been once), ``"random"`` for those of torch's global generator (a folder or hub id then
            gives its config.json only), or a local folder or hub id to load instead.
        drop_path: Probability of stochastic depth (``StochasticDepth``). In a ViT it rises
            linearly from 0 at the first block to this at the last; other networks spread it in
            their own way.

    Returns:
        A module in training mode, float32. It takes images [B, 3, H, W] to features
        [B, C, H / stride, W / stride] and has the attributes ``channels``, C, and ``patch``, the
        stride.

    Raises:
        ValueError: The network cannot be loaded, is another than its name says, has no stochastic
            depth, or cannot take images of this size.
        ImportError: timm is needed and not installed.

    Example:
        >>> encoder = backbone("vit-t", size=(32, 48), weights="random", drop_path=0.15)
        >>> encoder.channels, encoder.patch
        (768, 16)
        >>> encoder(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 768, 2, 3])
    """
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is a probability below 1, not {drop_path}.")
    if name.startswith("timm:"):
        return _timm(name, size, weights, drop_path).train()
    # Importing transformers takes seconds, which data and metrics should not cost.
    from transformers import AutoConfig, ViTConfig

    random = weights == "random"
    if random and name in _VITS:
        width, depth, heads, _ = _VITS[name]
        source = name
        config = ViTConfig(
            # That of the pretrained, so that the state_dict does not depend on weights and size.
            image_size=224,
            patch_size=_PATCH,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
    else:
        own = _VITS[name][-1] if name in _VITS else name
        source = own if weights is None or random else weights
        config = _load(
            name,
            source,
            random,
            lambda: AutoConfig.from_pretrained(source, trust_remote_code=False),
        )
        _check_vit(name, source, config)
    if isinstance(config, ViTConfig):
        return _ViT(_vit(name, source, random, config), size, drop_path).train()
    return _Stages(name, _auto(name, source, random, config, drop_path), size).train()


def save_config(encoder: nn.Module, folder: Path) -> None:
    """Write the configuration of the transformers network that :func:`backbone` returned.

    As the name of a backbone with ``weights="random"`` the folder builds the network again, without
    its source. Of other encoders there is nothing to write.

    Args:
        encoder: whose configuration to write.
        folder: for its ``config.json``.
    """
    net = encoder.vit if isinstance(encoder, _ViT) else getattr(encoder, "net", None)
    config: Any = getattr(net, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)


class StochasticDepth(nn.Module):
    """Drops a residual branch for some samples of a batch (Huang et al., ECCV 2016).

    In training mode each sample's branch is 0 with probability p and divided by 1 - p otherwise, so
    its expectation stays; in evaluation mode nothing happens. Masks come from torch's global
    generator of the device.

    Args:
        p: Probability in [0, 1).

    Raises:
        ValueError: ``p`` is outside [0, 1).

    Example:
        >>> branch = StochasticDepth(0.5)
        >>> _ = torch.manual_seed(0)
        >>> branch(torch.ones(4, 2))
        tensor([[0., 0.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
        >>> branch.eval()(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"the probability of stochastic depth is in [0, 1), not {p}.")
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        """The branch [B, ...] with some of its samples dropped; same shape and dtype."""
        if not self.training or self.p == 0:
            return branch
        mask = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1))
        return branch * mask.bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        """The probability, for ``repr``."""
        return f"p={self.p:g}"


class ViTFeatures(nn.Module):
    """A vision transformer whose features are those of four blocks, evenly spaced, side by side.

    The model is ``transformers.ViTModel``, randomly initialised from torch's global generator. Each
    of the four states passes the final layer norm, so they meet the heads at one scale.

    Args:
        size: Height and width of the images that the position embeddings are made for, in pixels,
            or one number for both; for others they are interpolated.
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
        size: int | tuple[int, int] = 64,
        patch: int = 8,
        dim: int = 96,
        depth: int = 4,
        attention_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        from transformers import ViTConfig, ViTModel

        super().__init__()
        if depth < 4 or depth % 4:
            raise ValueError(
                f"features are taken from four blocks evenly spaced: depth={depth}; take a "
                "multiple of 4."
            )
        height, width = (size, size) if isinstance(size, int) else size
        if height % patch or width % patch:
            raise ValueError(
                f"patches of {patch} pixels do not tile an image of {height} x {width}; take a "
                "size that is a multiple of the patch."
            )
        self.patch = patch
        self.channels = 4 * dim
        self.vit = ViTModel(
            ViTConfig(
                image_size=max(height, width),  # of a square grid alone others are interpolated
                patch_size=patch,
                hidden_size=dim,
                num_hidden_layers=depth,
                num_attention_heads=attention_heads,
                intermediate_size=4 * dim,
                hidden_dropout_prob=dropout,
            ),
            add_pooling_layer=False,
        )
        _quieten(self.vit)

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: [B, 3, H, W] in [-1, 1], H and W multiples of the patch.

        Returns:
            [B, 4 D, H / patch, W / patch].

        Raises:
            ValueError: The patches do not tile the image.
        """
        grid = _grid(images.shape[-2:], self.patch)
        states = self.vit(
            images, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
        blocks = _evenly(len(states) - 1)  # the first state is the embedding
        return _side_by_side([self.vit.layernorm(states[k][:, 1:]) for k in blocks], grid)


class _ViT(nn.Module):
    """Four states of a ``transformers.ViTModel``, the last one after the final layer norm.

    The published code does the same, and the norm was trained on the last block alone: on earlier
    states, of other means and scales, its weights mean nothing. Random weights go the same way, or
    a ``state_dict`` of a pretrained network would give other features in one that was built with
    ``weights="random"`` to receive it.

    Args:
        vit: without a pooling layer.
        size: Height and width of the images, to be checked.
        drop_path: Probability of stochastic depth at the last block.
    """

    def __init__(self, vit: ViTModel, size: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.patch = cast(int, vit.config.patch_size)
        self.channels = 4 * vit.config.hidden_size
        _grid(size, self.patch)
        if drop_path:
            _drop_paths(vit, drop_path)
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        grid = _grid(images.shape[-2:], self.patch)
        out = self.vit(images, interpolate_pos_encoding=True, output_hidden_states=True)
        blocks = _evenly(len(out.hidden_states) - 1)
        states = [*(out.hidden_states[k] for k in blocks[:-1]), out.last_hidden_state]
        return _side_by_side([state[:, 1:] for state in states], grid)


class _Stages(nn.Module):
    """The maps of a network, brought to the size of the finest and put side by side.

    Args:
        name: of the backbone, for errors.
        net: gives maps [B, C_i, H_i, W_i], as a list or as ``.feature_maps``.
        size: Height and width of the images, on one of which the stride is measured.
    """

    def __init__(self, name: str, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = net.eval()  # or the image would move running statistics
        parameter = next(net.parameters())
        image = torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad():
                maps = self._maps(image)
        except Exception as error:  # each network has checks of its own
            raise ValueError(
                f"the backbone {name!r} cannot take images of {size[0]} x {size[1]} pixels "
                f"({_first_line(error)})."
            ) from error
        height, width = max((tuple(part.shape[-2:]) for part in maps), key=lambda hw: hw[0] * hw[1])
        if size[0] % height or size[1] % width or size[0] // height != size[1] // width:
            raise ValueError(
                f"the backbone {name!r} turns images of {size[0]} x {size[1]} into features of "
                f"{height} x {width}, which no whole stride brings back; take another size."
            )
        self.patch: int = size[0] // height
        self.channels: int = sum(part.shape[1] for part in maps)

    def forward(self, images: Tensor) -> Tensor:
        grid = _grid(images.shape[-2:], self.patch)
        parts = [
            part
            if part.shape[-2:] == grid
            else F.interpolate(part, size=grid, mode="bilinear", align_corners=False)
            for part in self._maps(images)
        ]
        return torch.cat(parts, dim=1)

    def _maps(self, images: Tensor) -> Sequence[Tensor]:
        maps = self.net(images)
        maps = getattr(maps, "feature_maps", maps)
        if getattr(self.net, "output_fmt", None) == "NHWC":  # Swin in timm
            return [part.permute(0, 3, 1, 2) for part in maps]
        return maps  # type: ignore[no-any-return]


def _vit(name: str, source: str, random: bool, config: ViTConfig) -> ViTModel:
    """A ViTModel of this config, its weights random or loaded."""
    from transformers import ViTModel

    if config.num_hidden_layers < 4:
        raise ValueError(
            f"features are taken from four blocks, and the backbone {name!r} has "
            f"{config.num_hidden_layers}."
        )
    if random:
        vit = ViTModel(config, add_pooling_layer=False)
        _quieten(vit)
        return vit
    return _pretrained(name, source, ViTModel, config, add_pooling_layer=False)


def _auto(
    name: str, source: str, random: bool, config: PretrainedConfig, drop_path: float
) -> PreTrainedModel:
    """A backbone of transformers with this config, its weights random or loaded."""
    from transformers import MODEL_FOR_BACKBONE_MAPPING

    stages = getattr(config, "stage_names", None)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or not stages:
        raise ValueError(
            f"the backbone {name!r} is of type {config.model_type!r}, for which "
            "transformers.AutoBackbone has no network that gives feature maps."
        )
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = drop_path
    elif drop_path:
        raise _no_stochastic_depth(name, drop_path)
    stem = int(stages[0] == "stem")
    plain = getattr(config, "num_hidden_layers", None) == len(stages) - stem
    # Stages count from 1 after the stem, which is none of them.
    config.out_indices = [k - 1 + stem for k in _four(len(stages) - stem, plain)]
    # Not by AutoBackbone.from_pretrained, which takes every folder for a name on the hub.
    kind = cast("type[PreTrainedModel]", MODEL_FOR_BACKBONE_MAPPING[type(config)])
    return kind(config) if random else _pretrained(name, source, kind, config)


def _timm(name: str, size: tuple[int, int], weights: str | None, drop_path: float) -> nn.Module:
    """A network of timm.

    Not by way of ``transformers.TimmBackbone``, which sets the running statistics of pretrained
    BatchNorm layers back to 0 and 1 (seen in transformers 5.23).
    """
    try:
        create = importlib.import_module("timm").create_model
    except ImportError:
        raise ImportError(
            f"the backbone {name!r} needs timm, which cannot be imported: pip install timm."
        ) from None
    random = weights == "random"
    source = name.removeprefix("timm:")
    if weights is not None and not random:
        source = f"local-dir:{weights}" if _is_folder(weights) else f"hf-hub:{weights}"
    options: dict[str, Any] = {"features_only": True}

    def draft(**more: Any) -> Any:
        with torch.device("meta"):
            return create(source, **options, **more)

    def takes(**more: Any) -> bool:
        try:
            draft(**more)
        except TypeError:  # an unexpected keyword argument
            return False
        return True

    stages = _load(name, source, random, draft).feature_info.info
    if takes(img_size=size):  # transformers do, convolutions need not
        options["img_size"] = size
    if takes(drop_path_rate=drop_path):  # also 0: some have it by default
        options["drop_path_rate"] = drop_path
    elif drop_path:
        raise _no_stochastic_depth(name, drop_path)
    plain = len({stage["reduction"] for stage in stages}) == 1
    options["out_indices"] = [k - 1 for k in _four(len(stages), plain)]
    net = _load(name, source, random, lambda: create(source, pretrained=not random, **options))
    return _Stages(name, net.float(), size)


def _pretrained(
    name: str, source: str, kind: type[M], config: PretrainedConfig, **options: bool
) -> M:
    """A model of a kind with the weights from a folder or the hub, none of them made up."""
    # With output_loading_info it returns a pair.
    read = cast("Callable[..., tuple[M, dict[str, list[str]]]]", kind.from_pretrained)
    model, info = _load(
        name,
        source,
        False,
        lambda: read(source, config=config, output_loading_info=True, **options),
    )
    # transformers fills what it does not find at random. What follows the network proper in a
    # backbone no classifier has.
    own = ("hidden_states_norms.", "fpn.")
    missing = [key for key in info["missing_keys"] if not key.startswith(own)]
    if missing:
        raise ValueError(
            f"the weights in {source!r} are not those of the backbone {name!r}: "
            f"{listed(sorted(missing))} are missing."
        )
    model.float()  # type: ignore[no-untyped-call]  # hubs also keep half precision
    return model


def _load(name: str, source: str, random: bool, load: Callable[[], T]) -> T:
    """What ``load`` returns, or one sentence in place of what it raises."""
    try:
        return load()
    except Exception as error:  # the hub, safetensors, timm and torch have errors of their own
        if not random:
            cure = 'take weights=<a local folder with the saved model>, or weights="random"'
        elif name.startswith("timm:"):
            cure = "take one of timm.list_models()"
        else:
            cure = "give a local folder with its config.json as the name"
        known = "" if name in _VITS or "/" in name or ":" in name else f", none of {[*_VITS]},"
        raise ValueError(
            f"the backbone {name!r}{known} cannot be loaded from {source!r} "
            f"({_first_line(error)}): {cure}."
        ) from None


def _check_vit(name: str, source: str, config: PretrainedConfig) -> None:
    """Raise if the name is that of one of the ViTs and the config is not its own."""
    if name not in _VITS:
        return
    wanted = (*_VITS[name][:3], _PATCH)
    what = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    found = tuple(getattr(config, key, None) for key in what)
    if config.model_type != "vit" or found != wanted:
        raise ValueError(
            f"{name!r} is a 'vit' of width, depth, attention heads, patch {wanted}, and the one in "
            f"{source!r} is a {config.model_type!r} of {found}: give that as the name."
        )


def _no_stochastic_depth(name: str, drop_path: float) -> ValueError:
    return ValueError(
        f"the backbone {name!r} has no stochastic depth: take drop_path=0, not {drop_path}."
    )


def _quieten(vit: ViTModel) -> None:
    # Adam moves every weight of a head by about the learning rate, so at unit scale hundreds of
    # features shake an output by more than a depth label varies (a standard deviation of .02).
    nn.init.constant_(vit.layernorm.weight, 0.25)


def _drop_paths(vit: Any, drop_path: float) -> None:
    """Stochastic depth on both residual branches of every block, without keys of its own."""
    layers = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
    for k, layer in enumerate(layers):
        rate = drop_path * k / (len(layers) - 1)
        # A branch ends in a dropout: both in the same module, up to transformers 4 in two.
        ends = [layer] if hasattr(layer, "dropout") else [layer.attention.output, layer.output]
        for end in ends:
            end.dropout = nn.Sequential(end.dropout, StochasticDepth(rate))


def _evenly(depth: int) -> list[int]:
    """Four of the blocks 1 to depth."""
    return [depth * k // 4 for k in (1, 2, 3, 4)]


def _four(stages: int, plain: bool) -> list[int]:
    """Up to four of the stages, counted from 1: the last; of a plain network evenly spaced ones."""
    return _evenly(stages) if plain and stages > 4 else [*range(max(stages - 3, 1), stages + 1)]


def _grid(size: Sequence[int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches in an image; raises if they do not tile it."""
    height, width = size
    if height % patch or width % patch:
        raise ValueError(
            f"patches of {patch} pixels do not tile {height} x {width}; crop or pad the "
            "images to multiples of the patch."
        )
    return height // patch, width // patch


def _side_by_side(blocks: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Tokens [B, h w, D] of each block to features [B, n D, h, w]."""
    tokens = torch.cat(list(blocks), dim=-1)
    return tokens.view(len(tokens), *grid, -1).permute(0, 3, 1, 2)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()
