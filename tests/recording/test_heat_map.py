import numpy as np
import pytest

from taskgroup.lab.report.affinities import largest, normalised
from taskgroup.recording.heat_map import heat_map

BLUE, ZERO, RED = (67, 147, 195), (236, 236, 236), (214, 96, 77)
BLANK, INK = (255, 255, 255), (36, 41, 47)


def colour(pixels, n_tasks, i, k):
    """The colour in the middle of a cell, which must fill the cell except for a frame."""
    side = len(pixels) // n_tasks
    cell = pixels[i * side : (i + 1) * side, k * side : (k + 1) * side]
    inner = cell[side // 5 : side - side // 5, side // 5 : side - side // 5]
    assert (inner == inner[0, 0]).all()
    return tuple(inner[0, 0].tolist())


def planted(generator, n_tasks):
    matrix = generator.normal(size=(n_tasks, n_tasks))
    np.fill_diagonal(matrix, generator.uniform(1, 2, n_tasks))
    return matrix


def shades(values, scale):
    """The colours [K, K, 3] of values."""
    share = np.clip(np.abs(values) / scale, 0, 1)[..., None]
    ends = np.where(values[..., None] > 0, BLUE, RED)
    found = np.rint(np.asarray(ZERO) + share * (ends - np.asarray(ZERO)))
    return np.where(np.isnan(share), BLANK, found)


def test_an_entry_is_the_mean_of_two_effects_relative_to_the_self_affinities():
    matrix = np.array([[1.0, 4.0, -2.0], [0.0, 2.0, 8.0], [1.0, -5.0, 4.0]])
    pixels = heat_map(matrix, [2, 0, 1], sizes=[1, 2])
    values = {(0, 1): (1 / 1 - 2 / 4) / 2, (0, 2): (-5 / 2 + 8 / 4) / 2, (1, 2): (4 / 2 + 0) / 2}
    for (i, k), value in values.items():
        wanted = tuple(shades(np.array([[value]]), scale=1.0)[0, 0])
        assert colour(pixels, 3, i, k) == colour(pixels, 3, k, i) == wanted
    assert all(colour(pixels, 3, k, k) == BLANK for k in range(3))


@pytest.mark.parametrize("seed", range(5))
def test_the_report_shows_the_same(seed):
    generator = np.random.default_rng(seed)
    matrix = planted(generator, 30)
    matrix[generator.random(matrix.shape) < 0.3] = np.nan
    matrix[:3, :3] = [[-1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, np.nan]]  # no self-affinity
    matrix[4, 5] = np.inf
    order = generator.permutation(30)
    values = normalised(matrix)
    wanted = shades(values, largest(values))[np.ix_(order, order)]
    pixels = heat_map(matrix.astype(np.float32), order, [1] * 30)
    found = np.array([[colour(pixels, 30, i, k) for k in range(30)] for i in range(30)])
    assert np.abs(found - wanted).max() <= 1  # float32


def test_what_was_not_measured_is_blank():
    matrix = np.array([[1.0, np.nan, np.nan], [0.5, 1.0, 0.5], [np.nan, -0.5, 1.0]])
    pixels = heat_map(matrix, [0, 1, 2], [1, 1, 1])
    assert colour(pixels, 3, 0, 1) == BLUE  # one direction is known
    assert colour(pixels, 3, 0, 2) == colour(pixels, 3, 2, 0) == BLANK
    assert colour(pixels, 3, 1, 2) == ZERO


@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_a_few_extremes_do_not_fade_the_rest(extreme):
    matrix = planted(np.random.default_rng(0), 30)
    plain = heat_map(matrix, range(30), [30]).astype(int)
    matrix[3, 4] = extreme
    assert np.abs(heat_map(matrix, range(30), [30]) - plain).mean() < 5


def test_groups_are_framed():
    matrix = planted(np.random.default_rng(0), 5)
    pixels = heat_map(matrix, range(5), [2, 3])
    ink = (pixels == INK).all(-1)
    side = len(pixels) // 5
    for begin, end in ((0, 2 * side), (2 * side, 5 * side)):
        for edge in (begin, end - 1):
            assert ink[edge, begin:end].all()
            assert ink[begin:end, edge].all()
    assert not ink[: 2 * side, 2 * side :].any()
    assert not ink[2 * side :, : 2 * side].any()
    assert ink.mean() < 0.1


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 5, 11, 40, 100, 240, 350, 401, 700])
def test_size(n_tasks):
    pixels = heat_map(planted(np.random.default_rng(0), n_tasks), range(n_tasks), [n_tasks])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (len(pixels), len(pixels), 3)
    assert 400 <= len(pixels) <= 800
    assert len(pixels) % n_tasks == 0


def test_a_pixel_for_each_of_many_pairs_and_frames_that_do_not_hide_them():
    matrix = planted(np.random.default_rng(0), 1000)
    sizes = [1] * 500 + [2] * 100 + [100] * 3
    pixels = heat_map(matrix, range(1000), sizes)
    assert pixels.shape == (1000, 1000, 3)
    ink = (pixels == INK).all(-1)
    assert not ink[:700, :700].any()
    assert ink[700, 700:800].all()
    assert not ink[701:799, 701:799].any()


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.eye(3)])
def test_nothing_to_scale_by(matrix):
    pixels = heat_map(matrix.astype(np.float32), [0, 1, 2], [3])
    assert {colour(pixels, 3, i, k) for i in range(3) for k in range(3)} <= {BLANK, ZERO}
