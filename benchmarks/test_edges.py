"""The counts of the metric of edges, odsF, compared with the reference in Python.

A photograph is enlarged to the sizes of the paper, or to a quarter of their sides without --full.
The label is its thinned gradient; the prediction is a smoother gradient, one pixel off, at 99
thresholds. Both sides take one thread.
"""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.data import stereo_motorcycle
from skimage.filters import sobel
from skimage.morphology import thin

import taskgroup as tg
from taskgroup.lab.vision.boundary_matching import count_boundaries

SIZES = {"nyud-v2": ((425, 560), 0.011), "pascal-context": ((512, 512), 0.0075)}
THRESHOLDS = 99
GOAL = 10


def edges_of_a_photograph(shape, label_sigma, sigma):
    """How many thresholds each pixel reaches, uint8 [H, W], and the label, bool [H, W]."""
    grey = Image.fromarray(stereo_motorcycle()[0]).convert("L").resize(shape[::-1])
    gradient = sobel(np.asarray(grey) / 255)
    label = thin(ndimage.gaussian_filter(gradient, label_sigma) > 0.09)
    p = np.roll(ndimage.gaussian_filter(gradient, sigma), 1, axis=1)
    p = np.minimum(1.3 * p / p.max(), 1) ** 0.7
    return np.floor(p * (THRESHOLDS + 1)).clip(0, THRESHOLDS).astype(np.uint8), label


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SIZES)
def test_edges(record, name):
    shape, share = SIZES[name]
    if not record.full:  # the reference takes half a minute for a whole image
        shape = tuple(side // 4 for side in shape)
    reached, label = edges_of_a_photograph(shape, 1, 2)
    known = np.ones_like(label)
    distance = share * math.hypot(*shape)

    def count(backend):
        with tg.ops.use_backend(backend):
            return count_boundaries(reached, label, known, distance, THRESHOLDS)

    expected = count("reference")
    assert np.array_equal(count("cpp"), expected)
    least = record.least_seconds(
        {"ours": lambda: count("cpp"), "reference": lambda: count("reference")}
    )
    record.add(
        "odsF of an image",
        1,
        least["ours"],
        {"reference": least["reference"]},
        model=name,
        goals={"reference": GOAL},
    )
    record.remark(
        f"{name}: {shape[0]} x {shape[1]}, {expected[2, 0]} labelled pixels, at most "
        f"{expected[1].max()} predicted."
    )
