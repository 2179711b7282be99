"""Encoders for dense prediction: features from four depths of a network, concatenated."""

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
# Width, depth, attention heads, and the name of the ImageNet weights on the Hugging Face hub.
_VITS = {
    "vit-t": (192, 12, 3, "WinKawaks/vit-tiny-patch16-224"),
    "vit-s": (384, 12, 6, "WinKawaks/vit-small-patch16-224"),
    "vit-b": (768, 12, 12, "google/vit-base-patch16-224"),
    "vit-l": (1024, 24, 16, "google/vit-large-patch16-224"),
}


def backbone(
    name: str, *, size: tuple[int, int], weights: str | None = None, drop_path: float = 0.0
) -> nn.Module:
    """An encoder of images, by default with weights pretrained on ImageNet.

    ====================  ==========================================================================
    name                  network
    ====================  ==========================================================================
    ``"vit-t"``           ViT of width D = 192, 12 blocks, 3 attention heads, patches of 16 pixels
    ``"vit-s"``           D = 384, 12 blocks, 6 heads
    ``"vit-b"``           D = 768, 12 blocks, 12 heads
    ``"vit-l"``           D = 1024, 24 blocks, 16 heads
    ``"timm:NAME"``       any model of timm that supports ``features_only``; needs timm
    a folder or hub id    a ViT, or any model that ``transformers.AutoBackbone`` knows: ResNet,
                          Swin, ConvNeXt, DINOv2, BEiT, ...
    ====================  ==========================================================================

    The features of a ViT are the states of four evenly spaced blocks, the last one after the final
    layer norm, as in the published code of Jeong & Yoon (ICLR 2025): blocks 3, 6, 9, 12 of 12, with
    C = 4 D. The features of other networks are the maps of the last four stages, or, if all maps
    have the same size, of four evenly spaced blocks. Smaller maps are brought to the size of the
    largest by bilinear interpolation. Images must be scaled as for the pretraining: to [-1, 1] for
    the four ViTs.

    Args:
        name: See the table.
        size: Height and width of the images in pixels. The encoder also takes other sizes if the
            network does; the position embeddings of a ViT are interpolated.
        weights: None loads the weights that belong to the name, from the hub or from its local
            cache. ``"random"`` draws weights from torch's global generator; of a folder or hub id,
            only the config.json is then read. A local folder or hub id loads the weights from
            there.
        drop_path: Probability of stochastic depth (``StochasticDepth``). In a ViT it rises linearly
            from 0 at the first block to ``drop_path`` at the last; other networks have their own
            rule.

    Returns:
        A module in training mode, float32, that maps images [B, 3, H, W] to features
        [B, C, H / stride, W / stride]. Its attributes are ``channels``, C, and ``patch``, the
        stride.

    Raises:
        ValueError: The network cannot be loaded, is not the one that the name says, does not
            support stochastic depth, or cannot take images of this size.
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
    # Imported here, since importing transformers takes seconds.
    from transformers import AutoConfig, ViTConfig

    random = weights == "random"
    if random and name in _VITS:
        width, depth, heads, _ = _VITS[name]
        source = name
        config = ViTConfig(
            # As in the pretrained model, so that weights and size do not change the state_dict.
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
    """Write the ``config.json`` of a network of transformers that :func:`backbone` returned.

    The network can then be built again without its source: give :func:`backbone` the folder as the
    name, and ``weights="random"``. For other encoders, nothing is written.
    """
    net = encoder.vit if isinstance(encoder, _ViT) else getattr(encoder, "net", None)
    config: Any = getattr(net, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)


class StochasticDepth(nn.Module):
    """Drops a residual branch for some samples of a batch (Huang et al., ECCV 2016).

    In training mode, each sample's branch is 0 with probability p, and is divided by 1 - p
    otherwise, so that its expectation stays the same. In evaluation mode the branch does not
    change. Masks are drawn from torch's global generator of the device.

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
        """Drop some samples of the branch [B, ...]; shape and dtype stay the same."""
        if not self.training or self.p == 0:
            return branch
        mask = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1))
        return branch * mask.bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        """The probability, for ``repr``."""
        return f"p={self.p:g}"


class ViTFeatures(nn.Module):
    """A vision transformer that returns the features of four evenly spaced blocks, concatenated.

    The model is ``transformers.ViTModel``, randomly initialised from torch's global generator. The
    final layer norm is applied to each of the four states, so that all have the same scale.

    Args:
        size: Height and width in pixels of the images for which position embeddings are made, or
            one number for both. For images of other sizes they are interpolated.
        patch: Side of a patch in pixels.
        dim: Width D of a block.
        depth: Number of blocks, a multiple of 4. The features are the states of the blocks
            depth / 4 times 1, 2, 3, 4.
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
                image_size=max(height, width),  # transformers interpolates square grids only
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
        """Compute the features [B, 4 D, H / patch, W / patch] of images [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: H or W is not a multiple of the patch.
        """
        grid = _grid(images.shape[-2:], self.patch)
        states = self.vit(
            images, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
        blocks = _evenly(len(states) - 1)  # the first state is the embedding
        return _side_by_side([self.vit.layernorm(states[k][:, 1:]) for k in blocks], grid)


class _ViT(nn.Module):
    """Four states of a ``transformers.ViTModel``, the last one after the final layer norm.

    The published code does the same. The norm was trained on the last block only; it does not fit
    the means and scales of earlier states. Networks with random weights are treated alike, so that
    one that then loads the ``state_dict`` of a pretrained network gives the same features.
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
    """The maps of a network, brought to the size of the largest map and concatenated.

    The network returns maps [B, C_i, H_i, W_i], as a list or as ``.feature_maps``. An image of the
    size ``size``, all zeros, measures the stride.
    """

    def __init__(self, name: str, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = net.eval()  # so that the image does not change running statistics
        parameter = next(net.parameters())
        image = torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad():
                maps = self._maps(image)
        except Exception as error:  # networks raise various errors
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
    """A ViTModel with this config, and random or loaded weights."""
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
    """A backbone of transformers with this config, and random or loaded weights."""
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
    # Stages are counted from 1; the stem, which comes before them, is not counted.
    config.out_indices = [k - 1 + stem for k in _four(len(stages) - stem, plain)]
    # AutoBackbone.from_pretrained would take every folder for a name on the hub.
    kind = cast("type[PreTrainedModel]", MODEL_FOR_BACKBONE_MAPPING[type(config)])
    return kind(config) if random else _pretrained(name, source, kind, config)


def _timm(name: str, size: tuple[int, int], weights: str | None, drop_path: float) -> nn.Module:
    """A network of timm.

    ``transformers.TimmBackbone`` is not used, since it resets the running statistics of pretrained
    BatchNorm layers to 0 and 1 (seen in transformers 5.23).
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
        source = f"local-dir:{weights}" if Path(weights).is_dir() else f"hf-hub:{weights}"
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
    if takes(img_size=size):  # transformers take it, convolutional networks may not
        options["img_size"] = size
    if takes(drop_path_rate=drop_path):  # also 0, since the default may be another
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
    """Load a model from a folder or the hub; raise if some of its weights are missing there."""
    # With output_loading_info it returns a pair.
    read = cast("Callable[..., tuple[M, dict[str, list[str]]]]", kind.from_pretrained)
    model, info = _load(
        name,
        source,
        False,
        lambda: read(source, config=config, output_loading_info=True, **options),
    )
    # transformers draws missing weights at random. The layers in `own` come after the network;
    # backbones have them, and saved classifiers do not.
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
    """Call ``load``, and turn any error into a ValueError with one sentence."""
    try:
        return load()
    except Exception as error:  # the hub, safetensors, timm and torch raise various errors
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
    """Raise if the name is one of the four ViTs and the config is another network's."""
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
    # Adam changes every weight of a head by about the learning rate. With hundreds of features at
    # unit scale, one step would change an output by more than the standard deviation of a depth
    # label, .02.
    nn.init.constant_(vit.layernorm.weight, 0.25)


def _drop_paths(vit: Any, drop_path: float) -> None:
    """Add stochastic depth to both residual branches of every block; state_dict keys stay."""
    layers = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
    for k, layer in enumerate(layers):
        rate = drop_path * k / (len(layers) - 1)
        # Each branch ends in a dropout: both in one module in transformers 5, in two before.
        ends = [layer] if hasattr(layer, "dropout") else [layer.attention.output, layer.output]
        for end in ends:
            end.dropout = nn.Sequential(end.dropout, StochasticDepth(rate))


def _evenly(depth: int) -> list[int]:
    """Four of the blocks 1 to depth."""
    return [depth * k // 4 for k in (1, 2, 3, 4)]


def _four(stages: int, plain: bool) -> list[int]:
    """The last four stages, counted from 1; four evenly spaced ones if the network is plain."""
    return _evenly(stages) if plain and stages > 4 else [*range(max(stages - 3, 1), stages + 1)]


def _grid(size: Sequence[int], patch: int) -> tuple[int, int]:
    """The rows and columns of patches in an image; raises if the patches do not tile it."""
    height, width = size
    if height % patch or width % patch:
        raise ValueError(
            f"patches of {patch} pixels do not tile {height} x {width}; crop or pad the "
            "images to multiples of the patch."
        )
    return height // patch, width // patch


def _side_by_side(blocks: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Concatenate the tokens [B, h w, D] of n blocks to features [B, n D, h, w]."""
    tokens = torch.cat(list(blocks), dim=-1)
    return tokens.view(len(tokens), *grid, -1).permute(0, 3, 1, 2)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")
