"""Taskonomy: eleven single-image tasks in real buildings."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.data.dense_dataset import DenseDataset, Finding, file_names
from taskgroup.lab.data.files import read_grey, read_grey16, read_planes, read_rgb
from taskgroup.lab.data.plausibility import (
    doubt_of_depth,
    doubt_of_normals,
    fault_of_binary,
    fault_of_normals,
)
from taskgroup.lab.data.taskonomy_encoding import normalise
from taskgroup.lab.vision.tasks import TASKONOMY, Task

__all__ = ["Taskonomy"]

_SUBSETS = ("tiny", "medium", "fullplus")
_ROLES = ("train", "val", "test")
_NAME = re.compile(r"point_(\d+)_view_(\d+)_domain_(\w+)\.png")
_COLOURED = ("normal", "reshading", "principal_curvature")
_DEPTHS = ("depth_euclidean", "depth_zbuffer")
_WIDE = (*_DEPTHS, "edge_occlusion", "edge_texture", "keypoints2d", "keypoints3d")
_NO_DEPTH = 2**16 - 1
_NORMALS = "p = 127 + 127 n"


class Taskonomy(DenseDataset):
    """Taskonomy (Zamir et al., CVPR 2018), with the folders and file names of omnidata.

    Files are ``<task>/taskonomy/<building>/point_<p>_view_<v>_domain_<domain>.png``; older dumps do
    not have the folder ``taskonomy``. The images are in ``rgb``. Buildings are listed in
    ``splits_taskonomy/train_val_test_{tiny,medium,fullplus}.csv`` with the header
    ``id,train,val,test``. ``taskgroup.lab.data.taskonomy_encoding`` describes how labels are stored
    and normalised. Depth is unknown where it is stored as 65535, a normal where it is stored as
    zero (127 or 128 three times); for other labels nothing tells where they are unknown.

    An id is ``<building>/<p>/<v>``. The samples of a split are the images of its buildings.

    The splits are ``"tiny/train"``, ``"tiny/val"``, ``"tiny/test"``, and likewise for medium and
    fullplus.
    """

    TASKS: ClassVar[Mapping[str, Task]] = TASKONOMY
    SPLITS: ClassVar[Mapping[str, int | None]] = {
        f"{subset}/{role}": None for subset in _SUBSETS for role in _ROLES
    }
    RESIZES: ClassVar[bool] = True
    LISTS: ClassVar[str] = "splits_taskonomy"
    ROLES: ClassVar[Mapping[str, str]] = {"train": "train", "validation": "val", "held_out": "test"}
    MEAN: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    STD: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)

    def list_file(self) -> Path:
        """The file that lists the buildings of the split."""
        return self.list_of(self.root, self.split)

    @classmethod
    def list_of(cls, root: Path, split: str) -> Path:
        """The file below a root that lists the buildings of a split."""
        return root / cls.LISTS / f"train_val_test_{split.split('/')[0]}.csv"

    def buildings(self) -> list[str]:
        """The buildings of the split.

        Raises:
            ValueError: if the list cannot be read.
        """
        file, role = self.list_file(), self.split.split("/")[1]
        try:
            with file.open(newline="", encoding="utf-8-sig") as opened:
                return [row["id"] for row in csv.DictReader(opened) if row[role].strip() == "1"]
        except (OSError, UnicodeDecodeError, csv.Error):
            raise ValueError(
                f"The list {file} cannot be read; is {self.root} the right folder?"
            ) from None
        except (KeyError, AttributeError):
            raise ValueError(
                f"{file} must have the header id,train,val,test, and four entries in each row."
            ) from None

    def listed_ids(self) -> list[str]:
        """The ids of all images of the split's buildings."""
        ids = []
        for building in self.buildings():
            folder = self._tops["rgb"] / building
            names = file_names(folder)
            matches = [match for name in names if (match := _NAME.fullmatch(name))]
            found = sorted((int(match[1]), int(match[2])) for match in matches)
            ids += [f"{building}/{point}/{view}" for point, view in found]
        return ids

    def problems(self, ids: Iterable[str]) -> Iterator[Finding]:
        """Find what is wrong with some ids, and buildings of the split without an image."""
        buildings = Counter(self.buildings())
        of_building: dict[str, list[str]] = {building: [] for building in buildings}
        for building, times in buildings.items():
            if times > 1:
                sentence = f"{self.list_file()} lists {building} {times} times."
                yield Finding(building, sentence, usable=True)
        for sample in dict.fromkeys(ids):
            of_building[sample.split("/")[0]].append(sample)
        for building, samples in of_building.items():
            if not samples:
                folder = self._tops["rgb"] / building
                sentence = f"{folder} holds no image, and {self.list_file()} lists the building."
                yield Finding(building, sentence, usable=False)
            for task in self.tasks:  # names, not paths, since there are millions
                folder = self._tops[task] / building
                there = frozenset(file_names(folder))
                for sample in samples:
                    name = self._name(task, sample)
                    if name not in there:
                        yield Finding(sample, f"{folder / name} is missing.", usable=False)

    def file(self, name: str, sample: str) -> Path:
        """The file of the image or of a label."""
        task = "rgb" if name == "image" else name
        return self._tops[task] / sample.split("/")[0] / self._name(task, sample)

    def read_label(self, task: str, sample: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read a normalised label and its mask."""
        path = self.file(task, sample)
        stored: NDArray[Any]
        if task in _COLOURED:
            stored = read_planes(path)[..., : TASKONOMY[task].channels]
        else:
            stored = (read_grey16(path) if task in _WIDE else read_grey(path))[..., None]
        self.refuse(fault_of_binary(path, stored, 2**16 - 1 if task in _WIDE else 255))
        known: NDArray[np.bool_] | None = None
        if task in _DEPTHS:
            known = stored[..., 0] != _NO_DEPTH
        elif task == "normal":
            # Every sixteenth vector is enough to tell.
            self.refuse(fault_of_normals(path, _vectors(stored[::4, ::4]), _NORMALS))
            known = np.any((stored < 127) | (stored > 128), axis=-1)
        return normalise(task, stored), known

    def doubt(
        self, task: str, sample: str, label: NDArray[Any], known: NDArray[np.bool_]
    ) -> str | None:
        """Return a sentence on what is unlikely about a label, or None."""
        path = self.file(task, sample)
        found = super().doubt(task, sample, label, known)
        if found is None and task in _DEPTHS:
            metres = read_grey16(path)[known] / np.float32(512)
            return doubt_of_depth(path, metres)
        if found is None and task == "normal":
            return doubt_of_normals(path, _vectors(read_rgb(path)), _NORMALS)
        return found

    def _name(self, task: str, sample: str) -> str:
        _, point, view = sample.split("/")
        return f"point_{point}_view_{view}_domain_{self._domains[task]}.png"

    @cached_property
    def _tops(self) -> dict[str, Path]:
        """The folder of each task that holds its buildings."""
        middles = {task: self.root / task / "taskonomy" for task in ("rgb", *self.tasks)}
        return {task: path if path.is_dir() else path.parent for task, path in middles.items()}

    @cached_property
    def _domains(self) -> dict[str, str]:
        """The name of each task in file names, which in older dumps is not that of the folder."""
        return {task: _domain_of(top) or task for task, top in self._tops.items()}


def _vectors(stored: NDArray[Any]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = stored.astype(np.float32) / np.float32(127) - np.float32(1)
    return vectors


def _domain_of(folder: Path) -> str | None:
    """The domain in the name of the first file below a folder; None if there is no file."""
    for building in sorted(file_names(folder)):
        for name in file_names(folder / building):
            if match := _NAME.fullmatch(name):
                return match[3]
    return None
