import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taskgroup.lab.vision import NYUD, PASCAL, TASKONOMY, Samples, Task, evaluate


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


def one(kind, channels, outputs, labels, masks, **options):
    """The metric of one task over images that come in two batches."""
    task = Task("t", channels, options.pop("loss", "l1"), kind, "T", **options)
    n = len(labels)
    images = torch.arange(n).view(n, 1, 1, 1).expand(n, 3, *labels.shape[-2:]).float()
    model = Fixed({"t": outputs})
    samples = Samples(images, {"t": labels}, {"t": masks})
    found = [evaluate(model, samples, size, tasks={"t": task})["t"] for size in (1, n)]
    assert found[0] == pytest.approx(found[1], rel=1e-6, nan_ok=True)
    return found[0]


def test_miou_by_hand():
    label = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 0]]).view(2, 1, 1, 4).to(torch.uint8)
    said = torch.tensor([[0, 1, 1, 1], [2, 0, 3, 0]]).view(2, 1, 4)
    outputs = F.one_hot(said, 5).movedim(-1, 1).float()
    # Over the set: class 0 has 2 right of 2 said wrong or missed (IoU 2/4), class 1 2/3, class 2
    # 1/2; classes 3 and 4 do not occur where anything is known.
    found = one("miou", 5, outputs, label, label < 255, loss="cross_entropy")
    assert found == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)


def test_mean_angle_by_hand():
    normals = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    said = torch.tensor([[0, 0, 7], [1, 1, 0], [0, -2, 0], [1, 0, 0.0]])  # 0, 45, 180 degrees
    label, output = (x.T.view(1, 3, 1, 4).contiguous() for x in (normals, said))
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    assert one("angle", 3, output, label, mask, loss="unit_l1") == pytest.approx(75)
    # Nearly the same: where the cosine has no digits left.
    tilt = torch.tensor([1e-5, 0, 1]).view(1, 3, 1, 1)
    straight = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1)
    found = one("angle", 3, tilt, straight, mask[..., :1], loss="unit_l1")
    assert found == pytest.approx(math.degrees(1e-5), rel=1e-3)


def test_max_f_by_hand():
    probability = torch.tensor([0.97, 0.62, 0.62, 0.33, 0.08, 0.9])
    label = torch.tensor([True, True, False, True, False, False]).view(1, 1, 1, 6)
    mask = torch.tensor([True] * 5 + [False]).view(1, 1, 1, 6)
    output = probability.logit().view(1, 1, 1, 6)
    by_threshold = [
        (3 / 5, 1.0),  # all five, up to .08
        (3 / 4, 1.0),
        (2 / 3, 2 / 3),
        (1.0, 1 / 3),
    ]
    expected = max(1.3 * p * r / (0.3 * p + r) for p, r in by_threshold)
    found = one("max_f", 1, output, label, mask, loss="balanced_bce")
    assert found == pytest.approx(expected)
    # Told apart at .90 alone; a second sigmoid would leave thresholds at .20, .41, .62 and .85.
    apart = torch.tensor([0.92, 0.87]).logit().view(1, 1, 1, 2)
    found = one("max_f", 1, apart, label[..., 1:3], mask[..., 1:3], loss="balanced_bce")
    assert found == pytest.approx(1.0)
    with pytest.warns(UserWarning, match="no valid pixel to evaluate: t"):
        assert math.isnan(one("max_f", 1, output, label, mask & False, loss="balanced_bce"))
    assert math.isnan(one("max_f", 1, output, label & False, mask, loss="balanced_bce"))


def test_edges_take_the_tolerance_of_their_task():
    label = torch.zeros(1, 1, 30, 40, dtype=torch.bool)
    label[..., 10, 5:35] = True
    output = torch.full((1, 1, 30, 40), -9.0)
    output[..., 12, 5:35] = 9.0  # two pixels off, of a diagonal of 50
    mask = torch.ones_like(label)
    for max_dist, expected in ((0.05, 1.0), (0.03, 0.0)):
        found = one("ods_f", 1, output, label, mask, loss="weighted_bce", max_dist=max_dist)
        assert found == pytest.approx(expected)
    assert (NYUD["edge"].max_dist, PASCAL["edge"].max_dist) == (0.011, 0.0075)


def test_outputs_that_are_not_finite_have_no_metric():
    """An argmax would make class 0 of them, a threshold no edge."""
    label = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    mask = torch.ones_like(label, dtype=torch.bool)
    for kind, loss, channels in (
        ("miou", "cross_entropy", 3),
        ("max_f", "balanced_bce", 1),
        ("ods_f", "weighted_bce", 1),
        ("rmse", "l1", 1),
    ):
        outputs = torch.zeros(1, channels, 4, 4)
        outputs[..., 2, 2] = torch.nan
        assert math.isnan(one(kind, channels, outputs, label, mask, loss=loss))


def test_rmse_pools_over_the_set():
    output = torch.tensor([[1.0, 2.0], [5.0, 0.0]]).view(2, 1, 1, 2)
    mask = torch.tensor([[True, True], [True, False]]).view(2, 1, 1, 2)
    found = one("rmse", 1, output, torch.zeros_like(output), mask)
    assert found == pytest.approx(math.sqrt((1 + 4 + 25) / 3))  # not the mean of two roots


def test_which_way_is_better():
    higher = {t.name for t in [*NYUD.values(), *PASCAL.values()] if not t.lower_is_better}
    assert higher == {"semseg", "edge", "human_parts", "sal"}
