"""Boundaries are matched in C++ with the counts of the reference in Python."""

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import data, filters, morphology

import taskgroup as tg
from taskgroup.lab.vision.boundary_matching import count_boundaries, match


def both(function, *args):
    """The results of the C++ code and of the reference."""
    found = []
    for backend in ("cpp", "reference"):
        with tg.ops.use_backend(backend):
            found.append(function(*args))
    return found


def check(reached, label, known=None, distance=2.0, n=9):
    known = np.ones_like(label) if known is None else known
    native, reference = both(count_boundaries, reached, label, known, distance, n)
    assert native.dtype == reference.dtype == np.int64
    np.testing.assert_array_equal(native, reference)
    return reference


def smooth(seed, shape, sigma):
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (x - x.min()) / max(np.ptp(x), 1e-9)


DISTANCES = [0, 1, 1.5, math.sqrt(5), 3, 7.7, 40]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6])
def test_random_pixels(distance, share):
    g = np.random.default_rng(int(100 * share))
    for shape in ((17, 23), (40, 64), (30, 65), (1, 130), (130, 1)):
        one, other = g.random(shape) < share, g.random(shape) < g.uniform(0, share)
        native, reference = both(match, one, other, distance)
        assert native == reference
        assert both(match, other, one, distance) == [reference, reference]


@pytest.mark.parametrize("distance", [0, 2.5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_smooth_probabilities(seed, distance):
    shape = ((70, 90), (64, 128), (33, 129), (128, 40))[seed]
    reached = (20 * smooth(seed, shape, 1 + seed)).astype(np.uint8)
    label = morphology.thin(smooth(100 + seed, shape, 2) > 0.55)
    known = np.random.default_rng(seed).random(shape) < 0.9
    counts = check(reached, label, known, distance, 20)
    assert counts[0].max() > 0


@pytest.mark.parametrize(("height", "share"), [(106, 0.011), (128, 0.0075)])
def test_a_photograph(height, share):
    """The edges of a photograph, as a network would predict them: near the label, and soft."""
    grey = data.stereo_motorcycle()[0][100 : 100 + 2 * height, 200:480].mean(-1)[::2, ::2] / 255
    label = morphology.thin(filters.sobel(grey) > 0.1)
    p = np.roll(ndimage.gaussian_filter(filters.sobel(grey), 1.2), 1, axis=1)
    reached = np.minimum(99 * p / p.max() * 1.5, 99).astype(np.uint8)
    counts = check(reached, label, None, 5 * share * math.hypot(*label.shape), 99)
    assert counts[0].max() > 0.3 * label.sum()


def test_nothing_all_and_single_pixels():
    shape = (20, 70)
    nothing, all_ = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    single = nothing.copy()
    single[7, 64] = True
    for predicted in (nothing, all_, single):
        for label in (nothing, all_, single):
            for known in (nothing, all_, ~single):
                check(9 * predicted.astype(np.uint8), label, known)
    assert both(match, all_, all_, 3) == [1400, 1400]
    empty = np.zeros((0, 7), dtype=bool)
    np.testing.assert_array_equal(check(empty.astype(np.uint8), empty), np.zeros((3, 9)))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_ties(step):
    """Every pixel has several partners at the same distance."""
    one, other = np.zeros((2, 48, 80), dtype=bool)
    one[::step, ::step] = True
    other[step // 2 :: step, step // 2 :: step] = True
    for distance in (1, math.sqrt(2), 2, math.sqrt(8), 5):
        native, reference = both(match, one, other, distance)
        assert native == reference
        half = other & (np.indices(other.shape).sum(0) % (2 * step) == 0)
        native, reference = both(match, one, half, distance)
        assert native == reference


def test_long_chains_of_partners():
    """A chain is matched as a whole only if all pairs move by one."""
    one, other = np.zeros((2, 3, 200), dtype=bool)
    one[1, 1::2] = True
    other[1, ::2] = True
    other[1, 0] = False
    other[0, 199] = True
    assert both(match, one, other, 1.0) == [100, 100]
    other[0, 199] = False
    assert both(match, one, other, 1.0) == [99, 99]


def test_a_distance_beyond_the_image():
    one, other = np.ones((3, 70), dtype=bool), np.tri(3, 70, dtype=bool)
    for distance in (100, 1e30, 1e200, math.inf):
        assert both(match, one, other, distance) == [6, 6]


def test_any_layout_in_memory():
    g = np.random.default_rng(0)
    reached, label = g.integers(0, 10, (50, 40)).astype(np.uint8), g.random((50, 40)) < 0.2
    check(reached.T, label.T)
    check(reached[:, ::-1], label[:, ::-1], distance=1.5)


def test_many_thresholds():
    g = np.random.default_rng(1)
    reached = g.integers(0, 256, (30, 30)).astype(np.uint8)
    check(reached, g.random((30, 30)) < 0.2, n=255)
    check(reached // 86 * 40, g.random((30, 30)) < 0.2, n=100)
