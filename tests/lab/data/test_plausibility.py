"""Labels that are stored in another way than the layout's: named by file, not trained on."""

import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.io
from PIL import Image

from taskgroup.lab.data import DATASETS, BadSampleError
from taskgroup.lab.data.check import check
from taskgroup.lab.data.files import read_grey16

SPLIT = {"nyud-v2": "train", "pascal-context": "train", "taskonomy": "tiny/train"}
EDGE = "edge/left_1.png"
DEPTH = "depth/left_1.npy"
CLASSES = "segmentation/left_1.png"
NORMALS = "normals/left_1.png"
CONTEXT = "pascal-context/trainval/left_1.mat"
VOC = "semseg/VOC12/left_1.png"


def domain(task):
    return f"{task}/taskonomy/left/point_1_view_0_domain_{task}.png"


def stored(change):
    """Change the values of an image, an array or a LabelMap."""

    def damage(path):
        if path.suffix == ".npy":
            np.save(path, change(np.load(path)))
        elif path.suffix == ".mat":
            scipy.io.savemat(path, {"LabelMap": change(scipy.io.loadmat(path)["LabelMap"])})
        else:
            Image.fromarray(change(np.array(Image.open(path)))).save(path)

    return damage


def some(value, share=0.1):
    """Another value in the upper rows."""

    def change(values):
        values = values.copy()
        values[: round(share * len(values))] = value
        return values

    return stored(change)


def everywhere(value):
    return some(value, share=1.0)


zero_or_one = stored(lambda values: (values > 127).astype(values.dtype))
halves = stored(lambda values: values // 2)


# What cannot be: read as "stop" and "skip" have it, too.
FAULTS = [
    ("nyud-v2", EDGE, zero_or_one, "holds nothing above 1, but the layout has values up to 255"),
    ("nyud-v2", EDGE, halves, "holds nothing above 127, but an edge is stored as 255"),
    (
        "nyud-v2",
        DEPTH,
        stored(lambda metres: (1000 * metres).astype(np.uint16)),
        r"holds depths up to [\d,]+, but the layout has metres; divide it by 1000",
    ),
    ("nyud-v2", DEPTH, stored(lambda metres: 100 * metres), r"up to \d+, but .* centimetres"),
    ("nyud-v2", DEPTH, some(150), "holds depths up to 150, but the layout has metres"),
    ("nyud-v2", CLASSES, some(41), "holds the class number 41, but the layout has class . 1"),
    ("nyud-v2", CLASSES, some(255), "holds the class number 255, but .* make unknown ones 0"),
    ("nyud-v2", NORMALS, everywhere(0), "must hold unit normals, n = 2 p / 255 - 1; 100 %"),
    ("nyud-v2", NORMALS, some(255, 0.9), "must hold unit normals"),
    (
        "nyud-v2",
        NORMALS,
        stored(lambda p: (127.5 + 0.5 * (p - 127.5)).astype(np.uint8)),
        "must hold unit normals",
    ),
    ("pascal-context", "sal_distill/left_1.png", zero_or_one, "holds nothing above 1, but"),
    ("pascal-context", VOC, some(21), "class number 21, but the layout has 0 to 20, and 255"),
    ("pascal-context", CONTEXT, some(460), "holds the class number 460, but LabelMap has 459"),
    ("pascal-context", "normals_distill/left_1.png", everywhere(0), "must hold unit normals"),
    ("taskonomy", domain("edge_texture"), zero_or_one, "nothing above 1, .* values up to 65535"),
    ("taskonomy", domain("segment_unsup2d"), zero_or_one, "nothing above 1, .* values up to 255"),
    ("taskonomy", domain("normal"), everywhere(0), r"must hold unit normals, p = 127 \+ 127 n"),
]
# What cannot be read at all.
BROKEN = [
    (
        "pascal-context",
        CONTEXT,
        stored(lambda classes: np.where(classes == classes[0, 0], np.nan, classes)),
        "must hold class numbers, H x W; it holds float64",
    ),
    ("pascal-context", CONTEXT, stored(lambda x: x.astype(np.int16) - 500), "hold class numbers"),
    ("pascal-context", CONTEXT, stored(lambda x: np.stack([x, x], -1)), "must hold class numbers"),
]
RGBA = stored(lambda values: np.dstack([values] * 3 + [np.full(values.shape[:2], 255, np.uint8)]))
FOUR = "it holds four 8-bit channels"
BROKEN += [
    ("nyud-v2", "images/left_1.png", lambda p: Image.open(p).convert("RGBA").save(p), FOUR),
    ("nyud-v2", CLASSES, RGBA, FOUR),
    ("nyud-v2", EDGE, RGBA, FOUR),
    ("pascal-context", VOC, RGBA, FOUR),
    ("taskonomy", domain("segment_unsup25d"), RGBA, FOUR),
]


@pytest.fixture(scope="module")
def trees(minis, tmp_path_factory):
    """Copies of the small trees, in which one file at a time is damaged."""
    return shutil.copytree(minis, tmp_path_factory.mktemp("values") / "trees")


@contextmanager
def damaged(trees, name, file, damage):
    """A data set with a damaged file; its sample, and how a sentence on it begins."""
    path = trees / name / file
    before = path.read_bytes()
    dataset = DATASETS[name](trees / name, SPLIT[name])
    (sample,) = [s for s in dataset.ids if str(path) in str(dataset.files(s))]
    damage(path)
    try:
        yield dataset, sample, re.escape(str(path))
    finally:
        path.write_bytes(before)


def as_it_is(dataset):
    return type(dataset)(dataset.root, dataset.split, bad="keep")


@pytest.mark.parametrize(("name", "file", "damage", "said"), FAULTS + BROKEN)
def test_values_that_cannot_be(trees, name, file, damage, said):
    with damaged(trees, name, file, damage) as (dataset, sample, path):
        with pytest.raises(BadSampleError, match=f"{path} .*{said}"):
            dataset.read(sample)
        (problem,) = as_it_is(dataset).inspect(sample)
    assert re.search(f"{path} .*{said}", problem.sentence)
    assert (problem.sample, problem.usable) == (sample, False)


@pytest.mark.parametrize(("name", "file", "damage", "said"), FAULTS)
def test_to_look_at_them_they_are_read_as_they_are(trees, name, file, damage, said):
    with damaged(trees, name, file, damage) as (dataset, sample, _):
        assert list(as_it_is(dataset).read(sample).labels) == list(dataset.TASKS)


# What can be, but hardly: the sample is whole, and the check names the file.
DOUBTS = [
    ("nyud-v2", "images/left_1.png", everywhere(1), "is black: it holds no value above 1, of 255"),
    ("nyud-v2", "images/left_1.png", everywhere(90), "is of one colour"),
    ("nyud-v2", EDGE, everywhere(0), "has no edge"),
    ("nyud-v2", EDGE, stored(lambda edges: 255 - edges), r"has edges on \d\d % .* is it inverted"),
    ("nyud-v2", DEPTH, everywhere(0), "tells nothing: all of its pixels are unknown"),
    ("nyud-v2", DEPTH, everywhere(2.5), "holds one value everywhere"),
    ("nyud-v2", DEPTH, stored(lambda m: m / 1000), r"holds depths up to 0.0\d* m; are they in an"),
    ("nyud-v2", CLASSES, everywhere(0), "tells nothing"),
    ("nyud-v2", NORMALS, everywhere(128), "tells nothing"),
    ("nyud-v2", NORMALS, some(0, 0.2), r"vectors of another length than 1, \d+ % of them"),
    ("pascal-context", VOC, everywhere(255), "tells nothing"),
    ("pascal-context", CONTEXT, everywhere(9), "has no edge"),
    ("pascal-context", "normals_distill/left_1.png", everywhere(127), "tells nothing"),
    ("pascal-context", "normals_distill/left_1.png", some(0, 0.2), "of another length than 1"),
    ("taskonomy", domain("depth_zbuffer"), everywhere(65535), "tells nothing"),
    ("taskonomy", domain("depth_euclidean"), some(60000), r"holds depths up to 117 m; are they in"),
    (
        "taskonomy",
        domain("depth_zbuffer"),
        stored(lambda x: x // 4096),
        "depths up to 0.0",
    ),
    ("taskonomy", domain("edge_occlusion"), everywhere(0), "holds one value everywhere"),
    ("taskonomy", domain("segment_unsup2d"), everywhere(7), "holds one value everywhere"),
    ("taskonomy", domain("normal"), some(0, 0.2), "of another length than 1"),
    ("taskonomy", domain("rgb"), everywhere(0), "is black: it holds no value above 0"),
]


@pytest.mark.parametrize(("name", "file", "damage", "said"), DOUBTS)
def test_values_that_are_odd(trees, name, file, damage, said):
    with damaged(trees, name, file, damage) as (dataset, sample, path):
        dataset.read(sample)
        (problem,) = as_it_is(dataset).inspect(sample)
    assert re.search(f"{path} .*{said}", problem.sentence)
    assert (problem.sample, problem.usable) == (sample, True)


def test_an_image_without_people_or_surfaces_is_not_odd(trees):
    two_classes = stored(lambda x: 1 + (np.indices(x.shape)[0] > 40).astype(np.uint8))
    with damaged(trees, "pascal-context", CONTEXT, two_classes) as (dataset, sample, _):
        masks = dataset.read(sample).masks  # normals do not count on these classes
        assert not masks["normals"].any()
        assert not masks["human_parts"].any()
        assert as_it_is(dataset).inspect(sample) == []


def test_the_check_names_each_file(broken):
    root = broken("nyud-v2")
    zero_or_one(root / EDGE)
    everywhere(0)(root / "edge" / "left_2.png")
    everywhere(0)(root / "edge" / "held_out_0.png")
    train, val = check(root, workers=2)
    assert [len(checked.problems) for checked in (train, val)] == [2, 1]
    assert f"{root / EDGE} holds nothing above 1" in " ".join(train.problems)
    assert f"{root / 'edge' / 'left_2.png'} has no edge." in train.problems
    assert (train.whole, val.whole) == (8, 3)


def test_a_file_of_32_bits_is_not_wrapped_around(tmp_path):
    Image.fromarray(np.array([[70000, 3]], np.int32)).save(tmp_path / "deep.tiff")
    with pytest.raises(BadSampleError, match=r"must hold one 16-bit channel; .* from 3 to 70000"):
        read_grey16(tmp_path / "deep.tiff")
    Image.fromarray(np.array([[65535, 0]], np.int32)).save(tmp_path / "well.tiff")
    assert read_grey16(tmp_path / "well.tiff").tolist() == [[65535, 0]]
