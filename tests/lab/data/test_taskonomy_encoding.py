import math

import numpy as np
import pytest

from taskgroup.lab.data.taskonomy_encoding import encode, normalise
from taskgroup.lab.vision.tasks import TASKONOMY


def through(task, *values):
    """Values of one pixel a row, stored and normalised."""
    stored = encode(task, np.array(values, dtype=float).reshape(len(values), 1, -1))
    return normalise(task, stored).reshape(len(values), -1)


def test_the_eleven_tasks_in_a_stable_order():
    assert list(TASKONOMY) == [
        "depth_euclidean",
        "depth_zbuffer",
        "normal",
        "reshading",
        "edge_occlusion",
        "principal_curvature",
        "keypoints3d",
        "segment_unsup25d",
        "edge_texture",
        "keypoints2d",
        "segment_unsup2d",
    ]
    assert [task.channels for task in TASKONOMY.values()] == [1, 1, 3, 3, 1, 2, 1, 1, 1, 1, 1]
    assert all(name == task.name and task.lower_is_better for name, task in TASKONOMY.items())


@pytest.mark.parametrize("task", TASKONOMY)
def test_stored_type(task):
    wide = task.startswith(("depth", "edge", "keypoints"))
    stored = encode(task, np.zeros((2, 3, TASKONOMY[task].channels)))
    assert stored.dtype == (np.uint16 if wide else np.uint8)
    assert normalise(task, stored).dtype == np.float32


def test_depth_is_logarithmic_in_512ths_of_a_metre():
    label = through("depth_zbuffer", 2.11, 5.02)
    metres = np.expm1(label.astype(float) * math.log(2**16)) / 512
    np.testing.assert_allclose(metres.ravel(), [2.11, 5.02], atol=0.6 / 512)


def test_missing_depth_is_taskonomys_largest_value():
    assert encode("depth_euclidean", np.array([[[np.nan], [np.inf]]])).tolist() == [
        [[65535], [65535]]
    ]


def test_normals_are_centred_at_127():
    assert encode("normal", np.array([[[0.0, 1.0, -1.0]]])).tolist() == [[[127, 254, 0]]]
    np.testing.assert_allclose(
        through("normal", (0, 1, -1))[0], [-1 / 255, 253 / 255, -1], atol=1e-6
    )


def test_curvature_has_the_published_statistics():
    got = through("principal_curvature", (0, 0), (1000, -1000))
    np.testing.assert_allclose(
        got,
        [
            [(127 - 123.572) / 31.922, (127 - 120.1) / 21.658],
            [(254 - 123.572) / 31.922, (0 - 120.1) / 21.658],
        ],
        rtol=1e-5,
    )


@pytest.mark.parametrize("task", ["edge_texture", "keypoints2d", "keypoints3d"])
def test_strengths_saturate(task):
    np.testing.assert_allclose(through(task, 0, 0.5, 1, 7).ravel(), [-1, 0, 1, 1], atol=4e-3)


def test_a_straight_occlusion_edge_comes_out_at_full_strength_and_a_gaussian_away():
    line = np.zeros((41, 41, 1))
    line[:, 20] = 1
    label = normalise("edge_occlusion", encode("edge_occlusion", line))[20, :, 0]
    assert label[20] == pytest.approx(1, abs=0.01)
    assert label[24] == pytest.approx(2 * math.exp(-0.5) - 1, abs=0.01)
    assert label[0] == pytest.approx(-1, abs=0.01)


def test_unknown_task():
    for function in (encode, normalise):
        with pytest.raises(ValueError, match=r"'semseg'.*depth_zbuffer"):
            function("semseg", np.zeros((1, 1, 1)))
