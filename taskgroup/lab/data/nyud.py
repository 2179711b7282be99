"""NYUD-v2: indoor scenes with classes, depth, normals and edges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.data.dense_dataset import DenseDataset
from taskgroup.lab.data.files import read_depth, read_grey, read_planes
from taskgroup.lab.data.plausibility import (
    doubt_of_depth,
    doubt_of_normals,
    fault_of_binary,
    fault_of_classes,
    fault_of_depth,
    fault_of_edges,
    fault_of_normals,
)
from taskgroup.lab.vision.tasks import NYUD, Task

__all__ = ["NORMALS", "NYUDv2", "read_vectors", "unit_normals"]

_FOLDERS = {
    "image": ("images", "png"),
    "semseg": ("segmentation", "png"),
    "depth": ("depth", "npy"),
    "normals": ("normals", "png"),
    "edge": ("edge", "png"),
}
#: The formula by which normals are stored.
NORMALS = "n = 2 p / 255 - 1"
_CLASSES = (
    "the layout has class + 1, from 1 to {most}, and 0 where it is unknown; add 1 to classes that "
    "begin with 0, and make unknown ones 0"
)


class NYUDv2(DenseDataset):
    """NYUD-v2 (Silberman et al., ECCV 2012) as prepared for MTI-Net and InvPT.

    ============================  ==================================================================
    ``gt_sets/{train,val}.txt``   ids, one per line: 795 and 654
    ``images/<id>.png``           8-bit RGB
    ``segmentation/<id>.png``     8 bit: class + 1, 0 where unknown; 40 classes
    ``depth/<id>.npy``            metres, 0 where unknown
    ``normals/<id>.png``          8-bit RGB: n = 2 p / 255 - 1; unknown where all three values are
                                  127 or 128, the neighbours of zero
    ``edge/<id>.png``             8 bit: 0 or 255
    ============================  ==================================================================
    """

    TASKS: ClassVar[Mapping[str, Task]] = NYUD
    SPLITS: ClassVar[Mapping[str, int | None]] = {"train": 795, "val": 654}
    LISTS: ClassVar[str] = "gt_sets"
    ROLES: ClassVar[Mapping[str, str]] = {"train": "train", "held_out": "val"}

    def file(self, name: str, sample: str) -> Path:
        """The file of the image or of a label."""
        folder, ending = _FOLDERS[name]
        return self.root / folder / f"{sample}.{ending}"

    def read_label(self, task: str, sample: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read a label and its mask."""
        path = self.file(task, sample)
        if task == "semseg":
            stored = read_grey(path)
            most = self.TASKS[task].channels
            how = _CLASSES.format(most=most)
            self.refuse(fault_of_classes(path, int(stored.max(initial=0)), most, how))
            return stored - np.uint8(1), stored > 0  # 0 becomes 255
        if task == "depth":
            depth = read_depth(path)
            self.refuse(fault_of_depth(path, depth))
            return depth, depth > 0
        if task == "normals":
            vectors = read_vectors(path)
            # Every sixteenth vector is enough to tell.
            self.refuse(fault_of_normals(path, vectors[::4, ::4], NORMALS))
            return unit_normals(vectors)
        stored = read_grey(path)
        self.refuse(fault_of_binary(path, stored, 255) or fault_of_edges(path, stored))
        return stored > 127, None

    def doubt(
        self, task: str, sample: str, label: NDArray[Any], known: NDArray[np.bool_]
    ) -> str | None:
        """Return a sentence on what is unlikely about a label, or None."""
        path = self.file(task, sample)
        found = super().doubt(task, sample, label, known)
        if found is None and task == "depth":
            return doubt_of_depth(path, label[known])
        if found is None and task == "normals":
            return doubt_of_normals(path, read_vectors(path), NORMALS)
        return found


def read_vectors(path: Path) -> NDArray[np.float32]:
    """Read stored normals [H, W, 3], n = 2 p / 255 - 1, without bringing them to unit length."""
    vectors = read_planes(path).astype(np.float32)
    vectors /= np.float32(127.5)
    vectors -= 1
    return vectors


def unit_normals(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Normalise vectors [H, W, 3] in place, and return them with their mask [H, W].

    Rounding to 8 bits changes the length by up to 0.7 %. No stored value gives exactly zero: 127
    and 128 both stand for it, so a vector of length 0.007 is an unknown normal.
    """
    length = np.sqrt(np.einsum("hwc,hwc->hw", vectors, vectors))
    vectors /= np.maximum(length, 0.01)[..., None]
    return vectors, length > 0.01
