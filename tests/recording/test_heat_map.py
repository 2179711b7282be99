import numpy as np
import pytest

from taskgroup.recording.heat_map import heat_map

BLUE, RED, WHITE, GREY, INK = (67, 147, 195), (214, 96, 77), (255,) * 3, (228,) * 3, (36, 41, 47)


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


def test_columns_are_divided_by_their_self_affinity_and_ordered_by_group():
    matrix = np.array([[1.0, 4.0, -2.0], [0.0, 2.0, 8.0], [1.0, -1.0, 4.0]])
    relative = matrix / [1.0, 2.0, 4.0]
    order = [2, 0, 1]
    pixels = heat_map(matrix, order, sizes=[1, 2])
    off_diagonal = np.abs(relative[~np.eye(3, dtype=bool)])
    scale = np.quantile(off_diagonal, 0.98)
    for i in range(3):
        for k in range(3):
            value = np.clip(relative[order[i], order[k]] / scale, -1, 1)
            end = np.array(BLUE if value > 0 else RED)
            wanted = np.rint(255 + abs(value) * (end - 255.0))
            assert colour(pixels, 3, i, k) == tuple(wanted)


def test_what_was_not_measured_is_grey():
    matrix = np.array([[1.0, np.nan, 0.5], [0.5, 1.0, 0.5], [0.0, -0.5, 0.0]])
    pixels = heat_map(matrix, [0, 1, 2], [1, 1, 1])
    assert colour(pixels, 3, 0, 1) == GREY
    assert colour(pixels, 3, 1, 0) == BLUE
    assert colour(pixels, 3, 2, 1) == RED
    assert colour(pixels, 3, 2, 0) == WHITE
    # The third task has no self-affinity to divide by.
    assert [colour(pixels, 3, i, 2) for i in range(3)] == [GREY] * 3


@pytest.mark.parametrize("extreme", [1e6, np.inf])
def test_a_few_extremes_do_not_fade_the_rest(extreme):
    matrix = planted(np.random.default_rng(0), 30)
    plain = heat_map(matrix, range(30), [30]).astype(int)
    matrix[3, 4] = extreme
    assert np.abs(heat_map(matrix, range(30), [30]) - plain).mean() < 5


def test_one_pair_of_many_that_is_not_zero_is_seen():
    matrix = np.eye(30)
    matrix[3, 4] = -0.1
    pixels = heat_map(matrix, range(30), [1] * 30)
    assert colour(pixels, 30, 3, 4) == RED
    assert colour(pixels, 30, 4, 3) == WHITE


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


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 5, 11, 40, 100, 240, 400, 401, 700])
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
    assert {colour(pixels, 3, i, k) for i in range(3) for k in range(3)} <= {BLUE, WHITE, GREY}
