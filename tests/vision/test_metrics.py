import math

import numpy as np
import pytest
import torch
from torch import nn

from taskgroup.vision import TASKONOMY, Samples, evaluate


class Fixed(nn.Module):
    """Predicts what it was given, batch after batch."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.dropout = nn.Dropout()
        self.norm = nn.BatchNorm1d(1)
        self.modes, self.graphs = [], []

    def forward(self, images):
        self.modes.append(self.training)
        self.graphs.append(torch.is_grad_enabled())
        rows = images[:, 0, 0, 0].long()
        return {name: output[rows] for name, output in self.outputs.items()}


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    n = 7
    images = torch.arange(n).view(n, 1, 1, 1).expand(n, 3, 4, 6).float()
    draw = {t: torch.randn(2, n, c.channels, 4, 6, generator=g) for t, c in TASKONOMY.items()}
    masks = {t: torch.rand(n, 1, 4, 6, generator=g) < 0.3 + 0.05 * i for i, t in enumerate(draw)}
    labels = {t: torch.where(masks[t], both[1], torch.nan) for t, both in draw.items()}
    return {t: both[0] for t, both in draw.items()}, Samples(images, labels, masks)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_agrees_with_numpy_whatever_the_batch_size(data, batch_size):
    outputs, samples = data
    got = evaluate(Fixed(outputs), samples, batch_size)
    assert list(got) == list(TASKONOMY)
    for name, value in got.items():
        p = outputs[name].double().numpy()
        if name == "normal":
            p = p / np.linalg.norm(p, axis=1, keepdims=True)
        mask = np.broadcast_to(samples.masks[name].numpy(), p.shape)
        error = (p - samples.labels[name].double().numpy())[mask]
        expected = (
            math.sqrt(np.mean(error**2)) if name == "principal_curvature" else np.abs(error).mean()
        )
        assert value == pytest.approx(expected, rel=1e-5)


def test_no_valid_pixel_is_nan_with_a_warning_that_names_the_task(data):
    outputs, samples = data
    samples.masks["reshading"].zero_()
    with pytest.warns(UserWarning, match="no valid pixel to evaluate: reshading$"):
        got = evaluate(Fixed(outputs), samples)
    assert math.isnan(got.pop("reshading"))
    assert all(map(math.isfinite, got.values()))


def test_modes_come_back_as_they_were(data):
    outputs, samples = data
    model = Fixed(outputs)
    model.norm.eval()  # frozen on purpose, say
    evaluate(model, samples, 4)
    assert model.modes == [False, False]
    assert model.graphs == [False, False]
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)


def test_modes_come_back_after_an_error(data):
    outputs, samples = data
    model = Fixed({"semseg": outputs["normal"]})
    with pytest.raises(KeyError):
        evaluate(model, samples)
    assert model.training
