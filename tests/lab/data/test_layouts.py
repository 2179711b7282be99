"""Label decoding: a small tree, written and read, gives the values it was made from."""

import math

import numpy as np
import pytest
from scipy import ndimage

from taskgroup.lab.data import NYUDv2, PASCALContext, Taskonomy
from taskgroup.lab.data.mini import crops
from taskgroup.lab.data.pascal import PARTS, SURFACES
from taskgroup.lab.vision.tasks import TASKONOMY

CROPS = {crop.name: crop for crop in crops()}


def both(kind, root, names=("train", "val")):
    for split in names:
        dataset = kind(root, split)
        for sample in dataset.ids:
            yield sample, dataset.read(sample)


def assert_normals(found, known, crop):
    where = known & crop.valid["normal"]
    np.testing.assert_allclose(np.linalg.norm(found[known], axis=-1), 1, atol=1e-6)
    # Half a step of 2/255 in each component, and then the length is made good.
    np.testing.assert_allclose(found[where], crop.labels["normal"][where], atol=0.007)


def test_nyud_round_trip(minis):
    seen = []
    for sample, (image, labels, masks) in both(NYUDv2, minis / "nyud-v2"):
        crop = CROPS[sample]
        seen.append(sample)
        assert np.array_equal(image, crop.image)
        assert np.array_equal(masks["depth"], crop.valid["depth_zbuffer"])
        depth = crop.labels["depth_zbuffer"][masks["depth"]]
        np.testing.assert_allclose(labels["depth"][masks["depth"]], depth, rtol=1e-6)
        assert np.array_equal(masks["normals"], crop.valid["normal"])
        assert_normals(labels["normals"], masks["normals"], crop)
        assert np.array_equal(masks["semseg"], crop.valid["depth_zbuffer"])
        known = masks["semseg"]
        assert np.array_equal(labels["semseg"][known][:, 0], crop.pieces[known] % 40)
        assert (labels["semseg"][~known] == 255).all()
        assert np.array_equal(labels["edge"], crop.labels["edge_occlusion"] > 0)
        assert masks["edge"].all()
    assert sorted(seen) == sorted(CROPS)


def test_pascal_round_trip(minis):
    surfaces = np.array(sorted(SURFACES))
    people = 0
    for number, (sample, (image, labels, masks)) in enumerate(
        both(PASCALContext, minis / "pascal-context")
    ):
        crop = CROPS[sample]
        assert np.abs(image.astype(int) - crop.image).mean() < 6  # JPEG
        depth = crop.labels["depth_zbuffer"]
        near = crop.valid["depth_zbuffer"][..., None] & (depth < np.nanmedian(depth))
        assert np.array_equal(labels["sal"], near)
        index = list(CROPS).index(sample)
        person = near[..., 0] & (np.arange(80) < 40) & (index % 2 == 0)
        classes = np.where(person, 15, crop.pieces % 20)
        known = np.arange(80)[:, None].repeat(80, 1) >= 2
        assert np.array_equal(masks["semseg"], known)
        assert np.array_equal(labels["semseg"][known][:, 0], classes[known])
        # Normals on the surfaces alone, of which a person's number here is none.
        assert np.array_equal(masks["normals"], crop.valid["normal"] & ~person)
        assert_normals(labels["normals"], masks["normals"], crop)
        # Edges lie where the four neighbours do not balance, and are lines.
        context = np.where(person, 1 + surfaces.max(), surfaces[crop.pieces % len(surfaces)])
        padded = np.pad(context.astype(int), 1, mode="reflect")
        around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        differs = around != 4 * context
        edges = labels["edge"][..., 0]
        assert not (edges & ~differs).any()
        assert edges.sum() < 0.7 * differs.sum()
        assert (differs & ~ndimage.binary_dilation(edges, iterations=5)).sum() == 0
        # Six parts from head to foot, in six bands of a person.
        assert masks["human_parts"].all() == person.any() == masks["human_parts"].any()
        bands = np.concatenate(
            [np.full(len(b), k + 1) for k, b in enumerate(np.array_split(np.arange(80), 6))]
        )
        assert np.array_equal(labels["human_parts"][..., 0], np.where(person, bands[:, None], 0))
        people += person.any()
    assert number + 1 == len(CROPS)
    assert 3 <= people <= 6
    assert len(SURFACES) == 170
    assert sorted(set(PARTS.values())) == [1, 2, 3, 4, 5, 6]
    assert len(PARTS) == 24


def physical(task, label):
    """Back from what a network is trained on."""
    x = label.astype(np.float64)
    if task.startswith("depth"):
        return np.expm1(x * math.log(2**16)) / 512
    if task == "normal":
        return (127.5 * (x + 1) - 127) / 127
    if task == "principal_curvature":
        return (x * [31.922, 21.658] + [123.572, 120.1] - 127) / 127 / 0.02
    return (x + 1) / 2


# Half of what the stored integers step by, and a little for float32.
STEP = {
    "depth_euclidean": 0.5 / 512,
    "depth_zbuffer": 0.5 / 512,
    "normal": 0.5 / 127,
    "principal_curvature": 0.5 / 127 / 0.02,
    "keypoints2d": 0.5 / (0.005 * 2**16),
    "keypoints3d": 0.5 / 2**16,
    "edge_texture": 0.5 / (0.08 * 2**16),
}


def test_taskonomy_round_trip(minis):
    seen = 0
    for sample, (image, labels, masks) in both(
        Taskonomy, minis / "taskonomy", ("tiny/train", "tiny/val", "tiny/test")
    ):
        building, point, view = sample.split("/")
        assert view == "0"
        crop = CROPS[
            {"bandtop": "held_out", "band": "held_out"}.get(building, building) + f"_{point}"
        ]
        seen += 1
        assert np.array_equal(image, crop.image)
        for task, label in labels.items():
            where = crop.valid[task]
            if task.startswith(("depth", "normal")):
                assert np.array_equal(masks[task], where)
            else:
                assert masks[task].all()
            if task == "edge_occlusion":
                continue  # smoothed on reading, see below
            made = crop.labels[task][where]
            made = made.clip(-50, 50) if task == "principal_curvature" else made
            made = made if task in ("normal", "principal_curvature") else made.clip(0, 128)
            found = physical(task, label)[where]
            if task == "edge_texture" or task.startswith(("keypoints", "segment", "reshading")):
                made = made.clip(0, 1)
            step = STEP.get(task, 0.5 / 255)
            np.testing.assert_allclose(found, made, atol=1.01 * step + 2e-5 * np.abs(made).max())
    assert seen == len(CROPS)
    assert set(labels) == set(TASKONOMY)


def test_taskonomy_smooths_occlusion_edges(minis):
    dataset = Taskonomy(minis / "taskonomy", "tiny/test", tasks=["edge_occlusion"])
    label = dataset.read(dataset.ids[0]).labels["edge_occlusion"][..., 0]
    crop = CROPS["held_out_1"]
    edge = np.where(crop.valid["edge_occlusion"], crop.labels["edge_occlusion"][..., 0], 0)
    smooth = ndimage.gaussian_filter(edge * math.sqrt(2 * math.pi) * 4, 4)
    np.testing.assert_allclose(label, 2 * smooth.clip(0, 1) - 1, atol=0.01)


def test_taskonomy_pairs_by_name_not_by_position(broken):
    root = broken("taskonomy")
    gone = root / "normal" / "taskonomy" / "right" / "point_2_view_0_domain_normal.png"
    gone.unlink()
    whole = Taskonomy(root, tasks=["reshading", "depth_zbuffer"])
    with pytest.warns(UserWarning, match="leaves samples out: .*right/point_2_view_0_"):
        some = Taskonomy(root, bad="skip")
    assert set(whole.ids) - set(some.ids) == {"right/2/0"}
    for sample in some.ids:
        building, point, _ = sample.split("/")
        crop = CROPS[f"{building}_{point}"]
        scene = some.read(sample)
        assert np.array_equal(scene.image, crop.image)
        where = crop.valid["normal"]
        found = physical("normal", scene.labels["normal"])[where]
        np.testing.assert_allclose(found, crop.labels["normal"][where], atol=0.004)


def test_taskonomy_without_the_folder_in_the_middle(broken):
    root = broken("taskonomy")
    with_folder = Taskonomy(root).read("left/1/0")
    for task in ("rgb", *TASKONOMY):
        middle = root / task / "taskonomy"
        for building in middle.iterdir():
            building.rename(root / task / building.name)
        middle.rmdir()
        if task == "reshading":  # which some dumps call otherwise
            for file in (root / task).rglob("*.png"):
                file.rename(file.with_name(file.name.replace("domain_reshading", "domain_reshade")))
    again = Taskonomy(root).read("left/1/0")
    assert np.array_equal(again.image, with_folder.image)
    for task in TASKONOMY:
        assert np.array_equal(again.labels[task], with_folder.labels[task])


def test_only_the_files_of_the_tasks_are_needed(broken):
    root = broken("nyud-v2")
    for file in (root / "normals").iterdir():
        file.unlink()
    dataset = NYUDv2(root, tasks=["edge", "depth"])
    assert list(dataset[0].labels) == ["edge", "depth"]
    with pytest.raises(ValueError, match=r"normals/left_0.png is missing, and 8 more like it; see"):
        NYUDv2(root)


def test_pascal_without_the_list_of_people_and_with_distilled_maps_of_another_size(broken):
    from PIL import Image

    root = broken("pascal-context")
    before = [PASCALContext(root).read(sample) for sample in ("left_0", "left_1")]
    for file in (root / "ImageSets" / "Parts").iterdir():
        file.unlink()
    for name in ("normals_distill", "sal_distill"):
        file = root / name / "left_0.png"
        with Image.open(file) as image:
            image.resize((160, 160), Image.Resampling.NEAREST).save(file)
    after = [PASCALContext(root).read(sample) for sample in ("left_0", "left_1")]
    for scene, other in zip(before, after, strict=True):
        for task in scene.labels:
            assert np.array_equal(scene.labels[task], other.labels[task])
            assert np.array_equal(scene.masks[task], other.masks[task])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "test"}, r"NYUDv2 has no split .test.; it has \[.train., .val.\]"),
        ({"tasks": ["semseg", "parts"]}, r"NYUDv2 has no task \[.parts.\]; it has \[.semseg"),
        ({"bad": "ignore"}, "bad must be 'stop', 'skip' or 'keep', got"),
    ],
)
def test_wrong_arguments(minis, options, said):
    with pytest.raises(ValueError, match=said):
        NYUDv2(minis / "nyud-v2", **options)


def test_wrong_folders(minis, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder; name the folder that holds"):
        NYUDv2(tmp_path / "nowhere")
    for kind, split in ((NYUDv2, "train"), (PASCALContext, "val"), (Taskonomy, "tiny/val")):
        with pytest.raises(ValueError, match=f"cannot be read; is {tmp_path} the right folder"):
            kind(tmp_path, split)
