"""NYUD-v2: indoor scenes with classes, depth, normals and edges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from taskgroup.vision.datasets.dense import DenseDataset, read_lines
from taskgroup.vision.datasets.files import read_depth, read_grey, read_rgb
from taskgroup.vision.tasks import NYUD, Task

__all__ = ["NYUDv2", "unit_normals"]

_FOLDERS = {
    "image": ("images", "png"),
    "semseg": ("segmentation", "png"),
    "depth": ("depth", "npy"),
    "normals": ("normals", "png"),
    "edge": ("edge", "png"),
}


class NYUDv2(DenseDataset):
    """NYUD-v2 (Silberman et al., ECCV 2012) as prepared for MTI-Net and InvPT.

    ============================  ==================================================================
    ``gt_sets/{train,val}.txt``   ids, one a line: 795 and 654
    ``images/<id>.png``           8-bit RGB
    ``segmentation/<id>.png``     8 bit: class + 1, 0 where unknown; 40 classes
    ``depth/<id>.npy``            metres, 0 where unknown
    ``normals/<id>.png``          8-bit RGB: n = 2 p / 255 - 1, unknown where that is zero, of
                                  which the stored neighbours are 127 and 128
    ``edge/<id>.png``             8 bit: 0 or 255
    ============================  ==================================================================
    """

    TASKS: ClassVar[Mapping[str, Task]] = NYUD
    SPLITS: ClassVar[Mapping[str, int | None]] = {"train": 795, "val": 654}
    ROLES: ClassVar[Mapping[str, str]] = {"train": "train", "held_out": "val"}

    def list_file(self) -> Path:
        """The file that lists the split."""
        return self.root / "gt_sets" / f"{self.split}.txt"

    def listed_ids(self) -> list[str]:
        """The ids of the split."""
        return read_lines(self.list_file(), self.root)

    def files(self, sample: str) -> dict[str, tuple[Path, ...]]:
        """``{"image" or task: files}`` of an id."""
        found: dict[str, tuple[Path, ...]] = {}
        for name in ("image", *self.tasks):
            folder, ending = _FOLDERS[name]
            found[name] = (self.root / folder / f"{sample}.{ending}",)
        return found

    def read_label(self, task: str, sample: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """A label and where it is known."""
        path = self.files(sample)[task][0]
        if task == "semseg":
            classes = read_grey(path) - np.uint8(1)  # 0 becomes 255
            return classes, classes < self.TASKS[task].channels
        if task == "depth":
            depth = read_depth(path)
            return depth, depth > 0
        if task == "normals":
            return unit_normals(read_rgb(path))
        return read_grey(path) > 127, None


def unit_normals(stored: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Stored normals as unit vectors, and where they are known.

    n = 2 p / 255 - 1, brought to unit length, which 8 bits miss by up to 0.7 %. No p gives zero:
    both 127 and 128 mean it, and a vector that short, of length 0.007, is none.

    Args:
        stored: [H, W, 3], uint8.
    """
    normals: NDArray[np.float32] = (np.arange(256, dtype=np.float32) / 127.5 - 1).take(stored)
    length = np.sqrt(np.einsum("hwc,hwc->hw", normals, normals))
    normals /= np.maximum(length, 0.01)[..., None]
    return normals, length > 0.01
