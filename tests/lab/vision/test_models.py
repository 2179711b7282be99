import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taskgroup as tg
from taskgroup.lab.vision import TASKONOMY, ViTFeatures, vit
from taskgroup.lab.vision.models import dense_model


class Strided(nn.Conv2d):
    """An encoder of stride 4 with 6 channels."""

    channels, patch = 6, 4

    def __init__(self):
        super().__init__(3, 6, kernel_size=4, stride=4)


def test_all_tasks_at_the_size_of_the_image():
    model = vit(dim=16)
    assert isinstance(model, tg.MultiTaskModel)
    outputs = model(torch.randn(2, 3, 64, 64))
    assert {t: tuple(o.shape) for t, o in outputs.items()} == {
        t: (2, task.channels, 64, 64) for t, task in TASKONOMY.items()
    }


@pytest.mark.parametrize(("depth", "blocks"), [(4, (0, 1, 2, 3)), (8, (1, 3, 5, 7))])
def test_features_are_four_blocks_evenly_spaced(depth, blocks):
    encoder = ViTFeatures(size=32, patch=8, dim=16, depth=depth, attention_heads=2)
    # Every block's output, as the block itself gives it.
    seen = []
    layers = [m for m in encoder.vit.modules() if type(m).__name__ == "ViTLayer"]
    assert len(layers) == depth
    for layer in layers:
        layer.register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    features = encoder(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 64, 4, 4)
    for part, block in zip(features.split(16, dim=1), blocks, strict=True):
        tokens = encoder.vit.layernorm(seen[block][:, 1:])  # without the class token
        torch.testing.assert_close(part.flatten(2).transpose(1, 2), tokens)


def test_a_feature_stands_where_its_patch_stands():
    torch.manual_seed(0)
    encoder = ViTFeatures(size=32, patch=8, dim=16, attention_heads=2)
    image = torch.zeros(1, 3, 32, 32)
    spot = image.clone()
    spot[:, :, 8:16, 24:32] = 5
    change = (encoder(spot) - encoder(image)).square().sum(1)[0]
    assert divmod(int(change.argmax()), 4) == (1, 3)


def test_a_head_is_a_1x1_convolution_and_bilinear_upsampling():
    model = vit(["normal"], size=32, dim=16)
    images = torch.randn(2, 3, 32, 32)
    features = model.encoder(images)
    weight, bias = model.heads["normal"].parameters()
    assert weight.shape == (3, 64, 1, 1)
    coarse = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], features) + bias.view(1, 3, 1, 1)
    expected = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images)["normal"], expected)


def test_seeded_weights_and_outputs_stay_as_published():
    # To the bit, and the generator with them: tables of results stand on seeds.
    from transformers import ViTConfig, ViTModel

    tasks = {"normal": 3, "depth_zbuffer": 1}
    torch.manual_seed(0)
    model, after = vit(tasks, dim=16, dropout=0.1), torch.rand(1)
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.1,
    )
    encoder = ViTModel(config, add_pooling_layer=False)
    encoder.layernorm.weight.data.fill_(0.25)
    heads = {task: nn.Conv2d(64, channels, 1) for task, channels in tasks.items()}
    assert torch.equal(torch.rand(1), after)

    images = torch.randn(2, 3, 64, 96)
    torch.manual_seed(1)
    outputs = model(images)
    torch.manual_seed(1)
    states = encoder(
        images, interpolate_pos_encoding=True, output_hidden_states=True
    ).hidden_states[1:]
    features = torch.cat([encoder.layernorm(state[:, 1:]) for state in states], dim=-1)
    features = features.view(2, 8, 12, 64).permute(0, 3, 1, 2)
    for task, head in heads.items():
        expected = F.interpolate(head(features), scale_factor=8, mode="bilinear")
        assert torch.equal(outputs[task], expected)


@pytest.mark.parametrize("decoder", ["linear", "conv"])
def test_any_encoder_gets_outputs_at_the_size_of_the_image(decoder):
    model = dense_model(Strided(), {"depth": 1, "semseg": 13}, decoder=decoder, width=8)
    assert isinstance(model, tg.MultiTaskModel)
    outputs = model(torch.randn(2, 3, 24, 40))
    assert {task: tuple(out.shape) for task, out in outputs.items()} == {
        "depth": (2, 1, 24, 40),
        "semseg": (2, 13, 24, 40),
    }
    sum(out.sum() for out in outputs.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_conv_head_has_a_3x3_convolution_batchnorm_and_relu_before_the_1x1():
    model = dense_model(Strided(), {"depth": 2}, decoder="conv", width=8)
    images = torch.randn(2, 3, 24, 40)
    conv, scale, shift, last, bias = model.heads["depth"].parameters()
    assert [tuple(p.shape) for p in (conv, scale, last)] == [(8, 6, 3, 3), (8,), (2, 8, 1, 1)]
    x = F.conv2d(model.encoder(images), conv, padding=1)
    x = F.batch_norm(x, None, None, scale, shift, training=True).relu()
    x = F.interpolate(F.conv2d(x, last, bias), size=(24, 40), mode="bilinear")
    torch.testing.assert_close(model(images)["depth"], x)


def test_heads_are_linear_unless_told_otherwise():
    kinds = [type(layer) for layer in dense_model(Strided(), {"depth": 1}).heads["depth"]]
    assert kinds == [nn.Conv2d, nn.Upsample]
    head = dense_model(Strided(), {"depth": 1}, decoder="conv").heads["depth"]
    assert head[0].out_channels == 256


def test_heads_that_cannot_be_made():
    with pytest.raises(ValueError, match=r"unknown decoder 'mlp': take 'linear' or 'conv'"):
        dense_model(Strided(), {"depth": 1}, decoder="mlp")
    with pytest.raises(ValueError, match=r"encoder \(Conv2d\).*attributes channels.*and patch"):
        dense_model(nn.Conv2d(3, 6, 4), {"depth": 1})


def test_other_image_sizes():
    model = vit(["reshading"], size=64, dim=16)
    assert model(torch.randn(1, 3, 32, 96))["reshading"].shape == (1, 3, 32, 96)
    with pytest.raises(ValueError, match="8 pixels do not tile 64 x 60"):
        model(torch.randn(1, 3, 64, 60))


def test_every_parameter_is_used():
    model = vit(dim=16)
    sum(o.sum() for o in model(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_seed_decides():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in vit(dim=16).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_dropout_in_training_only():
    x = torch.randn(1, 3, 64, 64)
    model = vit(["reshading"], dim=16, dropout=0.5)
    assert not torch.equal(model(x)["reshading"], model(x)["reshading"])
    model.eval()
    assert torch.equal(model(x)["reshading"], model(x)["reshading"])
    still = vit(["reshading"], dim=16)
    assert torch.equal(still(x)["reshading"], still(x)["reshading"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["semseg"]}, "unknown tasks.*semseg.*depth_zbuffer"),
        ({"depth": 6}, "depth=6"),
        ({"depth": 0}, "depth=0"),
        ({"size": 60}, "8 pixels do not tile an image of 60"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        vit(**settings)
