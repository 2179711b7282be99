"""Data that is not what it should be: named by file; the rest goes on or stops."""

import shutil

import numpy as np
import pytest
import scipy.io
from PIL import Image
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.data import DATASETS, BadSampleError, all_batches
from taskgroup.lab.data.check import check, recognise
from taskgroup.lab.data.mini import write_mini

SPLIT = {"nyud-v2": "train", "pascal-context": "train", "taskonomy": "tiny/train"}


def truncate(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def to_rgb(path):
    with Image.open(path) as image:
        image.convert("RGB").save(path)


def to_grey(path):
    with Image.open(path) as image:
        image.convert("L").save(path)


def to_8_bit(path):
    with Image.open(path) as image:
        Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).save(path)


def shrink(path):
    with Image.open(path) as image:
        image.resize((60, 40)).save(path)


def put_nan(path):
    depth = np.load(path)
    depth[3, 5:7] = np.nan
    np.save(path, depth)


def put_words(path):
    np.save(path, np.array([["a", "b"]]))


def put_pickle(path):
    np.save(path, np.array([[{}]], dtype=object))


def other_variable(path):
    scipy.io.savemat(path, {"labels": np.zeros((80, 80))})


def other_structs(path):
    scipy.io.savemat(path, {"anno": np.zeros((2, 2))})


TASKONOMY = "{}/taskonomy/left/point_1_view_0_domain_{}.png"
DAMAGE = [
    ("nyud-v2", "images/left_1.png", truncate, "cannot be read: image file is truncated"),
    ("nyud-v2", "segmentation/left_1.png", truncate, "cannot be read: image file is truncated"),
    ("nyud-v2", "segmentation/left_1.png", to_rgb, "hold one 8-bit channel; it holds three 8-bit"),
    ("nyud-v2", "edge/left_1.png", shrink, "is 40 x 60, its image is 80 x 80"),
    ("nyud-v2", "normals/left_1.png", to_grey, "must hold three 8-bit channels; it holds one 8-"),
    ("nyud-v2", "depth/left_1.npy", put_nan, "holds 2 depths that are NaN or infinite; missing d"),
    ("nyud-v2", "depth/left_1.npy", truncate, "cannot be read"),
    ("nyud-v2", "depth/left_1.npy", put_words, "must hold numbers, H x W; it holds <U1 of shape"),
    ("nyud-v2", "depth/left_1.npy", put_pickle, "cannot be read: Object arrays cannot be loaded"),
    ("pascal-context", "JPEGImages/left_1.jpg", truncate, "cannot be read: image file is truncat"),
    ("pascal-context", "sal_distill/left_1.png", to_rgb, "must hold one 8-bit channel"),
    ("pascal-context", "pascal-context/trainval/left_1.mat", truncate, "cannot be read"),
    (
        "pascal-context",
        "pascal-context/trainval/left_1.mat",
        other_variable,
        "no variable LabelMap",
    ),
    ("pascal-context", "human_parts/left_2.mat", other_structs, "nested structs of PASCAL-Part"),
    ("taskonomy", TASKONOMY.format("rgb", "rgb"), truncate, "cannot be read"),
    ("taskonomy", TASKONOMY.format("normal", "normal"), to_grey, "must hold three 8-bit channels"),
    ("taskonomy", TASKONOMY.format(*["depth_zbuffer"] * 2), to_8_bit, "must hold one 16-bit chann"),
    ("taskonomy", TASKONOMY.format(*["edge_texture"] * 2), shrink, "is 40 x 60, its image is 80"),
]


def read_all(dataset):
    return sum(len(batch.images) for batch in all_batches(dataset, 2))


@pytest.mark.parametrize(("name", "file", "damage", "said"), DAMAGE)
def test_damaged_files(broken, name, file, damage, said):
    root = broken(name)
    damage(root / file)
    kind, split = DATASETS[name], SPLIT[name]
    with pytest.raises(BadSampleError) as error:
        read_all(kind(root, split))
    assert str(root / file) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=f"A sample is left out: {root / file} ") as warned:
        assert read_all(kind(root, split, bad="skip")) == 8
    assert len(warned) == 1
    found = {checked.split: checked for checked in check(root)}
    assert found[split].whole == 8
    assert found[split].listed == 9
    assert len(found[split].problems) == 1
    assert str(root / file) in found[split].problems[0]
    assert said in found[split].problems[0]
    others = [checked for other, checked in found.items() if other != split]
    assert sum(len(checked.problems) for checked in others) == 0


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nyud-v2", "depth/right_2.npy"),
        ("pascal-context", "semseg/pascal-context/left_0.png"),
        ("taskonomy", "keypoints2d/taskonomy/right/point_2_view_0_domain_keypoints2d.png"),
    ],
)
def test_missing_files(broken, name, file):
    root = broken(name)
    (root / file).unlink()
    kind, split = DATASETS[name], SPLIT[name]
    with pytest.raises(BadSampleError, match=f"{root / file} is missing; see taskgroup data check"):
        kind(root, split)
    with pytest.warns(UserWarning, match=f"leaves samples out: {root / file} is missing"):
        dataset = kind(root, split, bad="skip")
    assert read_all(dataset) == 8
    found = {checked.split: checked for checked in check(root, quick=True)}
    assert found[split].problems == [f"{root / file} is missing."]
    assert (found[split].listed, found[split].whole) == (9, 8)


def test_an_id_that_is_listed_twice(broken):
    root = broken("nyud-v2")
    lists = root / "gt_sets" / "train.txt"
    lists.write_text(lists.read_text() + "left_1\n\n")
    with pytest.raises(BadSampleError, match=r"gt_sets/train.txt lists left_1 2 times; see"):
        DATASETS["nyud-v2"](root)
    with pytest.warns(UserWarning, match="lists left_1 2 times"):
        dataset = DATASETS["nyud-v2"](root, bad="skip")
    assert dataset.ids.count("left_1") == 1
    assert len(dataset) == 9
    found = next(iter(check(root)))
    assert found.problems == [f"{lists} lists left_1 2 times."]
    assert (found.listed, found.whole) == (9, 9)


def test_a_building_that_is_not_there(broken):
    root = broken("taskonomy")
    lists = root / "splits_taskonomy" / "train_val_test_tiny.csv"
    lists.write_text(lists.read_text() + "woodbine,1,0,0\n")
    with pytest.warns(UserWarning, match=r"rgb/taskonomy/woodbine holds no image, and"):
        assert len(DATASETS["taskonomy"](root, bad="skip")) == 9
    lists.write_text("id,train\nleft,1\n")
    with pytest.raises(ValueError, match="must have the header id,train,val,test"):
        DATASETS["taskonomy"](root, "tiny/val")


def test_an_unknown_part_of_a_body(broken):
    root = broken("pascal-context")
    path = root / "human_parts" / "left_0.mat"
    annotation = scipy.io.loadmat(path)["anno"]
    annotation[0][0][1][0][1][3][0][2][0] = np.array(["tentacle"])
    scipy.io.savemat(path, {"anno": annotation})
    with pytest.raises(
        BadSampleError, match=r"left_0.mat names an unknown part of a body, 'tentacle'"
    ):
        read_all(DATASETS["pascal-context"](root))


def invoke(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("name", DATASETS)
def test_check_of_a_whole_tree(minis, name):
    assert recognise(minis / name) == name
    result = invoke("check", minis / name)
    assert result.exit_code == 0, result.output
    assert "All files are well." in result.output
    assert name in result.output
    published = {"nyud-v2": "795", "pascal-context": "4,998", "taskonomy": "tiny/train"}
    assert published[name] in result.output


def test_check_reads_in_processes_and_ends_with_1(broken):
    root = broken("taskonomy")
    bad = [root / TASKONOMY.format(task, task) for task in ("normal", "reshading")]
    truncate(bad[0])
    bad[1].unlink()
    also = root / "normal" / "taskonomy" / "band" / "point_2_view_0_domain_normal.png"
    to_grey(also)
    result = invoke("check", root, "--workers", 2)
    assert result.exit_code == 1, result.output
    for file in (bad[1], also):
        assert str(file) in result.output
    # Of a sample that lacks a file no other file is needed.
    assert "problems, listed above" in result.output
    quick = invoke("check", root, "--quick")
    assert quick.exit_code == 1
    assert "is missing" in quick.output
    assert str(also) not in quick.output


def test_check_of_something_else(tmp_path):
    result = invoke("check", tmp_path)
    assert result.exit_code == 2
    assert "holds none of the data sets: it has none of gt_sets (nyud-v2), " in result.output
    (tmp_path / "gt_sets").mkdir()
    result = invoke("check", tmp_path)
    assert result.exit_code == 1
    assert "gt_sets/train.txt cannot be read" in result.output


def test_mini_by_the_command_line(tmp_path):
    result = invoke("mini", "nyud-v2", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert f"taskgroup train nyud-v2 --data {tmp_path / 'new'}" in result.output
    assert len(list((tmp_path / "new" / "images").iterdir())) == 12
    again = invoke("mini", "nyud-v2", tmp_path / "new")
    assert again.exit_code == 2
    assert "exists and is not empty" in again.output
    other = invoke("mini", "cityscapes", tmp_path / "other")
    assert other.exit_code == 2
    assert (
        "no data set 'cityscapes'; name one of nyud-v2, pascal-context, taskonomy" in other.output
    )
    with pytest.raises(ValueError, match="is not empty"):
        write_mini("taskonomy", tmp_path / "new")


def test_check_when_nothing_is_whole(broken):
    root = broken("nyud-v2")
    shutil.rmtree(root / "depth")
    found = {checked.split: checked for checked in check(root)}
    assert [len(found[split].problems) for split in ("train", "val")] == [9, 3]
    assert [found[split].listed for split in ("train", "val")] == [9, 3]
    assert [found[split].whole for split in ("train", "val")] == [0, 0]


def test_lists_as_other_systems_write_them(broken):
    root = broken("nyud-v2")
    lists = root / "gt_sets" / "train.txt"
    lists.write_bytes(b"\xef\xbb\xbf" + lists.read_bytes().replace(b"\n", b"\r\n"))
    assert len(DATASETS["nyud-v2"](root)) == 9
    root = broken("taskonomy")
    lists = root / "splits_taskonomy" / "train_val_test_tiny.csv"
    lists.write_bytes(b"\xef\xbb\xbf" + lists.read_bytes().replace(b"\n", b"\r\n"))
    assert len(DATASETS["taskonomy"](root)) == 9
    lists.write_text(lists.read_text("utf-8-sig") + "left,1,0,0\n")
    with pytest.raises(BadSampleError, match="lists left 2 times"):
        DATASETS["taskonomy"](root)
