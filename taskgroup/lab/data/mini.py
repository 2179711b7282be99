"""Write tiny data sets in the public layouts, made of one photograph, to try recipes with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import felzenszwalb

from taskgroup.lab.data import motorcycle
from taskgroup.lab.data.pascal import PARTS, PERSON, SURFACES
from taskgroup.lab.data.physical_labels import physical_labels
from taskgroup.lab.data.taskonomy_encoding import encode
from taskgroup.lab.vision.tasks import NYUD, PASCAL, TASKONOMY

__all__ = ["MINI", "Crop", "crops", "write_mini"]

_SIDE = 80  # px, the width of the held-out band


class Crop(NamedTuple):
    """A square of the photograph with its labels, see :func:`physical_labels`.

    ``name`` is that of the view and a number. ``pieces`` [H, W] numbers the segments from 0.
    """

    name: str
    held_out: bool
    image: NDArray[np.uint8]
    labels: dict[str, NDArray[np.float64]]
    valid: dict[str, NDArray[np.bool_]]
    pieces: NDArray[np.int64]


@cache
def crops() -> tuple[Crop, ...]:
    """Cut nine squares to train on and three of the held-out band, 80 x 80 pixels."""
    made = []
    for view, photo in motorcycle.photos().items():
        labels, valid = physical_labels(*photo)
        pieces = felzenszwalb(photo.image, scale=300, sigma=0.8, min_size=150)
        height, width = photo.depth.shape
        corners = [
            (top, left)
            for top in np.linspace(0, height - _SIDE, height // _SIDE).astype(int).tolist()
            for left in np.linspace(0, width - _SIDE, width // _SIDE).astype(int).tolist()
        ]
        for number, (top, left) in enumerate(corners):
            square = slice(top, top + _SIDE), slice(left, left + _SIDE)
            made.append(
                Crop(
                    f"{view}_{number}",
                    view == "held_out",
                    photo.image[square],
                    {task: label[square] for task, label in labels.items()},
                    {task: mask[square] for task, mask in valid.items()},
                    pieces[square],
                )
            )
    return tuple(made)


def write_mini(name: str, folder: Path) -> None:
    """Write a data set of twelve small images in the public layout of a real one.

    Images, depth, normals, edges and the other labels of geometry and texture are real: they are
    crops of one photograph, see :mod:`taskgroup.lab.data.motorcycle`. **Classes, parts and saliency
    are stand-ins**: numbered segments of the image. Training on them only shows that a recipe runs.

    Raises:
        ValueError: if there is no data set of the name, or the folder is not new or empty.
    """
    if name not in MINI:
        raise ValueError(f"There is no data set {name!r}; name one of {', '.join(MINI)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder.")
    MINI[name](folder)


def _nyud(root: Path) -> None:
    for crop in crops():
        known = crop.valid["depth_zbuffer"]
        depth = np.where(known, crop.labels["depth_zbuffer"][..., 0], 0)
        classes = np.where(known, 1 + crop.pieces % NYUD["semseg"].channels, 0)  # 0: unknown
        _save(root / "images" / f"{crop.name}.png", crop.image)
        _save(root / "segmentation" / f"{crop.name}.png", classes)
        _save(root / "depth" / f"{crop.name}.npy", depth.astype(np.float32))
        _save(root / "normals" / f"{crop.name}.png", _stored_normals(crop))
        _save(root / "edge" / f"{crop.name}.png", 255 * crop.labels["edge_occlusion"][..., 0])
    _write_lists(root / "gt_sets")


def _pascal(root: Path) -> None:
    surfaces = np.array(sorted(SURFACES))
    people: dict[bool, dict[str, list[int]]] = {True: {}, False: {}}
    for number, crop in enumerate(crops()):
        depth = crop.labels["depth_zbuffer"][..., 0]
        near = crop.valid["depth_zbuffer"] & (depth < np.nanmedian(depth))
        # Every other image has a "person", the nearer half of its left half.
        person = near & (np.arange(_SIDE) < _SIDE // 2) & (number % 2 == 0)
        classes = np.where(person, PERSON, crop.pieces % (PASCAL["semseg"].channels - 1))
        classes[:2] = 255  # unknown
        # Class numbers of PASCAL-Context; normals are known on surfaces only.
        context = np.where(person, 1 + surfaces.max(), surfaces[crop.pieces % len(surfaces)])
        _save(root / "JPEGImages" / f"{crop.name}.jpg", crop.image)
        half = "VOC12" if number % 3 else "pascal-context"
        _save(root / "semseg" / half / f"{crop.name}.png", classes)
        path = root / "pascal-context" / "trainval" / f"{crop.name}.mat"
        _save_mat(path, "LabelMap", context.astype(np.uint16))
        _save(root / "normals_distill" / f"{crop.name}.png", _stored_normals(crop))
        _save(root / "sal_distill" / f"{crop.name}.png", 255 * near)
        _save_mat(root / "human_parts" / f"{crop.name}.mat", "anno", _annotation(crop, person))
        people[crop.held_out][crop.name] = [PERSON] if person.any() else []
    _write_lists(root / "ImageSets" / "Context")
    (root / "ImageSets" / "Parts").mkdir()
    for held_out, name in ((False, "train"), (True, "val")):
        text = json.dumps(people[held_out])
        (root / "ImageSets" / "Parts" / f"{name}.txt").write_text(text)


def _annotation(crop: Crop, person: NDArray[np.bool_]) -> NDArray[Any]:
    """Make the nested structs of PASCAL-Part: an image has objects, an object has parts."""
    part = np.dtype([("part_name", object), ("mask", object)])
    # The first name in PASCAL-Part of each of the six parts.
    names = [next(name for name in PARTS if PARTS[name] == k) for k in range(1, 7)]
    bands = np.array_split(np.arange(_SIDE), len(names))
    parts = np.empty((1, len(names)), dtype=part)
    for k, (name, rows) in enumerate(zip(names, bands, strict=True)):
        mask = person & np.isin(np.arange(_SIDE), rows)[:, None]
        parts[0, k] = (name, mask.astype(np.uint8))
    thing = np.dtype(
        [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
    )
    objects = np.empty((1, 2), dtype=thing)
    wheel = np.empty((1, 1), dtype=part)
    wheel[0, 0] = ("fwheel", (~person).astype(np.uint8))  # not a part of a person
    objects[0, 0] = ("motorbike", 14, (~person).astype(np.uint8), wheel)
    objects[0, 1] = ("person", PERSON, person.astype(np.uint8), parts)
    image = np.empty((1, 1), dtype=[("imname", object), ("objects", object)])
    image[0, 0] = (crop.name, objects if person.any() else objects[:, :1])
    return image


def _taskonomy(root: Path) -> None:
    roles: dict[str, str] = {}
    for crop in crops():
        building, number = crop.name.rsplit("_", 1)
        if crop.held_out:  # the top of the band is for validation, the rest for testing
            building = "bandtop" if number == "0" else "band"
        roles[building] = {"bandtop": "val", "band": "test"}.get(building, "train")
        _save(_taskonomy_file(root, "rgb", building, number), crop.image)
        for task in TASKONOMY:
            stored = encode(task, np.where(crop.valid[task][..., None], crop.labels[task], np.nan))
            if stored.shape[-1] == 2:  # curvature is stored with a third, empty channel
                stored = np.concatenate([stored, np.zeros_like(stored[..., :1])], axis=-1)
            _save(_taskonomy_file(root, task, building, number), stored)
    rows = [
        [building, *(str(int(role == column)) for column in ("train", "val", "test"))]
        for building, role in roles.items()
    ]
    text = "\n".join(",".join(row) for row in [["id", "train", "val", "test"], *rows]) + "\n"
    (root / "splits_taskonomy").mkdir()
    for subset in ("tiny", "medium", "fullplus"):
        (root / "splits_taskonomy" / f"train_val_test_{subset}.csv").write_text(text)


def _taskonomy_file(root: Path, task: str, building: str, number: str) -> Path:
    return root / task / "taskonomy" / building / f"point_{number}_view_0_domain_{task}.png"


def _stored_normals(crop: Crop) -> NDArray[np.float64]:
    known = crop.valid["normal"][..., None]
    normals: NDArray[np.float64] = 127.5 * (1 + np.where(known, crop.labels["normal"], 0))
    return normals


def _save(path: Path, values: NDArray[Any]) -> None:
    """Save integers as an image, uint16 with 16 bits and others with 8, or as an ``.npy`` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
        return
    if values.dtype != np.uint16:
        values = np.rint(values).astype(np.uint8)
    Image.fromarray(values.squeeze()).save(path, quality=95)  # PNG ignores the quality


def _save_mat(path: Path, name: str, values: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {name: values}, do_compression=True)


def _write_lists(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, held_out in (("train", False), ("val", True)):
        ids: Sequence[str] = [crop.name for crop in crops() if crop.held_out == held_out]
        (folder / f"{name}.txt").write_text("".join(f"{sample}\n" for sample in ids))


#: ``{name: writer}``
MINI: dict[str, Callable[[Path], None]] = {
    "nyud-v2": _nyud,
    "pascal-context": _pascal,
    "taskonomy": _taskonomy,
}
