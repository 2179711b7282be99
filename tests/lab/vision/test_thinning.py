"""Thinning in C++ agrees with scikit-image's."""

import numpy as np
import pytest
from scipy import ndimage
from skimage import morphology

import taskgroup as tg
from taskgroup.lab.vision.thinning import thin


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def backend(request):
    with tg.ops.use_backend(request.param):
        yield


def blobs(seed, shape, share):
    """Smooth regions on a share of the pixels."""
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1 + 3 * (seed % 4))
    return x > np.quantile(x, 1 - share)


def test_every_image_of_four_by_four():
    bits = np.arange(2**16)[:, None] >> np.arange(16) & 1
    tiles = np.zeros((256, 256, 5, 5), dtype=bool)  # empty rows and columns keep them apart
    tiles[..., :4, :4] = bits.reshape(256, 256, 4, 4)
    image = tiles.swapaxes(1, 2).reshape(1280, 1280)
    assert np.array_equal(thin(image), morphology.thin(image))


@pytest.mark.parametrize("width", [1, 2, 62, 63, 64, 65, 127, 128, 129, 200])
def test_widths_around_whole_words(width):
    for seed, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        for image in (blobs(seed, (90, width), share), blobs(seed, (width, 90), share)):
            given = image.copy()
            assert np.array_equal(thin(image), morphology.thin(image))
            assert np.array_equal(image, given)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (64, 64), (80, 130)])
def test_all_and_nothing(shape):
    for image in (np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)):
        assert np.array_equal(thin(image), morphology.thin(image))


def test_single_pixels_and_lines_stay():
    image = np.zeros((40, 70), dtype=bool)
    image[::4, ::4] = True
    assert np.array_equal(thin(image), image)
    line = np.zeros((40, 70), dtype=bool)
    line[20] = True
    assert np.array_equal(thin(line), line)


def test_any_layout_in_memory():
    image = blobs(3, (150, 90), 0.5)
    assert np.array_equal(thin(image.T), morphology.thin(image.T))
    assert np.array_equal(thin(image[:, ::-1]), morphology.thin(image[:, ::-1]))


def test_what_it_needs():
    assert thin(np.zeros((0, 5), dtype=bool)).shape == (0, 5)
    with pytest.raises(ValueError, match=r"image: \[H, W\] is needed, got \(2, 3, 4\)"):
        thin(np.zeros((2, 3, 4), dtype=bool))
