"""What happens to an image happens to its labels, and geometry stays geometry."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.morphology import thin
from torch.nn import functional as F

from taskgroup.lab.data import Augment, Fit, NYUDv2, Resize, Scene, augment, motorcycle
from taskgroup.lab.data.physical_labels import surface
from taskgroup.lab.vision.tasks import NYUD, PASCAL

SHAPE = (90, 120)


def places(shape=SHAPE):
    """A scene whose every map says where a pixel was: image and depth in both directions."""
    rows, columns = np.indices(shape)
    image = np.stack([rows, columns, np.full(shape, 200)], axis=-1).astype(np.uint8)
    known = np.ones(shape, dtype=bool)
    normals = np.zeros((*shape, 3), dtype=np.float32)
    normals[..., 0] = 0.6
    normals[..., 2] = 0.8
    labels = {
        "semseg": (columns // 10)[..., None].astype(np.uint8),
        "depth": (1 + rows[..., None]).astype(np.float32),
        "normals": normals,
        "edge": (columns % 10 == 0)[..., None],
    }
    return Scene(image, labels, dict.fromkeys(labels, known))


@pytest.fixture
def undistorted(monkeypatch):
    monkeypatch.setattr(augment, "distort", lambda image, rng: image)


@pytest.mark.parametrize("seed", range(12))
def test_image_and_labels_stay_together(seed, undistorted):
    zoom = 0.5 + 0.125 * seed
    transform = Augment((64, 80), NYUD, scale=(zoom, zoom))
    scene = transform(places(), np.random.default_rng(seed))
    assert scene.image.shape == (64, 80, 3)
    known = scene.masks["depth"]
    assert (known == (scene.image[..., 2] > 150)).mean() > 0.99  # black and mean colour are not
    # Not at a border, where the image is mixed with less of its neighbours.
    inner = ndimage.binary_erosion(known, iterations=2)
    row, column = scene.image[..., 0].astype(float), scene.image[..., 1].astype(float)
    fitted = min(1, 64 / 90, 80 / 120)
    tolerance = 1.01 + 0.5 / min(1, zoom * fitted)
    depth = scene.labels["depth"][..., 0]
    assert np.abs(depth * zoom - 1 - row)[inner].max() <= tolerance
    classes = scene.labels["semseg"][..., 0].astype(float)
    assert np.abs(10 * classes + 4.5 - column)[inner].max() <= 5 + tolerance
    # What it does not know is marked so.
    assert (scene.labels["semseg"][~known] == 255).all()
    assert (depth[~known] == 0).all()
    assert not scene.labels["edge"][~known].any()
    flipped = np.polyfit(np.arange(80)[known[32]], column[32][known[32]], 1)[0] < 0
    np.testing.assert_allclose(scene.labels["normals"][known][:, 0], -0.6 if flipped else 0.6)


def test_half_are_mirrored_and_crops_move(undistorted):
    transform = Augment((40, 40), NYUD, scale=(2, 2))
    scenes = [transform(places(), np.random.default_rng(seed)) for seed in range(60)]
    mirrored = sum(bool(s.labels["normals"][20, 20, 0] < 0) for s in scenes)
    assert 18 <= mirrored <= 42
    tops = {float(s.labels["depth"][0, 0, 0]) for s in scenes}
    assert len(tops) > 15


def test_flipped_normals_are_those_of_the_flipped_depth():
    photo = motorcycle.photos()["left"]
    rows = slice(100, 160)
    depth, camera = photo.depth[rows], photo.camera._replace(cy=photo.camera.cy - 100)
    width = depth.shape[1]
    normals = surface(depth, camera).normal
    known = np.isfinite(normals[..., 0])
    label = np.where(known[..., None], normals, 0).astype(np.float32)
    scene = Scene(photo.image[rows], {"normals": label}, {"normals": known})
    flipped = augment.flip(scene)
    mirrored = camera._replace(cx=width - 1 - camera.cx)
    expected = surface(depth[:, ::-1], mirrored).normal
    both = flipped.masks["normals"] & np.isfinite(expected[..., 0])
    assert both.mean() > 0.5
    np.testing.assert_allclose(flipped.labels["normals"][both], expected[both], atol=1e-5)
    assert np.abs(label[both] - expected[both]).max() > 0.5  # an unflipped one would not do


def test_taskonomy_normals_are_mirrored_about_what_is_stored_as_zero():
    stored = np.array([[[127, 127, 254], [0, 127, 127]]], dtype=np.uint8)
    label = stored / np.float32(127.5) - 1
    scene = Scene(stored, {"normal": label}, {"normal": np.ones((1, 2), dtype=bool)})
    x = augment.flip(scene).labels["normal"][0, :, 0]
    np.testing.assert_allclose((x + 1) * 127.5, [254, 127], atol=1e-4)
    assert label[0, 1, 0] == -1  # what is given is left as it is


@pytest.mark.parametrize("zoom", [0.5, 0.7, 0.9, 1.3, 2.0])
@pytest.mark.parametrize("line", ["straight", "slanted", "curved"])
def test_edges_stay_lines_of_one_pixel(zoom, line, undistorted):
    scene = places((60, 60))
    t = np.linspace(0, 1, 400)
    rows, columns = {
        "straight": (np.full(400, 30), 5 + 50 * t),
        "slanted": (5 + 50 * t, 10 + 35 * t),
        "curved": (30 + 20 * np.sin(6 * t), 5 + 50 * t),
    }[line]
    edge = np.zeros((60, 60), dtype=bool)
    edge[rows.astype(int), columns.astype(int)] = True
    scene.labels["edge"] = thin(edge)[..., None]
    # Large enough that nothing is cut off, but so small that fitting leaves it as it is.
    found = Augment((120, 120), NYUD, scale=(zoom, zoom))(scene, np.random.default_rng(0))
    edges = found.labels["edge"][..., 0]
    pieces = ndimage.label(edges, np.ones((3, 3)))[1]
    assert pieces == 1
    blocks = edges[1:, 1:] & edges[:-1, 1:] & edges[1:, :-1] & edges[:-1, :-1]
    assert blocks.sum() <= 0.1 * edges.sum()
    assert edges.sum() == pytest.approx(zoom * scene.labels["edge"].sum(), rel=0.25)


def test_a_crop_of_nearly_one_class_is_drawn_again():
    scene = places()
    scene.labels["semseg"][:, :90] = 3  # of crops drawn once, seven in ten are nearly all of it
    shares = []
    for seed in range(40):
        found = Augment((40, 40), NYUD, scale=(1.5, 1.5))(scene, np.random.default_rng(seed))
        counts = np.bincount(found.labels["semseg"][found.masks["semseg"]].ravel())
        shares.append(counts.max() / counts.sum())
    assert np.mean(np.array(shares) > 0.76) < 0.2
    # Nothing else can be drawn: it is taken as it is.
    scene.labels["semseg"][:] = 3
    found = Augment((40, 40), NYUD)(scene, np.random.default_rng(0))
    assert set(np.unique(found.labels["semseg"])) <= {3, 255}


def test_a_crop_without_body_parts_is_unknown():
    scene = places()
    parts = np.zeros((*SHAPE, 1), dtype=np.uint8)
    parts[8:16, 8:16] = 2
    scene = Scene(scene.image, {"human_parts": parts}, {"human_parts": np.ones(SHAPE, dtype=bool)})
    seen = set()
    for seed in range(40):
        found = Augment((30, 30), PASCAL, scale=(2, 2))(scene, np.random.default_rng(seed))
        has = bool((found.labels["human_parts"] == 2).any())
        assert found.masks["human_parts"].any() == has
        seen.add(has)
    assert seen == {True, False}


def test_the_papers_sizes_scale_nothing():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (425, 560, 3), dtype=np.uint8)
    scene = places((425, 560))._replace(image=image)
    found = Fit((448, 576), NYUD)(scene)
    inside = (slice(11, 436), slice(8, 568))
    assert np.array_equal(found.image[inside], image)
    for task, label in scene.labels.items():
        assert np.array_equal(found.labels[task][inside], label)
        assert found.masks[task][inside].all()
        assert found.masks[task].sum() == 425 * 560
    # Where there is nothing the network sees zero.
    normalised = NYUDv2.normalise(torch.from_numpy(found.image).movedim(-1, 0) / 255)
    assert normalised[:, :11].abs().max() < 0.01


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (200, 90)])
def test_fit_shows_all_of_a_larger_image(size):
    found = Fit(size, NYUD)(places())
    depth, known = found.labels["depth"][..., 0], found.masks["depth"]
    scale = min(1, size[0] / 90, size[1] / 120)
    assert known.sum() == pytest.approx(90 * 120 * scale**2, rel=0.04)
    assert depth[known].min() <= 1 + 1 / scale
    assert depth[known].max() >= 90 - 1 / scale
    columns = found.image[..., 1][known]
    assert columns.min() <= 2 + 1 / scale
    assert columns.max() >= 117 - 1 / scale


def test_resize_is_bilinear_and_mixes_nothing_unknown():
    rng = np.random.default_rng(0)
    label = rng.normal(size=(64, 64, 2)).astype(np.float32)
    known = np.ones((64, 64), dtype=bool)
    known[10, 20] = False
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    scene = Scene(image, {"principal_curvature": label}, {"principal_curvature": known})
    found = Resize((32, 48))(scene, rng)
    expected = F.interpolate(
        torch.from_numpy(label).movedim(-1, 0)[None], (32, 48), mode="bilinear"
    )
    np.testing.assert_allclose(
        np.moveaxis(found.labels["principal_curvature"], -1, 0), expected[0], atol=1e-6
    )
    unknown = np.argwhere(~found.masks["principal_curvature"])
    assert len(unknown) >= 1
    assert np.abs(unknown - [5, 15]).max() <= 1
    pil = Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(found.image, np.asarray(pil))
    whole = Resize((64, 64))(scene, rng)
    assert whole.labels["principal_curvature"] is label


def test_same_seed_same_sample():
    transform = Augment((40, 40), NYUD)
    a, b, c = (transform(places(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a.image, b.image)
    assert all(np.array_equal(a.labels[task], b.labels[task]) for task in a.labels)
    assert not np.array_equal(a.image, c.image)


class Drawn:
    """A generator that gives what a test wants: no step but those named."""

    def __init__(self, *uniforms):
        self.uniforms = dict(enumerate(uniforms))
        self.calls, self.last = 0, None

    def uniform(self, low, high):
        self.last = self.uniforms.get(self.calls)
        self.calls += 1
        return low if self.last is None else self.last

    def random(self):
        return 1.0 if self.last is None else 0.0


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ((), [100, 50, 200]),
        ((20,), [120, 70, 220]),
        ((None, 1.5), [150, 75, 255]),
        ((None, None, 0.0), [200, 200, 200]),  # no saturation: grey at the value
        ((None, None, None, 36), [190, 50, 200]),  # from 260 degrees of hue to 296
    ],
)
def test_photometric_distortion_by_hand(drawn, expected):
    image = Image.new("RGB", (2, 2), (100, 50, 200))
    found = np.asarray(augment.distort(image, Drawn(*drawn)))
    # Hue and saturation are kept in 8 bits on the way.
    assert np.abs(found[0, 0].astype(int) - expected).max() <= (4 if len(drawn) > 2 else 0)
