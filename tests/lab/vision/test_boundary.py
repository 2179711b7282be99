import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage import morphology

from taskgroup.lab.vision.boundary import OdsF
from taskgroup.lab.vision.boundary_matching import match

SEEDS = range(12)


def row(text):
    return np.array([[c == "x" for c in text]])


def benchmark_match(predicted, label, distance):
    """The assignment of least cost, a pixel without a partner costing 100 times the distance."""
    far = cdist(np.argwhere(predicted), np.argwhere(label))
    near = far <= distance
    chosen = linear_sum_assignment(np.where(near, far, 100 * distance + 1))
    return int(near[chosen].sum())


def smooth(seed, shape=(23, 31)):
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return ((x - x.min()) / np.ptp(x)).astype(np.float32)


def draw(seed, images=2, shape=(23, 31)):
    """Smooth probabilities, thin labels, and a mask that leaves a tenth unknown."""
    p = np.stack([smooth(10 * seed + i, shape) for i in range(images)])
    label = np.stack([morphology.thin(smooth(1000 + 10 * seed + i, shape) > 0.6) for i in range(2)])
    known = np.random.default_rng(seed).random(p.shape) < 0.9
    return tuple(map(torch.from_numpy, (p, label, known)))


def counted(p, label, known=None, max_dist=0.0, thresholds=1):
    """The counts [3, n] of one image of few pixels."""
    metric = OdsF(max_dist, thresholds)
    images = [torch.as_tensor(x)[None] for x in (p, label, known) if x is not None]
    metric.update(*images)
    return metric.counts.tolist()


def f(p, label, **options):
    metric = OdsF(**{"max_dist": 0.0} | options)
    metric.update(torch.as_tensor(p)[None], torch.as_tensor(label)[None])
    return metric.compute().item()


# Matching


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("shift", "matched"), [(0, 10), (1, 10), (-2, 10), (2, 10), (3, 0)])
def test_a_line_is_matched_up_to_the_distance(shift, matched, transpose):
    label = np.zeros((10, 12), dtype=bool)
    label[:, 6] = True
    predicted = np.roll(label, shift, axis=1)
    if transpose:
        label, predicted = label.T, predicted.T
    assert match(predicted, label, 2) == matched


def test_the_distance_is_euclidean():
    one, other = np.zeros((2, 5, 5), dtype=bool)
    one[0, 0] = other[3, 4] = True
    assert [match(one, other, d) for d in (4.99, 5, 5.01)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("predicted", "label", "expected"),
    [
        ("x.x....", ".x.....", 1),  # two compete for one
        (".x.....", "x.x....", 1),
        ("x..x...", "..x..x.", 2),  # the nearest pair taken first would leave the others alone
        ("xx..x.x", ".xx...x", 3),
        ("x......", "......x", 0),
        ("xxxxxxx", "xxxxxxx", 7),
        (".......", "xxxxxxx", 0),
        ("xxxxxxx", ".......", 0),
        (".......", ".......", 0),
    ],
)
def test_one_to_one_within_two_pixels(predicted, label, expected):
    assert match(row(predicted), row(label), 2) == expected
    assert match(row(label), row(predicted), 2) == expected


def test_the_end_of_a_row_is_not_near_the_start_of_the_next():
    predicted, label = np.zeros((2, 3, 9), dtype=bool)
    predicted[0, 8] = label[1, 0] = True
    predicted[2, 8] = label[0, 0] = True
    assert match(predicted, label, 3) == 0


def test_a_distance_beyond_the_image():
    predicted = np.ones((3, 4), dtype=bool)
    label = np.tri(3, 4, dtype=bool)
    for distance in (100, 1e30, math.inf):
        assert match(predicted, label, distance) == 6


@pytest.mark.parametrize("distance", [0, 1, 1.5, math.sqrt(5), 4.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_as_many_as_the_assignment_of_least_cost(seed, distance):
    g = np.random.default_rng(seed)
    shape = g.integers(1, 16, 2)
    predicted, label = (g.random(shape) < g.uniform(0, 0.5) for _ in range(2))
    assert match(predicted, label, distance) == benchmark_match(predicted, label, distance)


def test_match_tells_what_it_needs():
    with pytest.raises(ValueError, match=r"predicted and label: .* \(3, 4\) and \(4, 3\)$"):
        match(np.zeros((3, 4), dtype=bool), np.zeros((4, 3), dtype=bool), 1)
    for distance in (-1, math.nan):
        with pytest.raises(ValueError, match="distance: must be at least 0 pixels, got"):
            match(row("x"), row("x"), distance)


# Thinning


def test_a_thick_prediction_is_thinned_and_the_label_is_not():
    block = np.zeros((7, 9), dtype=bool)
    block[2:5, 2:7] = True  # thins to the three in the middle
    line = np.zeros_like(block)
    line[3, 2:7] = True
    assert counted(block * 0.9, line) == [[3], [3], [5]]
    assert counted(block * 0.9, block) == [[3], [3], [15]]
    corners = np.zeros(block.shape)
    corners[2, 2] = corners[4, 6] = 0.9
    assert counted(corners, block) == [[2], [2], [15]]


def test_unknown_pixels_are_dropped_from_the_thinned_prediction_and_the_label():
    block = np.zeros((7, 9), dtype=bool)
    block[2:5, 2:7] = True
    middle = np.ones_like(block)
    middle[3] = False
    assert counted(block * 0.9, block, middle) == [[0], [0], [10]]
    corner = np.ones_like(block)
    corner[3, 3] = False
    assert counted(block * 0.9, block, corner) == [[2], [2], [14]]


def test_a_probability_at_the_threshold_reaches_it():
    label = row("x")
    for dtype in (torch.float32, torch.float64):
        p = torch.full((1, 1), 0.7, dtype=dtype)
        expected = [1] * 7 + [0] * 2
        assert counted(p, label, thresholds=9) == [expected, expected, [1] * 9]
    assert counted(torch.full((1, 1), 0.5, dtype=torch.bfloat16), label) == [[1], [1], [1]]


def test_the_distance_is_a_share_of_the_diagonal():
    label = np.zeros((30, 40), dtype=bool)  # diagonal 50
    label[:, 20] = True
    for shift, matched in [(2, 30), (3, 0)]:
        p = np.roll(label, shift, axis=1) * 1.0
        assert counted(p, label, max_dist=0.04) == [[matched], [30], [30]]


# F

LABEL = row("x.x.x.x.x.x.x.x.x.x." + 24 * ".")  # 10 pixels


def two_thresholds(upper, lower, wrong_lower):
    """Right pixels at 2/3, right and wrong ones at 1/3; a pixel matches the one on it alone."""
    p = np.zeros(LABEL.shape)
    p[0, np.arange(lower) * 2] = 0.5
    p[0, np.arange(upper) * 2] = 0.9
    p[0, 20 + np.arange(wrong_lower) * 2] = 0.5
    return p


def test_a_perfect_prediction():
    label = morphology.thin(smooth(1) > 0.6)
    assert f(label * 1.0, label, thresholds=99) == 1


def test_precision_and_recall_at_one_threshold():
    p = two_thresholds(4, 8, 12)
    assert counted(p, LABEL, thresholds=2) == [[8, 4], [20, 4], [10, 10]]
    # P = 8 / 20 and R = 8 / 10
    assert f(p, LABEL, thresholds=1) == pytest.approx(2 * 0.4 * 0.8 / 1.2, rel=1e-6)


def test_the_better_of_two_thresholds():
    # P = 8 / 8 and R = 8 / 10 at both; then P = 8 / 20 at the lower one
    assert f(two_thresholds(8, 8, 0), LABEL, thresholds=2) == pytest.approx(1.6 / 1.8, rel=1e-6)
    assert f(two_thresholds(8, 8, 12), LABEL, thresholds=2) == pytest.approx(1.6 / 1.8, rel=1e-6)
    # at the upper one nothing is predicted
    p = two_thresholds(8, 8, 0) * 0.6
    assert f(p, LABEL, thresholds=2) == pytest.approx(1.6 / 1.8, rel=1e-6)


def test_between_two_thresholds_f_can_be_higher_than_at_either():
    # (P, R) from (0.4, 0.8), F = 0.533, to (1, 0.4), F = 0.571. Between them, a share s from the
    # second, F = 0.8 (1 + 0.4 s - 0.6 s²) / (1.4 - 0.2 s), greatest at s = 0.468.
    got = f(two_thresholds(4, 8, 12), LABEL, thresholds=2)
    assert got == pytest.approx(0.646532, abs=1e-5)
    steps = [i / 99 for i in range(100)]
    expected = max(0.8 * (1 + 0.4 * s - 0.6 * s**2) / (1.4 - 0.2 * s) for s in steps)
    assert got == pytest.approx(expected, rel=2e-7)


def test_only_between_neighbours():
    # The two above, at 1/4 and 3/4, with (0.25, 0.4) at 2/4: F = 0.571 at the last is the most.
    p = two_thresholds(4, 8, 12)
    p[p == 0.5] = 0.3
    p[0, 20:][p[0, 20:] > 0] = 0.6
    assert counted(p, LABEL, thresholds=3) == [[8, 4, 4], [20, 16, 4], [10] * 3]
    assert f(p, LABEL, thresholds=3) == pytest.approx(2 * 1 * 0.4 / 1.4, rel=1e-6)


def test_where_nothing_is_predicted_precision_is_zero():
    # Were it one, F would be higher between the thresholds than the 0.533 at the lower one.
    p = two_thresholds(0, 8, 12)
    assert counted(p, LABEL, thresholds=2)[1] == [20, 0]
    assert f(p, LABEL, thresholds=2) == pytest.approx(2 * 0.4 * 0.8 / 1.2, rel=1e-6)


def test_nothing_predicted_or_nothing_right_is_zero():
    assert f(np.zeros(LABEL.shape), LABEL) == 0
    assert f(np.roll(LABEL, 1) * 1.0, LABEL) == 0


def test_no_label_is_nan_until_there_is_one():
    metric = OdsF(0.0, 3)
    p = torch.from_numpy(LABEL * 0.9)[None]
    metric.update(p, torch.zeros_like(p, dtype=torch.bool))
    assert metric.compute().isnan()
    metric.update(p, torch.from_numpy(LABEL)[None])
    assert metric.compute().item() == pytest.approx(2 * 0.5 * 1 / 1.5, rel=1e-6)


# The metric


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_benchmark_written_out(seed, masked):
    p, label, known = draw(seed)
    n, distance = 12, 0.05 * math.hypot(23, 31)
    metric = OdsF(0.05, n)
    metric.update(p, label, *[known] * masked)
    total = np.zeros((3, n))
    for x, y, mask in zip(p.numpy(), label.numpy(), known.numpy() | (not masked), strict=True):
        for k in range(n):
            predicted, labelled = morphology.thin(x >= (k + 1) / (n + 1)) & mask, y & mask
            right = benchmark_match(predicted, labelled, distance)
            total[:, k] += right, predicted.sum(), labelled.sum()
    np.testing.assert_array_equal(metric.counts, total)
    best = 0.0
    precision, recall = total[0] / np.maximum(total[1], 1), total[0] / total[2]
    for k in range(1, n):
        for s in np.linspace(0, 1, 100):
            a, b = (x[k] * s + x[k - 1] * (1 - s) for x in (precision, recall))
            best = max(best, 2 * a * b / (a + b + (a + b == 0)))
    assert metric.compute().item() == pytest.approx(best, rel=1e-6)


def test_batches_and_their_order_do_not_matter():
    p, label, known = draw(5)
    metrics = [OdsF(0.05, 9, workers=2 * (k == 4)) for k in range(5)]
    metrics[0].update(p, label, known)
    for i in (0, 1):
        metrics[1].update(p[i, None], label[i, None], known[i, None])
    metrics[2].update(p.flip(0), label.flip(0), known.flip(0))
    metrics[3].update(p[:, None], label[:, None], known[:, None])
    for i in (0, 1):  # in other processes, at the end
        metrics[4].update(p[i, None], label[i, None], known[i, None])
    assert metrics[4].counts.sum() == 0
    assert metrics[4].compute() == metrics[0].compute()
    for metric in metrics[1:]:
        torch.testing.assert_close(metric.counts, metrics[0].counts, rtol=0, atol=0)
    metrics[0].update(p[:0], label[:0])
    torch.testing.assert_close(metrics[0].counts, metrics[1].counts, rtol=0, atol=0)


def test_forward_is_of_the_batch_and_compute_of_all():
    p, label, _ = draw(6)
    metric, alone, both = OdsF(0.05, 9), OdsF(0.05, 9), OdsF(0.05, 9)
    metric(p[:1], label[:1])
    alone.update(p[1:], label[1:])
    both.update(p, label)
    assert metric(p[1:], label[1:]) == alone.compute()
    assert metric.compute() == both.compute() != alone.compute()
    torch.testing.assert_close(metric.counts, both.counts, rtol=0, atol=0)
    metric.reset()
    assert metric.counts.sum() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probability": torch.zeros(4, 5)}, ValueError, r"probability: .* got \[4, 5\]"),
        ({"probability": torch.zeros(1, 2, 4, 5)}, ValueError, r"probability: .* \[1, 2, 4, 5\]"),
        ({"probability": torch.zeros(1, 4, 5).long()}, TypeError, r"probability: .* torch.int64"),
        ({"probability": torch.full((1, 4, 5), 1.5)}, ValueError, "sigmoid"),
        ({"probability": torch.full((1, 4, 5), -0.5)}, ValueError, "sigmoid"),
        ({"probability": torch.full((1, 4, 5), torch.nan)}, ValueError, "sigmoid"),
        ({"label": torch.zeros(1, 5, 4).bool()}, ValueError, r"label: \[1, 4, 5\].* \[1, 5, 4\]"),
        ({"label": torch.zeros(1, 4, 5)}, TypeError, "label: bool is needed, got torch.float32"),
        ({"known": torch.ones(1, 1, 4, 5).bool()}, ValueError, r"known: .* got \[1, 1, 4, 5\]"),
        ({"known": torch.ones(1, 4, 5)}, TypeError, "known: bool is needed"),
    ],
)
def test_update_tells_what_it_needs(change, error, message):
    good = {"probability": torch.ones(1, 4, 5), "label": torch.ones(1, 4, 5).bool()}
    metric = OdsF(0.1)
    with pytest.raises(error, match=message):
        metric.update(**good | change)
    assert metric.counts.sum() == 0


def test_options_are_checked():
    for max_dist in (-0.1, 7.0, math.nan):
        with pytest.raises(ValueError, match="max_dist: a share of the diagonal"):
            OdsF(max_dist)
    with pytest.raises(ValueError, match="thresholds: 1 to 255 of them, got 0"):
        OdsF(0.1, 0)


def test_padding_does_not_widen_the_tolerance():
    label = torch.zeros(1, 30, 40, dtype=torch.bool)
    label[:, 10, 5:35] = True
    probability = torch.zeros(1, 30, 40)
    probability[:, 12, 5:35] = 1  # two pixels off: 0.04 of the diagonal of 50
    padded = [torch.zeros(1, 60, 80, dtype=x.dtype) for x in (probability, label, label)]
    inside = (slice(None), slice(20, 50), slice(7, 47))
    for canvas, x in zip(padded, (probability, label, torch.ones_like(label)), strict=True):
        canvas[inside] = x
    for max_dist, expected in ((0.041, 1.0), (0.039, 0.0)):
        for images in ((probability, label), padded):
            metric = OdsF(max_dist)
            metric.update(*images)
            assert metric.compute() == expected
