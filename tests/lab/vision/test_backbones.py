import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taskgroup._random_state import RandomState
from taskgroup.lab.vision.backbones import StochasticDepth, backbone


def small_vit(depth=8, **settings):
    from transformers import ViTConfig

    return ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=32,
        **settings,
    )


@pytest.fixture(scope="module")
def classifier():
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(small_vit()).eval()
    # As after training: the norms are not those of a fresh network, nor are the positions.
    for name, p in model.named_parameters():
        if "norm" in name or "position" in name:
            nn.init.normal_(p)
    return model


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    classifier.save_pretrained(path)
    return str(path)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# The ViTs


def test_a_vit_takes_images_to_features():
    encoder = backbone("vit-t", size=(32, 48), weights="random", drop_path=0.15)
    assert encoder.training
    features = encoder(torch.randn(2, 3, 32, 48))
    assert (encoder.channels, encoder.patch) == (768, 16)
    assert features.shape == (2, 768, 2, 3)
    features.sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert encoder(torch.randn(1, 3, 64, 16)).shape == (1, 768, 4, 1)
    with pytest.raises(ValueError, match="16 pixels do not tile 32 x 40"):
        encoder(torch.randn(1, 3, 32, 40))


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "parameters"),
    [
        # Parameters of vit_*_patch16_224 as timm counts them, with a classifier of 1000 classes.
        ("vit-t", 192, 12, 3, 5_717_416),
        ("vit-s", 384, 12, 6, 22_050_664),
        ("vit-b", 768, 12, 12, 86_567_656),
        ("vit-l", 1024, 24, 16, 304_326_632),
    ],
)
def test_sizes_are_the_published_ones(name, width, depth, heads, parameters):
    with torch.device("meta"):
        encoder = backbone(name, size=(224, 224), weights="random")
    config = encoder.vit.config
    assert (config.hidden_size, config.num_hidden_layers) == (width, depth)
    assert config.num_attention_heads == heads
    assert encoder.channels == 4 * width
    count = sum(p.numel() for p in encoder.parameters())
    assert count == parameters - 1000 * (width + 1)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(4, (1, 2, 3, 4)), (6, (1, 3, 4, 6)), (12, (3, 6, 9, 12)), (24, (6, 12, 18, 24))],
)
def test_features_are_four_blocks_the_last_one_normalised(tmp_path, depth, blocks):
    small_vit(depth, architectures=["ViTModel"]).save_pretrained(tmp_path)
    encoder = backbone(str(tmp_path), size=(32, 32), weights="random")
    seen = []
    for layer in encoder.vit.modules():
        if type(layer).__name__ == "ViTLayer":
            layer.register_forward_hook(
                lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
    features = encoder(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 64, 4, 4)
    assert len(seen) == depth
    states = [seen[block - 1] for block in blocks]
    states[-1] = F.layer_norm(states[-1], (16,), eps=1e-12) * 0.25  # random weights: a quiet start
    for part, state in zip(features.split(16, dim=1), states, strict=True):
        torch.testing.assert_close(part.flatten(2).transpose(1, 2), state[:, 1:])


@torch.no_grad()
def test_pretrained_features_are_the_states_of_the_saved_model(classifier, folder):
    encoder = backbone(folder, size=(32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    out = classifier.vit(images, output_hidden_states=True)
    states = [out.hidden_states[2], out.hidden_states[4], out.hidden_states[6]]
    expected = torch.cat([*states, out.last_hidden_state], dim=-1)[:, 1:]
    torch.testing.assert_close(encoder(images).flatten(2).transpose(1, 2), expected)


@torch.no_grad()
def test_position_embeddings_are_interpolated_for_other_sizes(classifier, folder):
    encoder = backbone(folder, size=(24, 40)).eval()
    images = torch.randn(2, 3, 24, 40)
    reference = copy.deepcopy(classifier.vit)
    embeddings = reference.embeddings
    grid = embeddings.position_embeddings[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(3, 5), mode="bicubic").flatten(2).transpose(1, 2)
    embeddings.position_embeddings = nn.Parameter(
        torch.cat([embeddings.position_embeddings[:, :1], grid], dim=1)
    )
    embeddings.image_size = (24, 40)  # so that it takes them as they are
    expected = reference(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images)[:, 48:].flatten(2).transpose(1, 2), expected)


def test_weights_from_a_folder(tmp_path):
    from transformers import ViTModel

    with torch.device("meta"):
        config = backbone("vit-t", size=(32, 32), weights="random").vit.config
    model = ViTModel(config, add_pooling_layer=False).half()
    model.save_pretrained(tmp_path)
    encoder = backbone("vit-t", size=(32, 32), weights=str(tmp_path))
    assert all(module.training for module in encoder.modules())
    state = encoder.vit.state_dict()
    assert {p.dtype for p in state.values()} == {torch.float32}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], p.float()) for key, p in model.state_dict().items())


@torch.no_grad()
def test_a_state_dict_means_the_same_whatever_the_weights_were(folder):
    trained = backbone(folder, size=(32, 32))
    fresh = backbone(folder, size=(64, 32), weights="random", drop_path=0.3)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(fresh.eval()(images), trained.eval()(images))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(images), trained(images))


def test_the_seed_decides_random_weights(folder):
    def weights(seed):
        torch.manual_seed(seed)
        encoder = backbone(folder, size=(32, 32), weights="random")
        return torch.cat([p.flatten() for p in encoder.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


# Any other backbone


def config_of(kind):
    import transformers

    stages = {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 1, 1]}
    tokens = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    return {
        "ResNet": lambda: transformers.ResNetConfig(embedding_size=4, layer_type="basic", **stages),
        "ConvNext": lambda: transformers.ConvNextConfig(**stages),
        "Swin": lambda: transformers.SwinConfig(
            embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64
        ),
        "Dinov2": lambda: transformers.Dinov2Config(
            image_size=32, patch_size=8, mlp_ratio=2, **tokens
        ),
        "Beit": lambda: transformers.BeitConfig(
            image_size=64, patch_size=8, intermediate_size=32, **tokens
        ),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "channels", "stride"),
    [
        ("ResNet", 4 + 8 + 12 + 16, 4),
        ("ConvNext", 4 + 8 + 12 + 16, 4),
        ("Swin", 4 + 8 + 16 + 32, 4),
        ("Dinov2", 4 * 16, 8),
        ("Beit", 4 * 16, 8),
    ],
)
def test_any_backbone_of_transformers(kind, channels, stride, tmp_path):
    config_of(kind).save_pretrained(tmp_path)
    encoder = backbone(str(tmp_path), size=(64, 96), weights="random")
    assert all(module.training for module in encoder.modules())
    assert (encoder.channels, encoder.patch) == (channels, stride)
    # No statistics have moved.
    batches = [b for name, b in encoder.named_buffers() if name.endswith("num_batches_tracked")]
    assert bool(batches) == (kind == "ResNet")
    assert not any(batches)
    images = torch.randn(2, 3, 64, 96, requires_grad=True)
    features = encoder(images)
    assert features.shape == (2, channels, 64 // stride, 96 // stride)
    features.square().sum().backward()
    assert images.grad.abs().sum() > 0
    # The norm after the last layer and the token of masked images are not on the way.
    unused = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert not {name for name in unused if ".layernorm." not in name and "mask" not in name}
    with pytest.raises(ValueError, match=f"{stride} pixels do not tile 64 x 94"):
        encoder(torch.randn(1, 3, 64, 94))


@torch.no_grad()
def test_maps_are_brought_to_the_finest_and_concatenated(tmp_path):
    from transformers import ResNetForImageClassification

    model = ResNetForImageClassification(config_of("ResNet"))
    model(torch.randn(4, 3, 64, 64))  # moves the running statistics
    model.eval().save_pretrained(tmp_path)
    encoder = backbone(str(tmp_path), size=(64, 96)).eval()
    images = torch.randn(2, 3, 64, 96)
    maps = model.resnet(images, output_hidden_states=True).hidden_states[1:]
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    expected = [F.interpolate(m, size=(16, 24), mode="bilinear") for m in maps]
    torch.testing.assert_close(encoder(images), torch.cat(expected, dim=1))


@torch.no_grad()
def test_maps_of_one_size_are_those_of_four_blocks_evenly_spaced(tmp_path):
    config_of("Dinov2").save_pretrained(tmp_path)
    encoder = backbone(str(tmp_path), size=(32, 32), weights="random").eval()
    images = torch.randn(1, 3, 32, 32)
    states = encoder.net(images, output_hidden_states=True).hidden_states
    expected = torch.cat([encoder.net.layernorm(states[k]) for k in (2, 4, 6, 8)], dim=-1)[:, 1:]
    torch.testing.assert_close(encoder(images).flatten(2).transpose(1, 2), expected)


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="16 pixels do not tile 224 x 200"):
        backbone("vit-t", size=(224, 200), weights="random")
    config_of("Dinov2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"60 x 64 into features of 7 x 8.*another size"):
        backbone(str(tmp_path), size=(60, 64), weights="random")
    with pytest.raises(ValueError, match="cannot take images of 4 x 4 pixels"):
        backbone(str(tmp_path), size=(4, 4), weights="random")


def test_timm():
    pytest.importorskip("timm")
    encoder = backbone(
        "timm:swin_tiny_patch4_window7_224", size=(64, 96), weights="random", drop_path=0.1
    )
    assert (encoder.channels, encoder.patch) == (96 + 192 + 384 + 768, 4)
    assert encoder(torch.randn(2, 3, 64, 96)).shape == (2, 1440, 16, 24)
    encoder = backbone("timm:vit_tiny_patch16_224", size=(32, 48), weights="random")
    assert encoder(torch.randn(2, 3, 32, 48)).shape == (2, 768, 2, 3)
    assert list(encoder.net.feature_info.out_indices) == [2, 5, 8, 11]


# What cannot be loaded


def sentence(raised):
    """The message, which is one line, and hides the errors it stands for."""
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["vit-b", "microsoft/resnet-50"])
def test_no_network(name, offline):
    with pytest.raises(ValueError, match="cannot be loaded") as raised:
        backbone(name, size=(32, 32))
    message = sentence(raised)
    assert repr(name) in message
    assert message.endswith('weights=<a local folder with the saved model>, or weights="random".')
    assert ("google/vit-base-patch16-224" in message) == (name == "vit-b")


def test_a_config_out_of_reach(offline):
    with pytest.raises(ValueError, match=r"give a local folder with its config\.json") as raised:
        backbone("microsoft/resnet-50", size=(32, 32), weights="random")
    sentence(raised)


def test_an_unknown_name(offline):
    with pytest.raises(ValueError, match=r"'vit-h', none of .*'vit-t', 'vit-s', 'vit-b', 'vit-l'"):
        backbone("vit-h", size=(32, 32))


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_model(there, tmp_path):
    path = tmp_path if there else tmp_path / "nowhere"
    for name, weights in [("vit-t", str(path)), (str(path), None)]:
        with pytest.raises(ValueError, match="cannot be loaded") as raised:
            backbone(name, size=(32, 32), weights=weights)
        message = sentence(raised)
        assert repr(name) in message
        assert str(path) in message


def test_a_folder_with_another_model(folder, tmp_path):
    with pytest.raises(ValueError, match=r"\(192, 12, 3, 16\).*'vit' of \(16, 8, 2, 8\)"):
        backbone("vit-t", size=(32, 32), weights=folder)
    config_of("ResNet").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'resnet' of"):
        backbone("vit-t", size=(32, 32), weights=str(tmp_path))


def test_weights_that_are_not_all_there(tmp_path):
    from transformers import ViTModel

    ViTModel(small_vit(depth=4), add_pooling_layer=False).save_pretrained(tmp_path)
    small_vit(depth=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.4.* are missing"):
        backbone(str(tmp_path), size=(32, 32))


def test_networks_without_maps_of_four_depths(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'bert'.*no network that gives feature maps"):
        backbone(str(tmp_path), size=(32, 32), weights="random")
    small_vit(depth=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"four blocks, and .* has 3"):
        backbone(str(tmp_path), size=(32, 32), weights="random")


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"'timm:resnet50' needs timm.*pip install timm"
    ) as raised:
        backbone("timm:resnet50", size=(32, 32), weights="random")
    sentence(raised)


# Stochastic depth


def test_a_branch_is_dropped_by_sample_and_keeps_its_expectation():
    torch.manual_seed(0)
    branch = torch.randn(20_000, 3, 2)
    out = StochasticDepth(0.15)(branch)
    assert out.shape == branch.shape
    scale = out / branch
    # Whole samples: 0 or 1 / (1 - p).
    assert torch.equal(scale.amin((1, 2)).round(decimals=4), scale.amax((1, 2)).round(decimals=4))
    kept = scale[:, 0, 0] > 0
    torch.testing.assert_close(out[kept], branch[kept] / 0.85)
    assert not out[~kept].any()
    # Six standard deviations: 6 sqrt(.15 .85 / 20000) = .015 of the share, / .85 of the scale.
    assert abs(kept.float().mean() - 0.85) < 0.015
    assert abs(scale[:, 0, 0].mean() - 1) < 0.018


def test_nothing_is_dropped_in_evaluation_or_at_probability_zero():
    branch = torch.randn(8, 3)
    assert torch.equal(StochasticDepth(0.9).eval()(branch), branch)
    state = torch.get_rng_state()
    assert torch.equal(StochasticDepth(0.0)(branch), branch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_probabilities_out_of_range(p):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        StochasticDepth(p)
    with pytest.raises(ValueError, match="probability below 1"):
        backbone("vit-t", size=(32, 32), weights="random", drop_path=p)


def test_masks_are_those_of_the_random_state(folder):
    encoder = backbone(folder, size=(32, 32), drop_path=0.5)
    images = torch.randn(4, 3, 32, 32)
    state = RandomState(None)
    once, again = encoder(images), encoder(images)
    state.replay()
    assert torch.equal(encoder(images), once)
    assert not torch.equal(again, once)


def test_the_probability_rises_from_block_to_block(folder):
    encoder = backbone(folder, size=(32, 32), drop_path=0.35)
    rates = [module.p for module in encoder.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35])


@torch.no_grad()
def test_both_branches_of_a_block_are_dropped(folder):
    encoder = backbone(folder, size=(32, 32), drop_path=0.5)
    block, seen = encoder.vit.layers[-1], {}
    block.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    torch.manual_seed(0)
    encoder(torch.randn(64, 3, 32, 32))
    x = seen["x"]
    attention = 2 * block.attention(block.layernorm_before(x))[0]  # 1 / (1 - p) = 2

    def mlp(x):
        return 2 * block.mlp(block.layernorm_after(x))

    both = x + attention + mlp(x + attention)
    cases = torch.stack([x, x + attention, x + mlp(x), both])
    apart = (cases - seen["out"]).abs().amax((2, 3))
    assert apart.amin(0).max() < 1e-5
    # Each of the four has a probability of a quarter.
    assert set(apart.argmin(0).tolist()) == {0, 1, 2, 3}


@torch.no_grad()
def test_stochastic_depth_changes_neither_evaluation_nor_keys(folder):
    images = torch.randn(2, 3, 32, 32)
    plain = backbone(folder, size=(32, 32)).eval()
    encoder = backbone(folder, size=(32, 32), drop_path=0.5).eval()
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(encoder(images), plain(images))
    other = copy.deepcopy(encoder).train()
    assert not torch.equal(other(images), encoder(images))
    assert torch.equal(other.eval()(images), encoder(images))


def test_stochastic_depth_of_other_backbones(tmp_path):
    config_of("Swin").save_pretrained(tmp_path)  # whose config has .1

    def dropping(drop_path):
        encoder = backbone(str(tmp_path), size=(64, 64), weights="random", drop_path=drop_path)
        images = torch.randn(8, 3, 64, 64)
        return not torch.equal(encoder(images), encoder(images))

    assert not dropping(0.0)
    assert dropping(0.5)
    config_of("ResNet").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no stochastic depth: take drop_path=0, not 0\.15"):
        dropping(0.15)
