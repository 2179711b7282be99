# mypy: untyped-calls-exclude=skimage
"""The embedded data set: eleven Taskonomy tasks from one calibrated photograph.

``skimage.data.stereo_motorcycle()`` is the scene "Motorcycle" of the Middlebury 2014 stereo
benchmark (Scharstein et al., GCPR 2014): the left image and its true disparity. It is part of the
scikit-image wheel, so nothing is downloaded. The calibration turns disparity into depth, and all
eleven labels are computed from depth and colour.

It is **one scene**. A vertical band is held out; the parts left and right of it, beyond a gap, are
for training. The labels of the three views are computed separately, so that no training label
depends on the band. The held-out band is another part of the same garage: that is enough to compare
training methods, but it does not show that a network generalises to other places.

The photograph is used at half its size, 250 rows, close to the 256 of the published Taskonomy runs.
A crop of 64 pixels then shows enough context to tell the depth of a pixel.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import skimage
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.data import stereo_motorcycle
from torch import Tensor

import taskgroup as tg
from taskgroup.lab.data.cache import cache_folder
from taskgroup.lab.data.physical_labels import Bools, Camera, Floats, physical_labels
from taskgroup.lab.data.taskonomy_encoding import encode, normalise
from taskgroup.lab.vision.samples import Samples
from taskgroup.lab.vision.tasks import TASKONOMY

__all__ = ["Motorcycle", "Photo", "View", "photos", "views"]


class Photo(NamedTuple):
    """One image [H, W, 3], uint8 RGB, its camera and its depth.

    The depth is [H, W], z-buffer depth in metres, NaN where missing.
    """

    image: NDArray[np.uint8]
    depth: Floats
    camera: Camera


class View(NamedTuple):
    """One image with its eleven labels as Taskonomy stores them.

    Attributes:
        image: [H, W, 3], uint8 RGB.
        stored: {task: [H, W, C]}, uint8 or uint16, from
            :func:`~taskgroup.lab.data.taskonomy_encoding.encode`.
        valid: {task: [H, W]}, bool: where the label is known.
    """

    image: NDArray[np.uint8]
    stored: dict[str, NDArray[Any]]
    valid: dict[str, Bools]


# Calibration of the left image, from the documentation of stereo_motorcycle().
_CAMERA = Camera(994.978, 311.193, 254.877)
_BASELINE = 0.193001  # m
_DISPARITY_OFFSET = 31.086  # px: the principal points of the two cameras are this far apart

# Columns at full size, all even. The held-out band shows a bit of everything: rear wheel, seat,
# engine, bench, door, floor. A band at the right end would show a red bin and a front wheel, which
# resemble nothing in the rest: there, networks predict depth worse than a constant.
_COLUMNS = {"left": slice(0, 184), "held_out": slice(200, 360), "right": slice(376, 741)}
_TRAINING = ("left", "right")

# Channels of the stacked maps (the image, then every task), and the channel of the normals' x.
_CHANNELS = [3, *(task.channels for task in TASKONOMY.values())]
_NORMAL_X = sum(_CHANNELS[: 1 + list(TASKONOMY).index("normal")])


def views(cache: str | os.PathLike[str] | None = None) -> dict[str, View]:
    """The views of the photograph with their labels: ``"left"``, ``"held_out"`` and ``"right"``.

    Training crops come from the left and the right view. Computing the labels takes about a second;
    they are then kept in a file. The file's name has a digest of the source code and of the library
    versions behind the labels, so that a change of either computes them again. So does a file that
    cannot be read; if the folder cannot be written, the labels are computed at every call.

    Args:
        cache: Folder of the file; default ``$TASKGROUP_CACHE``, or else ``taskgroup`` in
            ``$XDG_CACHE_HOME`` or in ``~/.cache``.

    Returns:
        ``{name: View}``: 250 rows and 92, 80 and 183 columns.
    """
    taken = photos()
    stored: dict[str, NDArray[Any]] | None = None
    file = _cache_file(cache)
    if file is not None:
        stored = _read(file)
    if stored is None:
        stored = _compute(taken)
        if file is not None:
            _write(file, stored)
    return {
        view: View(
            photo.image,
            {task: stored[f"{view}/{task}"] for task in TASKONOMY},
            {task: stored[f"{view}/{task}/valid"] for task in TASKONOMY},
        )
        for view, photo in taken.items()
    }


def _half(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Take every second pixel, after a low-pass filter."""
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (0.7, 0.7, 0))
    half: NDArray[np.uint8] = np.rint(smooth[::2, ::2]).astype(np.uint8)
    return half


def photos() -> dict[str, Photo]:
    """The views of the photograph with their depth, from which :func:`views` computes labels."""
    photograph, _, disparity = stereo_motorcycle()
    known = np.isfinite(disparity)
    shifted = np.where(known, disparity, np.nan).astype(np.float64) + _DISPARITY_OFFSET
    depth = _CAMERA.focal * _BASELINE / shifted
    return {
        view: Photo(
            _half(photograph[:, columns]),
            # Depth is not averaged: a mean of two surfaces lies on neither.
            depth[::2, columns][:, ::2],
            Camera(_CAMERA.focal / 2, (_CAMERA.cx - columns.start) / 2, _CAMERA.cy / 2),
        )
        for view, columns in _COLUMNS.items()
    }


def _compute(taken: Mapping[str, Photo]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for view, photo in taken.items():
        labels, valid = physical_labels(*photo)
        for task in TASKONOMY:
            arrays[f"{view}/{task}"] = encode(task, labels[task])
            arrays[f"{view}/{task}/valid"] = valid[task]
    return arrays


def _cache_file(folder: str | os.PathLike[str] | None) -> Path | None:
    """The file that keeps the labels; None if the source code or the folder cannot be found."""
    try:
        modules = [sys.modules[part.__module__] for part in (views, physical_labels, encode)]
        recipe = [inspect.getsource(module) for module in modules]
    except OSError:  # installed without sources
        return None
    recipe += [library.__version__ for library in (np, scipy, skimage)]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()
    try:
        return Path(folder or cache_folder()) / f"motorcycle-{digest[:16]}.npz"
    except ValueError:  # there is no such folder
        return None


def _read(file: Path) -> dict[str, NDArray[Any]] | None:
    names = [f"{v}/{task}{end}" for v in _COLUMNS for task in TASKONOMY for end in ("", "/valid")]
    try:
        # Opened here, since np.load does not close a file that it cannot read.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _write(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    with suppress(OSError):  # then the labels are computed at every call
        tg.checkpoint.write_atomically(
            file, lambda stream: np.savez_compressed(stream, allow_pickle=False, **arrays)
        )


class Motorcycle:
    """Crops of the photograph: random crops to train on, fixed crops to evaluate on.

    Args:
        size: Height and width of a crop in pixels, or one number for both; at most 250 x 80.
        flip: Whether to mirror half of the random training crops, their normals included.
        cache: Folder for the computed labels, see
            :func:`~taskgroup.lab.data.motorcycle.views`.

    Raises:
        ValueError: The crop does not fit into a view.

    Example:
        >>> scene = Motorcycle(size=64)
        >>> images, labels, masks = scene.sample(8, torch.Generator().manual_seed(0))
        >>> images.shape, labels["normal"].shape, masks["normal"].shape
        (torch.Size([8, 3, 64, 64]), torch.Size([8, 3, 64, 64]), torch.Size([8, 1, 64, 64]))
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 64,
        *,
        flip: bool = True,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        height, width = self.size = (size, size) if isinstance(size, int) else size
        self.flip = flip
        maps = {name: _Maps.of(view) for name, view in views(cache).items()}
        # Mirrored in advance, so that a mirrored crop is one slice too.
        self._train = [(maps[name], maps[name].mirrored()) for name in _TRAINING]
        self._held_out = maps["held_out"]
        rows, columns = self._held_out.values.shape[1:]
        if not (0 < height <= rows and 0 < width <= columns):
            raise ValueError(f"a crop of {height} x {width} does not fit into {rows} x {columns}")

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Samples:
        """Draw random training crops, uniformly over all places left and right of the band.

        Args:
            batch: Number of crops B.
            generator: A CPU generator, the only source of randomness, so that a run can be resumed
                exactly by restoring its state. Default: torch's own.

        Returns:
            B crops, on the CPU.
        """
        return self._gather(self._draw(batch, generator, self.flip))

    def fixed_train(self, n: int) -> Samples:
        """Training crops for pictures and metrics: the same at every call, and not mirrored.

        Args:
            n: Number of crops.

        Returns:
            n crops, on the CPU.
        """
        return self._gather(self._draw(n, torch.Generator().manual_seed(0), flip=False))

    def held_out(self) -> Samples:
        """The evaluation crops: a grid over the held-out view in steps of a quarter crop or less.

        Returns:
            The crops row by row, on the CPU; there are 26 of size 64.
        """
        ys, xs = (
            np.linspace(0, whole - side, math.ceil(4 * (whole - side) / side) + 1).round().tolist()
            for whole, side in zip(self._held_out.values.shape[1:], self.size, strict=True)
        )
        return self._gather([(self._held_out, int(y), int(x)) for y in ys for x in xs])

    def _draw(
        self, n: int, generator: torch.Generator | None, flip: bool
    ) -> list[tuple[_Maps, int, int]]:
        height, width = self.size
        columns = [
            (pair, x) for pair in self._train for x in range(pair[0].values.shape[2] - width + 1)
        ]
        rows = self._held_out.values.shape[1] - height + 1
        crops = []
        places = 2 * rows * len(columns)
        for draw in torch.randint(places, (n,), generator=generator, device="cpu").tolist():
            place, mirrored = divmod(draw, 2)
            y, column = divmod(place, len(columns))
            pair, x = columns[column]
            crops.append((pair[mirrored and flip], y, x))
        return crops

    def _gather(self, crops: list[tuple[_Maps, int, int]]) -> Samples:
        h, w = self.size
        values = torch.stack([maps.values[:, y : y + h, x : x + w] for maps, y, x in crops])
        valid = torch.stack([maps.valid[:, y : y + h, x : x + w] for maps, y, x in crops])
        image, *labels = torch.split(values, _CHANNELS, dim=1)
        masks = torch.split(valid, 1, dim=1)
        return Samples(
            image,
            dict(zip(TASKONOMY, labels, strict=True)),
            dict(zip(TASKONOMY, masks, strict=True)),
        )


class _Maps(NamedTuple):
    """A view in two tensors, so that a crop is two slices.

    ``values`` are [19, H, W], float32: the image, then the labels in the order of TASKONOMY;
    ``valid`` is [11, H, W], bool.
    """

    values: Tensor
    valid: Tensor

    @classmethod
    def of(cls, view: View) -> _Maps:
        image = view.image.astype(np.float32) / np.float32(127.5) - 1
        labels = [normalise(name, view.stored[name]) for name in TASKONOMY]
        values = torch.from_numpy(np.concatenate([image, *labels], axis=-1))
        valid = torch.from_numpy(np.stack([view.valid[name] for name in TASKONOMY]))
        return cls(values.movedim(-1, 0).contiguous(), valid)

    def mirrored(self) -> _Maps:
        values = self.values.flip(-1)
        # The x of the normals changes sign about the stored 127, which is -1/255.
        values[_NORMAL_X] = -2 / 255 - values[_NORMAL_X]
        return _Maps(values, self.valid.flip(-1))
