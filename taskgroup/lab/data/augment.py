# mypy: untyped-calls-exclude=skimage
"""Bring scenes to one size, with random augmentation or without; labels follow their image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.morphology import skeletonize
from torch.nn import functional as F

from taskgroup.lab.data.dense_dataset import Scene
from taskgroup.lab.vision.tasks import Task

__all__ = ["Augment", "Fit", "Resize", "flip"]

_IGNORE = 255  # the class number of unknown pixels
_OUTSIDE = (124, 116, 104)  # ImageNet's mean colour, which is normalised to within .01 of zero
_TRIES = 10  # attempts to find a crop that does not consist mostly of one class


class Window(NamedTuple):
    """The part of a scaled image that becomes the new image.

    Attributes:
        scale: pixels of the new image per pixel of the old one.
        top: first row of the window in the scaled image; negative if the window begins above it.
        left: first column, likewise.
    """

    scale: float
    top: int
    left: int


class Fit:
    """Fit the whole image into one size; what it does not cover is unknown.

    The image is scaled down if it is too large, but never up, and centred. This is the transform
    for evaluation. At the paper's sizes no image is scaled.

    Args:
        size: (H, W) of the result.
        tasks: the tasks of the labels.
    """

    def __init__(self, size: tuple[int, int], tasks: Mapping[str, Task]) -> None:
        self.size = size
        self.tasks = tasks

    def window(self, shape: tuple[int, ...]) -> Window:
        """The window for an image of a shape."""
        scale = _fitting(shape, self.size)
        inside = [round(side * scale) for side in shape[:2]]
        top, left = (-((want - have) // 2) for have, want in zip(inside, self.size, strict=True))
        return Window(scale, top, left)

    def __call__(self, scene: Scene, rng: np.random.Generator | None = None) -> Scene:
        """Bring the scene to the size."""
        return _look(scene, self.window(scene.image.shape), self.size, self.tasks)


class Augment:
    """The augmentation of the published NYUD-v2 and PASCAL-Context runs.

    An image larger than the size is first scaled down to it, so that a small size shows whole
    scenes too; at the paper's sizes no image is. Then:

    - The image is scaled by a factor drawn from ``scale``. Depth is divided by the factor, since
      objects look larger by the factor when they are closer by it.
    - A window of the size is cut out at random: of ten attempts, the first in which every class
      has less than ``max_share`` of the known pixels, or else the last. Pixels outside the image
      are unknown and take the mean colour of ImageNet, which is zero for the network.
    - With probability 1/2 the image is mirrored, and the x of the normals changes sign.
    - Brightness, contrast, saturation and hue are distorted.

    Class numbers, depth and normals take the nearest stored value, since a mean of two surfaces
    lies on neither. Edges stay lines of one pixel without gaps: when the image shrinks, each edge
    pixel marks the pixel that it moves to; when it grows, the nearest value is taken, and the
    thicker lines are thinned to their middle.

    Args:
        size: (H, W) of the result.
        tasks: the tasks of the labels.
        scale: the smallest and the largest factor.
        max_share: the largest share of a class of ``"semseg"``, if that is among the labels.
    """

    def __init__(
        self,
        size: tuple[int, int],
        tasks: Mapping[str, Task],
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
    ) -> None:
        self.size = size
        self.tasks = tasks
        self.scale = scale
        self.max_share = max_share

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Cut a random piece out of the scene."""
        zoom = rng.uniform(*self.scale)
        window = self._window(scene, zoom, rng)
        touch_up = partial(distort, rng=rng)
        piece = _look(scene, window, self.size, self.tasks, touch_up)
        for task, label in piece.labels.items():
            if task.startswith("depth"):
                label /= zoom
        return flip(piece) if rng.random() < 0.5 else piece

    def _window(self, scene: Scene, zoom: float, rng: np.random.Generator) -> Window:
        scale = zoom * _fitting(scene.image.shape, self.size)
        slack = [
            round(have * scale) - want
            for have, want in zip(scene.image.shape[:2], self.size, strict=True)
        ]
        window = Window(scale, 0, 0)
        for _ in range(_TRIES):
            # An image that is smaller than the window gets a random place in it.
            top, left = (int(rng.integers(min(room, 0), max(room, 0) + 1)) for room in slack)
            window = Window(scale, top, left)
            if "semseg" not in scene.labels or self._varied(scene, window):
                break
        return window

    def _varied(self, scene: Scene, window: Window) -> bool:
        rows, columns, _ = _sources(scene.image.shape, window, self.size)
        # Every fourth row and column is enough to estimate the shares.
        classes, known = (
            _nearest(values, rows[::4], columns[::4])
            for values in (scene.labels["semseg"][..., 0], scene.masks["semseg"])
        )
        counts = np.bincount(classes[known])
        return bool(counts.sum() and counts.max() < self.max_share * counts.sum())


class Resize:
    """Stretch the whole image and its labels to one size, bilinearly, as is done for Taskonomy.

    A pixel is known if all pixels from which it is interpolated are known.

    Args:
        size: (H, W) of the result.
        mirror: whether to mirror half of the scenes, at random.
    """

    def __init__(self, size: tuple[int, int], *, mirror: bool = False) -> None:
        self.size = size
        self.mirror = mirror

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Bring the scene to the size."""
        if scene.image.shape[:2] != self.size:
            height, width = self.size
            image = Image.fromarray(scene.image).resize((width, height), Image.Resampling.BILINEAR)
            scene = Scene(
                np.asarray(image),
                {task: self._stretch(label) for task, label in scene.labels.items()},
                {task: self._stretch_mask(mask) for task, mask in scene.masks.items()},
            )
        return flip(scene) if self.mirror and rng.random() < 0.5 else scene

    def _stretch_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if mask.all():
            return np.ones(self.size, dtype=bool)
        known: NDArray[np.bool_] = self._stretch(mask[..., None].astype(np.float32))[..., 0] > 0.999
        return known

    def _stretch(self, label: NDArray[Any]) -> NDArray[Any]:
        # As images of one channel, for which torch is several times as fast as for channels.
        images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(label, -1, 0)))[:, None]
        stretched = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        return np.moveaxis(stretched[:, 0].numpy(), 0, -1)


def flip(scene: Scene) -> Scene:
    """Mirror the scene left to right; the x of the normals changes sign.

    The sign changes about the stored zero: -1/255 (stored as 127) for Taskonomy, 0 for the others.
    """
    labels = {task: label[:, ::-1] for task, label in scene.labels.items()}
    for task, centre in (("normals", 0.0), ("normal", -1 / 255)):
        if task in labels:
            labels[task] = np.copy(labels[task])  # in the order in which it lies in memory
            labels[task][..., 0] = 2 * centre - labels[task][..., 0]
    return Scene(
        scene.image[:, ::-1], labels, {task: mask[:, ::-1] for task, mask in scene.masks.items()}
    )


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Photometric distortion of SSD (Liu et al., ECCV 2016); each step has probability 1/2.

    Brightness changes by up to 32 of 255; contrast by a factor of .5 to 1.5, before or after the
    colours; saturation by a factor of .5 to 1.5; hue by up to 36 degrees.
    """

    def sometimes(low: float, high: float, neutral: float) -> float:
        value = rng.uniform(low, high)  # always drawn, so that the steps are independent
        return value if rng.random() < 0.5 else neutral

    contrast_first = rng.random() < 0.5
    brightness = sometimes(-32, 32, 0.0)
    contrast = sometimes(0.5, 1.5, 1.0)
    saturation = sometimes(0.5, 1.5, 1.0)
    hue = sometimes(-36, 36, 0.0)
    levels = np.arange(256)
    image = _look_up(image, levels * (contrast if contrast_first else 1.0) + brightness)
    if saturation != 1 or hue != 0:
        turned = (levels + round(hue / 360 * 256)) % 256  # wraps around, as a hue should
        scaled = levels.astype(np.float32) * np.float32(saturation)
        image = _look_up(image.convert("HSV"), turned, scaled, levels).convert("RGB")
    return _look_up(image, levels * (1.0 if contrast_first else contrast))


def _look_up(image: Image.Image, *tables: NDArray[Any]) -> Image.Image:
    """Replace the 256 values of each of three channels, clipped to 8 bits; one table does for all.

    Pillow does it in a fifth of the time of indexing with NumPy.
    """
    rounded = [bytes(table.clip(0, 255).astype(np.uint8)) for table in tables]
    if all(table == bytes(range(256)) for table in rounded):
        return image
    return image.point(b"".join(rounded) * (3 // len(tables)))


def _fitting(shape: tuple[int, ...], size: tuple[int, int]) -> float:
    """The scale at which an image fits into a size, at most 1."""
    return min(1.0, size[0] / shape[0], size[1] / shape[1])


def _sources(
    shape: tuple[int, ...], window: Window, size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Nearest rows [H] and columns [W] in the old image, and which pixels [H, W] lie inside it."""
    sources, inside = [], []
    for side, start, length in zip(shape[:2], (window.top, window.left), size, strict=True):
        at = np.arange(start, start + length)
        inside.append((at >= 0) & (at < round(side * window.scale)))
        sources.append(np.floor((at + 0.5) / window.scale).astype(np.int64).clip(0, side - 1))
    return sources[0], sources[1], inside[0][:, None] & inside[1]


def _look(
    scene: Scene,
    window: Window,
    size: tuple[int, int],
    tasks: Mapping[str, Task],
    touch_up: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> Scene:
    """Cut a window of a size out of a scaled scene; ``touch_up`` changes the image in it."""
    rows, columns, inside = _sources(scene.image.shape, window, size)
    labels, masks = {}, {}
    for task, label in scene.labels.items():
        masks[task] = _nearest(scene.masks[task], rows, columns) & inside
        if task == "edge":
            labels[task] = _edges(label[..., 0], window, size, inside)[..., None]
            continue
        seen = _nearest(label, rows, columns)
        if tasks[task].kind == "classes":
            np.copyto(seen, _IGNORE, where=~masks[task][..., None])
        else:
            seen *= masks[task][..., None]
        labels[task] = seen
        if task == "human_parts" and not seen[masks[task]].any():
            masks[task][:] = False  # no people, as in an image without parts
    image = Image.new("RGB", size[::-1], _OUTSIDE)
    piece, place = _resample(scene.image, window, size)
    if piece is not None:
        image.paste(touch_up(piece), place)
    return Scene(np.array(image), labels, masks)


def _nearest(
    values: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[Any]:
    """The nearest of the values [H, W] or [H, W, C]; each channel is contiguous, as in torch."""
    if values.ndim == 3:
        planes = [_nearest(values[..., c], rows, columns) for c in range(values.shape[2])]
        return np.moveaxis(np.stack(planes), 0, -1)
    return values.take(rows, axis=0).take(columns, axis=1)  # four times as fast as np.ix_


def _resample(
    image: NDArray[np.uint8], window: Window, size: tuple[int, int]
) -> tuple[Image.Image | None, tuple[int, int]]:
    """The part of the window that shows the image, bilinear with antialiasing.

    Also its place in the window, from the left and from the top. None if the window shows nothing.
    """
    height, width = image.shape[:2]
    scaled = round(height * window.scale), round(width * window.scale)
    top, left = max(window.top, 0), max(window.left, 0)
    bottom = min(window.top + size[0], scaled[0])
    right = min(window.left + size[1], scaled[1])
    place = left - window.left, top - window.top
    if bottom <= top or right <= left:
        return None, place
    if window.scale == 1:
        return Image.fromarray(image[top:bottom, left:right]), place
    down, across = height / scaled[0], width / scaled[1]
    box = (left * across, top * down, right * across, bottom * down)
    shape = right - left, bottom - top
    return Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR, box=box), place


def _edges(
    edges: NDArray[np.bool_], window: Window, size: tuple[int, int], inside: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The edges in the window, still lines of one pixel."""
    if window.scale <= 1:
        # Each edge pixel marks the pixel that it moves to, since sampling would break lines.
        at = [
            np.floor((where + 0.5) * window.scale).astype(np.int64) - start
            for where, start in zip(np.nonzero(edges), (window.top, window.left), strict=True)
        ]
        kept = np.logical_and.reduce([(a >= 0) & (a < n) for a, n in zip(at, size, strict=True)])
        found = np.zeros(size, dtype=bool)
        found[at[0][kept], at[1][kept]] = True
    else:
        rows, columns, _ = _sources(edges.shape, window, size)
        found = _nearest(edges, rows, columns)
    found &= inside
    return found if window.scale == 1 else skeletonize(found)
