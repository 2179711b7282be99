"""PASCAL-Context: classes, human parts, saliency, edges and normals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from taskgroup.lab.data.dense_dataset import DenseDataset, resized
from taskgroup.lab.data.files import BadSampleError, read_grey, read_mat, read_size
from taskgroup.lab.data.nyud import NORMALS, read_vectors, unit_normals
from taskgroup.lab.data.plausibility import (
    doubt_of_normals,
    fault_of_binary,
    fault_of_classes,
    fault_of_normals,
)
from taskgroup.lab.vision.tasks import PASCAL, Task
from taskgroup.lab.vision.thinning import thin

__all__ = ["PARTS", "PERSON", "SURFACES", "PASCALContext"]

#: The class of people in ``human_parts`` and ``ImageSets/Parts``.
PERSON = 15

#: ``{part of PASCAL-Part: one of six}``: head, torso, upper and lower arms, upper and lower legs.
PARTS: dict[str, int] = {
    name: number
    for number, names in enumerate(
        (
            "head hair lear lebrow leye mouth nose rear rebrow reye",
            "torso neck",
            "luarm ruarm",
            "llarm lhand rlarm rhand",
            "luleg ruleg",
            "llleg lfoot rlleg rfoot",
        ),
        start=1,
    )
    for name in names.split()
}

#: Numbers of the PASCAL-Context classes on which distilled normals are known: the classes that are
#: also among NYUD's 894, on which the teacher was trained, and tvmonitor (db_info of ASTMT, CVPR
#: 2019).
# fmt: off
SURFACES: frozenset[int] = frozenset((
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50,
    51, 53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104,
    105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172,
    174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230,
    232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281,
    283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
    384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432,
    440, 441, 442, 443, 444, 446, 454, 457,
))
# fmt: on

_CONTEXT_CLASSES = 459
_IS_SURFACE = np.isin(np.arange(_CONTEXT_CLASSES + 2), list(SURFACES))  # the last one is not
_CLASSES = "the layout has 0 to {most}, and 255 where it is unknown"
_FOLDERS = {
    "image": ("JPEGImages", "jpg"),
    "human_parts": ("human_parts", "mat"),
    "sal": ("sal_distill", "png"),
    "edge": ("pascal-context/trainval", "mat"),
    "normals": ("normals_distill", "png"),
}


class PASCALContext(DenseDataset):
    """PASCAL-Context (Chen et al., CVPR 2014) with the labels of ASTMT (Maninis et al., CVPR 2019).

    ========================================  ======================================================
    ``ImageSets/Context/{train,val}.txt``     ids, one per line: 4,998 and 5,105
    ``JPEGImages/<id>.jpg``                   8-bit RGB
    ``semseg/VOC12/<id>.png``, else           8 bit: one of 21 classes, 255 where unknown
    ``semseg/pascal-context/<id>.png``
    ``pascal-context/trainval/<id>.mat``      ``LabelMap``: one of 459 classes. Edges are the pixels
                                              where its Laplacian is not 0, thinned
    ``normals_distill/<id>.png``              8-bit RGB: n = 2 p / 255 - 1; known on the classes in
                                              ``SURFACES``
    ``sal_distill/<id>.png``                  8 bit: salient above 127
    ``human_parts/<id>.mat``                  ``anno``: objects with masks and parts; six parts, all
                                              unknown in an image without people
    ``ImageSets/Parts/{train,val}.txt``       optional, JSON: ``{id: [classes of its objects]}``; it
                                              saves reading the parts of images without people
    ========================================  ======================================================

    A label map with the aspect ratio of its image but another size is resized by nearest pixels, as
    in the published loader.
    """

    TASKS: ClassVar[Mapping[str, Task]] = PASCAL
    SPLITS: ClassVar[Mapping[str, int | None]] = {"train": 4998, "val": 5105}
    RESIZES: ClassVar[bool] = True
    LISTS: ClassVar[str] = "ImageSets/Context"
    ROLES: ClassVar[Mapping[str, str]] = {"train": "train", "held_out": "val"}

    # The map that was read last, since edges and normals are read from the same one.
    _last_map: tuple[Path, NDArray[Any]] | None = None

    def file(self, name: str, sample: str) -> Path:
        """The file of the image or of a label."""
        if name == "semseg":
            path = self.root / "semseg" / "VOC12" / f"{sample}.png"
            return path if path.is_file() else path.parents[1] / "pascal-context" / path.name
        folder, ending = _FOLDERS[name]
        return self.root / folder / f"{sample}.{ending}"

    def files(self, sample: str) -> dict[str, tuple[Path, ...]]:
        """All files of a sample; normals are known where the map of the edges has a surface."""
        found = super().files(sample)
        if "normals" in found:
            found["normals"] += (self.file("edge", sample),)
        return found

    def read_label(self, task: str, sample: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read a label and its mask."""
        path = self.file(task, sample)
        if task == "semseg":
            classes = read_grey(path)
            most = self.TASKS[task].channels - 1
            # 255, which means unknown, wraps around to 0.
            highest = int((classes + np.uint8(1)).max(initial=0)) - 1
            self.refuse(fault_of_classes(path, highest, most, _CLASSES.format(most=most)))
            return classes, classes <= most
        if task == "human_parts":
            return self._human_parts(path, sample)
        if task == "edge":
            return _edges(self._label_map(path)), None
        if task == "sal":
            stored = read_grey(path)
            self.refuse(fault_of_binary(path, stored, 255))
            return stored > 127, None
        vectors = read_vectors(path)
        self.refuse(fault_of_normals(path, vectors[::4, ::4], NORMALS))
        normals, known = unit_normals(vectors)
        classes = self._label_map(self.file("edge", sample))
        surface = _IS_SURFACE.take(classes.astype(np.intp), mode="clip")
        normals, known = resized(normals, surface.shape), resized(known, surface.shape)
        return normals, known & surface

    def doubt(
        self, task: str, sample: str, label: NDArray[Any], known: NDArray[np.bool_]
    ) -> str | None:
        """Return a sentence on what is unlikely about a label, or None."""
        if task == "normals":  # the stored file, since the label may be unknown everywhere
            path = self.file(task, sample)
            return doubt_of_normals(path, read_vectors(path), NORMALS)
        if task == "human_parts":  # unknown in an image without people
            return None
        return super().doubt(task, sample, label, known)

    def _label_map(self, path: Path) -> NDArray[Any]:
        """Read the class numbers of PASCAL-Context, [H, W]."""
        if self._last_map is None or self._last_map[0] != path:
            self._last_map = path, read_mat(path, "LabelMap")
        classes = self._last_map[1]
        whole = classes.dtype.kind in "ui" or (
            classes.dtype.kind == "f" and bool((np.trunc(classes) == classes).all())  # not NaN
        )
        if classes.ndim != 2 or not whole or classes.min(initial=0) < 0:
            raise BadSampleError(
                f"The LabelMap of {path} must hold class numbers, H x W; it holds {classes.dtype} "
                f"of shape {classes.shape}, negative numbers or fractions."
            )
        how = f"LabelMap has {_CONTEXT_CLASSES} of them"
        self.refuse(fault_of_classes(path, int(classes.max(initial=0)), _CONTEXT_CLASSES, how))
        return classes

    @cached_property
    def _objects(self) -> dict[str, list[int]]:
        """The classes of each image's objects, as far as the optional list has them."""
        path = self.root / "ImageSets" / "Parts" / f"{self.split}.txt"
        try:
            found = json.loads(path.read_text("utf-8-sig"))
        except (OSError, ValueError):
            return {}  # the annotations hold the same information
        if not isinstance(found, dict):
            return {}
        return {sample: ids for sample, ids in found.items() if isinstance(ids, list)}

    def _human_parts(
        self, path: Path, sample: str
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        found: NDArray[np.uint8] | None = None
        if PERSON in self._objects.get(sample, [PERSON]):
            found = _parts(path)
        if found is None:
            shape = read_size(self.file("image", sample))
            return np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=bool)
        return found, None


def _parts(path: Path) -> NDArray[np.uint8] | None:
    """Read the six parts of all people, 0 elsewhere; None if no person has a part."""
    try:
        objects = read_mat(path, "anno")[0][0][1][0]
        people = [thing for thing in objects if thing[1][0][0] == PERSON and thing[3].size]
        if not people:
            return None
        parts = np.zeros(people[0][2].shape, dtype=np.uint8)
        for person in people:
            for part in person[3][0]:
                name = str(part[0][0])
                if name not in PARTS:
                    raise BadSampleError(f"{path} names an unknown part of a body, {name!r}.")
                parts[part[1].astype(bool)] = PARTS[name]
    except (IndexError, TypeError, AttributeError):
        raise BadSampleError(f"{path} does not hold the nested structs of PASCAL-Part.") from None
    return parts


def _edges(classes: NDArray[Any]) -> NDArray[np.bool_]:
    """The pixels where neighbours differ in class, thinned to lines of one pixel."""
    # The four neighbours minus four times the pixel; the image is mirrored at the border.
    laplacian = ndimage.laplace(classes.astype(np.int64), mode="mirror")
    return thin(laplacian != 0)
