import os

import numpy as np
import pytest
import torch

from taskgroup.lab.data import motorcycle
from taskgroup.lab.data.motorcycle import Motorcycle
from taskgroup.lab.data.physical_labels import Camera, surface
from taskgroup.lab.data.taskonomy_encoding import normalise
from taskgroup.lab.vision import TASKONOMY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


@pytest.fixture(scope="module")
def views(folder):
    return motorcycle.views(folder)


@pytest.fixture(scope="module")
def scene(folder, views):
    return Motorcycle(64, cache=folder)


# Geometry

CAMERA = Camera(200.0, 30.0, 22.0)


def rays(shape=(48, 64), camera=CAMERA):
    v, u = np.mgrid[: shape[0], : shape[1]].astype(float)
    return np.stack([(u - camera.cx) / camera.focal, (v - camera.cy) / camera.focal, 0 * u + 1], -1)


def to_label(direction):
    """From camera coordinates (y down, z away) to those of the label."""
    return np.asarray(direction) * [1, -1, -1]


def sphere(radius, distance=2.0):
    """Depth of a sphere in front of the camera, NaN beside it, and its normals as labels."""
    q = rays()
    centre = np.array([0.0, 0.0, distance])
    a, b, c = (q * q).sum(-1), q @ centre, distance**2 - radius**2
    with np.errstate(invalid="ignore"):
        depth = (b - np.sqrt(b * b - a * c)) / a
    return depth, to_label((q * depth[..., None] - centre) / radius)


@pytest.mark.parametrize("away", [(0, 0, 1), (0.3, -0.2, 1), (0, -1, 0.6)])
def test_normals_of_a_plane_are_exact_at_any_slant(away):
    away = np.array(away) / np.linalg.norm(away)
    # A distance such that the whole plane lies in front of the camera.
    q = rays()[:20]
    depth = 1.5 / (q @ away)
    assert (depth > 0).all()
    found = surface(depth, CAMERA)
    inside = (slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(
        found.normal[inside], np.broadcast_to(to_label(-away), (8, 52, 3)), atol=1e-3
    )
    np.testing.assert_allclose(found.curvature[inside], 0, atol=0.05)


def test_sphere():
    depth, normal = sphere(radius=0.25)
    found = surface(depth, CAMERA)
    near = np.hypot(*np.mgrid[-22:26, -30:34]) < 12
    assert (np.abs(found.normal[near] - normal[near]) < 0.02).all()
    np.testing.assert_allclose(found.curvature[near], 4.0, rtol=0.05)


def test_a_hollow_curves_the_other_way():
    q = rays()
    centre, radius = np.array([0, 0, 1.0]), 1.0
    b = q @ centre
    depth = (b + np.sqrt(b * b - (q * q).sum(-1) * (1 - radius**2))) / (q * q).sum(-1)
    np.testing.assert_allclose(surface(depth, CAMERA).curvature[20:26, 27:34], -1.0, rtol=0.05)


def test_a_cylinder_has_its_larger_curvature_first():
    # Axis along y: (x Z)^2 + (Z - 2)^2 = r^2.
    x, radius = rays()[..., 0], 0.4
    with np.errstate(invalid="ignore"):
        depth = (2 - np.sqrt(4 - (1 + x * x) * (4 - radius**2))) / (1 + x * x)
    curvature = surface(depth, CAMERA).curvature[15:30, 20:41]
    np.testing.assert_allclose(curvature[..., 0], 1 / radius, rtol=0.05)
    np.testing.assert_allclose(curvature[..., 1], 0, atol=0.05)


def test_a_window_that_is_half_empty_gives_no_answer():
    normal = surface(np.full((48, 64), 3.0), CAMERA).normal
    assert np.isnan(normal[0, 0]).all()  # a quarter of a window
    np.testing.assert_allclose(normal[0, 30], [0, 0, 1], atol=1e-6)  # just above a half


def test_a_step_in_depth_does_not_bend_the_surfaces_beside_it():
    depth = np.full((48, 64), 3.0)
    depth[:, 32:] = 4.0
    found = surface(depth, CAMERA)
    known = np.isfinite(found.normal[..., 0])
    assert known[10:-10].all()
    assert np.abs(found.normal[known] - [0, 0, 1]).max() < 1e-6
    assert np.abs(found.curvature[known]).max() < 1e-6


def test_holes_have_no_answer_and_do_not_spoil_their_neighbours():
    depth = np.full((48, 64), 3.0)
    depth[20:24, 20:24] = np.nan
    normal = surface(depth, CAMERA).normal
    assert np.isnan(normal[20:24, 20:24]).all()
    np.testing.assert_allclose(normal[20, 26], [0, 0, 1], atol=1e-6)


def test_mirrored_depth_has_mirrored_normals():
    depth = sphere(radius=0.3)[0]
    mirrored = surface(depth[:, ::-1], CAMERA._replace(cx=63 - CAMERA.cx))
    expected = surface(depth, CAMERA)
    np.testing.assert_allclose(mirrored.normal[:, ::-1] * [-1, 1, 1], expected.normal, atol=1e-7)
    np.testing.assert_allclose(mirrored.curvature[:, ::-1], expected.curvature, atol=1e-4)


# The labels of the photograph


def test_depth_is_that_of_the_calibration(views):
    metres = np.concatenate(
        [v.stored["depth_zbuffer"][v.valid["depth_zbuffer"]] / 512 for v in views.values()]
    )
    assert metres.min() == pytest.approx(2.11, abs=0.02)
    assert metres.max() == pytest.approx(5.02, abs=0.02)
    for view in views.values():
        known = view.valid["depth_zbuffer"]
        z, euclidean = view.stored["depth_zbuffer"], view.stored["depth_euclidean"]
        assert (euclidean[known] >= z[known]).all()
        assert (euclidean[known] < 1.2 * z[known]).all()


def test_the_rays_of_every_view_start_at_the_one_optical_centre(views):
    for name, view in views.items():
        known = view.valid["depth_zbuffer"]
        v, u = np.nonzero(known)
        u = 2 * u + motorcycle._COLUMNS[name].start  # where the pixel lies in the photograph
        x, y = (u - 311.193) / 994.978, (2 * v - 254.877) / 994.978
        ratio = view.stored["depth_euclidean"][known] / view.stored["depth_zbuffer"][known]
        np.testing.assert_allclose(ratio[:, 0], np.sqrt(1 + x * x + y * y), atol=1.1 / 1000)


def test_normals_have_unit_length_and_face_the_camera(views):
    for view in views.values():
        normal = (view.stored["normal"][view.valid["normal"]].astype(float) - 127) / 127
        np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=0.01)
        floor = view.stored["normal"][-40:-8, 8:-8].astype(float)
        floor = np.median(floor, axis=(0, 1))
        assert floor[1] > 235  # up
        assert (view.stored["normal"][view.valid["normal"]][:, 2] > 127).mean() > 0.9


def test_every_task_has_signal_in_every_view(views):
    for view in views.values():
        for name, task in TASKONOMY.items():
            label = normalise(name, view.stored[name])
            assert label.shape == (*view.image.shape[:2], task.channels)
            assert np.isfinite(label).all()
            valid = view.valid[name]
            assert valid.mean() > 0.6, name
            assert label[valid].std() > (0.01 if name.startswith("depth") else 0.2), name


def test_colour_is_valid_everywhere_and_geometry_only_where_depth_is(views):
    for view in views.values():
        depth = view.valid["depth_zbuffer"]
        assert 0.8 < depth.mean() < 1
        for name in TASKONOMY:
            if name in ("edge_texture", "keypoints2d", "segment_unsup2d"):
                assert view.valid[name].all()
            else:
                assert not (view.valid[name] & ~depth).any(), name


def test_reshading_is_grey(views):
    reshading = views["held_out"].stored["reshading"]
    assert (reshading == reshading[..., :1]).all()


def test_training_labels_do_not_depend_on_the_held_out_band(folder, views, monkeypatch):
    photograph, right, disparity = motorcycle.stereo_motorcycle()
    # Everything that training may not see: the band and the gaps on both sides of it.
    hidden = slice(motorcycle._COLUMNS["left"].stop, motorcycle._COLUMNS["right"].start)
    photograph[:, hidden] = 255 - photograph[:, hidden]
    disparity[:, hidden] = 20
    monkeypatch.setattr(motorcycle, "stereo_motorcycle", lambda: (photograph, right, disparity))
    monkeypatch.setattr(motorcycle, "_cache_file", lambda folder: None)
    changed = motorcycle.views(folder)
    assert not np.array_equal(changed["held_out"].image, views["held_out"].image)
    assert not np.array_equal(
        changed["held_out"].stored["depth_zbuffer"], views["held_out"].stored["depth_zbuffer"]
    )
    for side in ("left", "right"):
        np.testing.assert_array_equal(changed[side].image, views[side].image)
        for name in TASKONOMY:
            np.testing.assert_array_equal(changed[side].stored[name], views[side].stored[name])
            np.testing.assert_array_equal(changed[side].valid[name], views[side].valid[name])


def test_the_band_is_apart_from_the_training_views():
    left, band, right = (motorcycle._COLUMNS[view] for view in ("left", "held_out", "right"))
    assert left.stop + 16 <= band.start
    assert band.stop + 16 <= right.start


# The cache


def never(*_):
    raise AssertionError("computed again")


def same(a, b):
    return all(
        np.array_equal(a[view].stored[t], b[view].stored[t]) for view in a for t in TASKONOMY
    )


def test_the_second_call_reads_the_file(folder, views, monkeypatch):
    assert [file.suffix for file in folder.iterdir()] == [".npz"]
    monkeypatch.setattr(motorcycle, "_compute", never)
    assert same(motorcycle.views(folder), views)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_damaged_file_is_computed_again(damage, folder, views, tmp_path, monkeypatch):
    good = next(folder.iterdir()).read_bytes()
    middle = len(good) // 2
    bad = {
        "empty": b"",
        "text": b"not an archive",
        "cut": good[:middle],
        "flipped": good[:middle]
        + bytes(255 - b for b in good[middle : middle + 64])
        + good[middle + 64 :],
    }[damage]
    file = motorcycle._cache_file(tmp_path)
    file.write_bytes(bad)
    stored = {
        f"{name}/{task}{end}": (view.valid if end else view.stored)[task]
        for name, view in views.items()
        for task in TASKONOMY
        for end in ("", "/valid")
    }
    calls = []
    monkeypatch.setattr(motorcycle, "_compute", lambda *_: calls.append(1) or stored)
    assert same(motorcycle.views(tmp_path), views)
    assert calls == [1]
    monkeypatch.setattr(motorcycle, "_compute", never)  # and the file is good again
    assert same(motorcycle.views(tmp_path), views)
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_costs_only_the_computation(views, tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    calls = []
    monkeypatch.setattr(motorcycle, "_read", lambda file: None)
    compute = motorcycle._compute
    monkeypatch.setattr(motorcycle, "_compute", lambda *a: calls.append(1) or compute(*a))
    assert same(motorcycle.views(occupied / "below"), views)
    assert calls == [1]
    assert occupied.read_text() == "in the way"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    motorcycle._write(tmp_path / "labels.npz", {"a": np.zeros(1)})
    assert not any(tmp_path.iterdir())


def test_another_recipe_has_another_file(tmp_path, monkeypatch):
    before = motorcycle._cache_file(tmp_path)
    assert before == motorcycle._cache_file(tmp_path)
    source = motorcycle.inspect.getsource
    monkeypatch.setattr(motorcycle.inspect, "getsource", lambda module: source(module) + "#")
    assert motorcycle._cache_file(tmp_path) != before


def test_the_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKGROUP_CACHE", os.fspath(tmp_path))
    assert motorcycle._cache_file(None).parent == tmp_path
    monkeypatch.delenv("TASKGROUP_CACHE")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert motorcycle._cache_file(None).parent == tmp_path / ".cache" / "taskgroup"


# Crops


def equal(a, b):
    return torch.equal(a.images, b.images) and all(
        torch.equal(a.labels[t], b.labels[t]) and torch.equal(a.masks[t], b.masks[t])
        for t in TASKONOMY
    )


def test_shapes_and_types(scene):
    images, labels, masks = scene.sample(3)
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.5
    assert 0.5 < images.max() <= 1
    assert list(labels) == list(masks) == list(TASKONOMY)
    for name, task in TASKONOMY.items():
        assert labels[name].shape == (3, task.channels, 64, 64)
        assert labels[name].dtype == torch.float32
        assert labels[name].isfinite().all()
        assert masks[name].shape == (3, 1, 64, 64)
        assert masks[name].dtype == torch.bool


def test_crops_need_not_be_square(folder):
    assert Motorcycle((48, 80), cache=folder).sample(2).images.shape == (2, 3, 48, 80)
    assert Motorcycle((250, 80), cache=folder).held_out().images.shape == (1, 3, 250, 80)


@pytest.mark.parametrize("size", [81, (251, 10), 0])
def test_crops_that_do_not_fit(size, folder):
    with pytest.raises(ValueError, match="does not fit into 250 x 80"):
        Motorcycle(size, cache=folder)


def test_a_generator_that_goes_on_draws_what_was_to_come(scene):
    generator = torch.Generator().manual_seed(3)
    scene.sample(8, generator)
    state = generator.get_state()
    torch.rand(5)  # the global generator plays no part
    expected = scene.sample(8, generator)
    other = torch.Generator()
    other.set_state(state)
    assert equal(scene.sample(8, other), expected)
    assert not equal(scene.sample(8, other), expected)


def places(samples, maps):
    """Which of the crops are found in maps, as a list of places."""
    values = torch.cat([samples.images, *samples.labels.values()], 1)
    h, w = values.shape[-2:]
    windows = maps.values.unfold(1, h, 1).unfold(2, w, 1)
    return [
        (index, y, x)
        for index, crop in enumerate(values)
        for y, x in (windows[:4, ..., 0, 0] == crop[:4, :1, :1]).all(0).nonzero().tolist()
        if torch.equal(windows[:, y, x], crop)
    ]


def test_training_crops_come_from_both_sides_in_both_orientations_and_never_from_the_band(scene):
    samples = scene.sample(64, torch.Generator().manual_seed(0))
    found = [places(samples, maps) for pair in scene._train for maps in pair]
    assert all(found)
    assert sum(map(len, found)) == 64
    assert places(samples, scene._held_out) == []


def test_without_flip_nothing_is_mirrored(folder):
    scene = Motorcycle(64, flip=False, cache=folder)
    samples = scene.sample(32, torch.Generator().manual_seed(0))
    assert sum(len(places(samples, pair[0])) for pair in scene._train) == 32


def test_a_mirrored_normal_is_what_taskonomy_would_store_for_the_mirrored_scene(scene, views):
    image, mirrored = scene._train[0]
    x = views["left"].stored["normal"][:, ::-1, 0].astype(np.int64)
    expected = (254 - x) / 127.5 - 1
    first = 3 + 1 + 1  # image and two depths come before
    np.testing.assert_allclose(mirrored.values[first], expected, atol=1e-6)
    for channel in set(range(19)) - {first}:
        assert torch.equal(mirrored.values[channel], image.values[channel].flip(-1))
    assert torch.equal(mirrored.valid, image.valid.flip(-1))


def test_held_out_crops_are_fixed_and_cover_the_band(scene):
    samples = scene.held_out()
    assert equal(samples, scene.held_out())
    found = places(samples, scene._held_out)
    assert [index for index, _, _ in found] == list(range(26))
    covered = torch.zeros(scene._held_out.values.shape[1:], dtype=torch.bool)
    for _, y, x in found:
        covered[y : y + 64, x : x + 64] = True
    assert covered.all()


def test_fixed_training_crops(scene):
    samples = scene.fixed_train(10)
    assert equal(samples, scene.fixed_train(10))
    assert sum(len(places(samples, pair[0])) for pair in scene._train) == 10
