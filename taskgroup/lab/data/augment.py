# mypy: untyped-calls-exclude=skimage
"""Scenes of one size, at random or not: what happens to an image happens to its labels."""

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

_IGNORE = 255  # of class numbers, where nothing is known
_OUTSIDE = (124, 116, 104)  # ImageNet's mean colour: within .01 of zero once it is normalised
_TRIES = 10  # to find a crop that is not nearly all of one class


class Window(NamedTuple):
    """The piece of a scaled image that becomes the new one.

    Attributes:
        scale: pixels of the new image per pixel of the old one.
        top: of the window in the scaled image, pixels; negative above it.
        left: likewise.
    """

    scale: float
    top: int
    left: int


class Fit:
    """The whole image in one size, as large as it fits but not enlarged; the rest is unknown.

    The image lies in the middle. For evaluation: at the paper's sizes nothing is scaled.

    Args:
        size: (H, W) of the result.
        tasks: of the labels.
    """

    def __init__(self, size: tuple[int, int], tasks: Mapping[str, Task]) -> None:
        self.size = size
        self.tasks = tasks

    def window(self, shape: tuple[int, ...]) -> Window:
        """Where an image of a shape comes to lie."""
        scale = _fitting(shape, self.size)
        inside = [round(side * scale) for side in shape[:2]]
        top, left = (-((want - have) // 2) for have, want in zip(inside, self.size, strict=True))
        return Window(scale, top, left)

    def __call__(self, scene: Scene, rng: np.random.Generator | None = None) -> Scene:
        """The scene in the size."""
        return _look(scene, self.window(scene.image.shape), self.size, self.tasks)


class Augment:
    """The augmentation of the published NYUD-v2 and PASCAL-Context runs.

    An image larger than the size is first brought down to it, so that a small size sees whole
    scenes too; at the paper's sizes none is. Then:

    - it is scaled by a factor drawn from ``scale``; depth is divided by it, as what comes closer
      by the factor looks that much larger;
    - a window of the size is cut out at random; of ten tries the first in which no class takes
      ``max_share`` of the known pixels or more, or the last. What lies outside the image is of the
      data set's mean colour, which the network sees as zero, and unknown;
    - half of the time it is mirrored, and the normals' x changes sign;
    - brightness, contrast, saturation and hue are distorted.

    Class numbers, depth and normals take the nearest stored value: between two surfaces there is
    none. Edges stay lines of one pixel without gaps: on shrinking each pixel marks where it comes
    to lie, on enlarging the nearest value is taken, and what became thicker is reduced to its
    middle.

    Args:
        size: (H, W) of the result.
        tasks: of the labels.
        scale: the smallest and the largest factor.
        max_share: of one class of ``"semseg"``, if that is among the labels.
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
        """A random piece of the scene."""
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
            # An image smaller than the window lies somewhere in it.
            top, left = (int(rng.integers(min(room, 0), max(room, 0) + 1)) for room in slack)
            window = Window(scale, top, left)
            if "semseg" not in scene.labels or self._varied(scene, window):
                break
        return window

    def _varied(self, scene: Scene, window: Window) -> bool:
        rows, columns, _ = _sources(scene.image.shape, window, self.size)
        # Every fourth pixel both ways tells the shares as well.
        classes, known = (
            _nearest(values, rows[::4], columns[::4])
            for values in (scene.labels["semseg"][..., 0], scene.masks["semseg"])
        )
        counts = np.bincount(classes[known])
        return bool(counts.sum() and counts.max() < self.max_share * counts.sum())


class Resize:
    """The whole image stretched to one size, bilinearly, its labels too; as for Taskonomy.

    A pixel is known where all that it is mixed of are.

    Args:
        size: (H, W) of the result.
        mirror: mirror half of the scenes.
    """

    def __init__(self, size: tuple[int, int], *, mirror: bool = False) -> None:
        self.size = size
        self.mirror = mirror

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The scene in the size."""
        if scene.image.shape[:2] != self.size:
            height, width = self.size
            image = Image.fromarray(scene.image).resize((width, height), Image.Resampling.BILINEAR)
            scene = Scene(
                np.asarray(image),
                {task: self._stretch(label) for task, label in scene.labels.items()},
                {
                    task: self._stretch(mask[..., None].astype(np.float32))[..., 0] > 0.999
                    for task, mask in scene.masks.items()
                },
            )
        return flip(scene) if self.mirror and rng.random() < 0.5 else scene

    def _stretch(self, label: NDArray[Any]) -> NDArray[Any]:
        channels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(label, -1, 0)))[None]
        stretched = F.interpolate(channels, self.size, mode="bilinear", align_corners=False)
        return np.moveaxis(stretched[0].numpy(), 0, -1)


def flip(scene: Scene) -> Scene:
    """The scene mirrored left to right: of the normals the x changes sign.

    Normals are centred where they are stored: Taskonomy's at 127, which is -1/255, the others at 0.
    """
    labels = {task: label[:, ::-1] for task, label in scene.labels.items()}
    for task, centre in (("normals", 0.0), ("normal", -1 / 255)):
        if task in labels:
            labels[task] = labels[task].copy()
            labels[task][..., 0] = 2 * centre - labels[task][..., 0]
    return Scene(
        scene.image[:, ::-1], labels, {task: mask[:, ::-1] for task, mask in scene.masks.items()}
    )


def distort(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Photometric distortion, as of SSD (Liu et al., ECCV 2016): each step half of the time.

    Brightness by up to 32 of 255; contrast by .5 to 1.5, before the colours or after them;
    saturation by .5 to 1.5; hue by up to 36 degrees.

    Args:
        image: [H, W, 3], uint8 RGB.
        rng: what is drawn from.
    """

    def sometimes(low: float, high: float, neutral: float) -> float:
        value = rng.uniform(low, high)  # drawn always: the steps do not depend on each other
        return value if rng.random() < 0.5 else neutral

    contrast_first = rng.random() < 0.5
    brightness = sometimes(-32, 32, 0.0)
    contrast = sometimes(0.5, 1.5, 1.0)
    saturation = sometimes(0.5, 1.5, 1.0)
    hue = sometimes(-36, 36, 0.0)
    image = _levels(image, contrast if contrast_first else 1.0, brightness)
    if saturation != 1 or hue != 0:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] += np.uint8(round(hue / 360 * 256) % 256)  # wraps around, as a hue should
        hsv[..., 1] = (hsv[..., 1] * np.float32(saturation)).clip(0, 255)
        image = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return _levels(image, 1.0 if contrast_first else contrast, 0.0)


def _levels(image: NDArray[np.uint8], times: float, plus: float) -> NDArray[np.uint8]:
    """Every value times one number plus another, by a table of the 256 there are."""
    if times == 1 and plus == 0:
        return image
    table: NDArray[np.uint8] = (np.arange(256) * times + plus).clip(0, 255).astype(np.uint8)
    return table[image]


def _fitting(shape: tuple[int, ...], size: tuple[int, int]) -> float:
    """The scale at which an image fits into a size; 1 at most."""
    return min(1.0, size[0] / shape[0], size[1] / shape[1])


def _sources(
    shape: tuple[int, ...], window: Window, size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Nearest rows and columns in the old image, and which pixels lie inside: [H], [W], [H, W]."""
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
    touch_up: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda image: image,
) -> Scene:
    """The scene as seen through a window of the size.

    Args:
        scene: all of it.
        window: what is seen.
        size: (H, W) of the result.
        tasks: of the labels.
        touch_up: what is done to the image, where there is any.
    """
    rows, columns, inside = _sources(scene.image.shape, window, size)
    labels, masks = {}, {}
    for task, label in scene.labels.items():
        masks[task] = _nearest(scene.masks[task], rows, columns) & inside
        if task == "edge":
            labels[task] = _edges(label[..., 0], window, size, inside)[..., None]
            continue
        seen = _nearest(label, rows, columns)
        if tasks[task].kind == "classes":
            seen[~masks[task]] = _IGNORE
        else:
            seen *= masks[task][..., None]
        labels[task] = seen
        if task == "human_parts" and not seen[masks[task]].any():
            masks[task][:] = False  # nobody to learn from, as in an image without people
    image = np.empty((*size, 3), dtype=np.uint8)
    image[:] = _OUTSIDE
    piece, top, left = _resample(scene.image, window, size)
    if piece.size:
        place = slice(top, top + piece.shape[0]), slice(left, left + piece.shape[1])
        image[place] = touch_up(piece)
    return Scene(image, labels, masks)


def _nearest(
    values: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[Any]:
    return values.take(rows, axis=0).take(columns, axis=1)  # four times as fast as np.ix_


def _resample(
    image: NDArray[np.uint8], window: Window, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], int, int]:
    """What the window shows of an image, bilinear, without aliasing, and where in the window."""
    height, width = image.shape[:2]
    scaled = round(height * window.scale), round(width * window.scale)
    top, left = max(window.top, 0), max(window.left, 0)
    bottom = min(window.top + size[0], scaled[0])
    right = min(window.left + size[1], scaled[1])
    place = top - window.top, left - window.left
    if window.scale == 1 or bottom <= top or right <= left:
        return image[top : max(top, bottom), left : max(left, right)], *place
    down, across = height / scaled[0], width / scaled[1]
    box = (left * across, top * down, right * across, bottom * down)
    shape = right - left, bottom - top
    piece = Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR, box=box)
    return np.asarray(piece), *place


def _edges(
    edges: NDArray[np.bool_], window: Window, size: tuple[int, int], inside: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Edges in the window, lines of one pixel as before."""
    if window.scale <= 1:
        # Each edge pixel marks where it comes to lie: sampled, a line would break.
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
