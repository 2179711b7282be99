# mypy: untyped-calls-exclude=skimage
"""The embedded data set: eleven Taskonomy tasks from one calibrated photograph.

``skimage.data.stereo_motorcycle()`` is the scene "Motorcycle" of the Middlebury 2014 stereo
benchmark (Scharstein et al., GCPR 2014): the left image and its true disparity. It ships inside the
scikit-image wheel, nothing is downloaded. The calibration makes the disparity a depth, and from
depth and colour every one of the eleven labels follows.

It is **one scene**. A vertical band is held out; what lies left and right of it, across a gap, is
trained on. The labels of the three views are computed apart, so nothing of the band enters a
training label. Held-out here means another part of the same garage: enough to compare ways of
training, not to claim that a network generalises to other places.

The photograph is used at half its size, 250 rows, close to the 256 of the published Taskonomy runs:
a crop of 64 pixels then shows enough around a pixel to tell its depth.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import skimage
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, feature, filters, segmentation
from skimage.data import stereo_motorcycle
from torch import Tensor

from taskgroup.lab.data.samples import Samples
from taskgroup.lab.vision import encoding
from taskgroup.lab.vision.encoding import encode, normalise
from taskgroup.lab.vision.tasks import TASKONOMY

__all__ = [
    "Camera",
    "Motorcycle",
    "Photo",
    "View",
    "photos",
    "physical_labels",
    "surface",
    "views",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Camera(NamedTuple):
    """A pinhole camera; all three in pixels, the origin at the centre of the upper left pixel."""

    focal: float
    cx: float
    cy: float


class Photo(NamedTuple):
    """One image with its depth.

    Attributes:
        image: [H, W, 3], uint8 RGB.
        depth: [H, W], z-buffer depth in metres, NaN where missing.
        camera: of this image.
    """

    image: NDArray[np.uint8]
    depth: Floats
    camera: Camera


class View(NamedTuple):
    """One image with its eleven labels as Taskonomy stores them.

    Attributes:
        image: [H, W, 3], uint8 RGB.
        stored: {task: [H, W, C]}, uint8 or uint16, from
            :func:`~taskgroup.lab.vision.encoding.encode`.
        valid: {task: [H, W]}, bool: where the label is known.
    """

    image: NDArray[np.uint8]
    stored: dict[str, NDArray[Any]]
    valid: dict[str, Bools]


# Calibration of the left image, as the documentation of stereo_motorcycle() gives it.
_CAMERA = Camera(994.978, 311.193, 254.877)
_BASELINE = 0.193001  # m
_DISPARITY_OFFSET = 31.086  # px: the principal points of the two cameras are this far apart

# Columns at full size, all even. The held-out band has a bit of everything: rear wheel, seat,
# engine, bench, door, floor. At the right end of the photograph it would hold a red bin and a front
# wheel that nothing else prepares for: networks do worse there on depth than a constant.
_COLUMNS = {"left": slice(0, 184), "held_out": slice(200, 360), "right": slice(376, 741)}
_TRAINING = ("left", "right")

_RADIUS = 5  # px, of the surface fit
_DEPTH_TOLERANCE = 0.02  # neighbours that differ more in depth (relative) belong to other surfaces
_MIN_SUPPORT = 0.5  # of the window's weight; below it a fit is not trusted
_CORNER_SIGMA = 2.5  # px

# Of the stacked maps: the image, then every task. And where the normals' x lies.
_CHANNELS = [3, *(task.channels for task in TASKONOMY.values())]
_NORMAL_X = sum(_CHANNELS[: 1 + list(TASKONOMY).index("normal")])


class Surface(NamedTuple):
    """What :func:`surface` finds at every pixel.

    Attributes:
        normal: [H, W, 3], unit vectors facing the camera: x to the right, y up, z towards the
            camera. NaN where unknown.
        curvature: [H, W, 2], 1/m, the larger one first, positive where the surface bulges towards
            the camera (a sphere of radius r: 1/r both). NaN where unknown.
    """

    normal: Floats
    curvature: Floats


def surface(depth: Floats, camera: Camera) -> Surface:
    r"""Normals and principal curvatures of a depth map.

    Around each pixel the inverse depth w = 1/Z is fitted by a quadratic. On a plane w is exactly
    linear in the pixel, so planes are found without bias at any slant. Neighbours weigh less with
    distance (Gaussian, half the radius of 5 px) and with the difference in w (Gaussian, 2 %), so
    that a fit does not reach across a depth discontinuity; missing pixels weigh nothing, and where
    less than half of the window's weight is left there is no answer.

    With normalised coordinates q = (x, y, 1) the surface is P = q / w and

    .. math::
        n \propto (w_x, w_y, w - x w_x - y w_y), \qquad
        \mathrm{II} = -\frac{1}{w |n|}
            \begin{pmatrix} w_{xx} & w_{xy} \\ w_{xy} & w_{yy} \end{pmatrix},

    and the principal curvatures are the eigenvalues of :math:`\mathrm{I}^{-1} \mathrm{II}`, with
    the first fundamental form I of P.

    Args:
        depth: [H, W], z-buffer depth in metres, NaN where missing.
        camera: The camera of this image.

    Returns:
        The :class:`Surface`.

    Example:
        >>> wall = surface(np.full((20, 20), 3.0), Camera(100.0, 9.5, 9.5))
        >>> np.allclose(wall.normal[10, 10], [0, 0, 1])
        True
    """
    w, wx, wy, wxx, wxy, wyy = _inverse_depth_fit(1 / depth, camera.focal)
    height, width = depth.shape
    x = np.broadcast_to((np.arange(width) - camera.cx) / camera.focal, depth.shape)
    y = np.broadcast_to((np.arange(height)[:, None] - camera.cy) / camera.focal, depth.shape)

    away = np.stack([wx, wy, w - x * wx - y * wy], axis=-1)
    length = np.linalg.norm(away, axis=-1)

    q = np.stack([x, y, np.ones_like(x)], axis=-1)
    px = (np.array([1.0, 0.0, 0.0]) - q * (wx / w)[..., None]) / w[..., None]
    py = (np.array([0.0, 1.0, 0.0]) - q * (wy / w)[..., None]) / w[..., None]
    e, f, g = (px * px).sum(-1), (px * py).sum(-1), (py * py).sum(-1)
    l, m, n = (-second / (w * length) for second in (wxx, wxy, wyy))  # noqa: E741
    area = e * g - f * f
    mean = (e * n - 2 * f * m + g * l) / (2 * area)
    gaussian = (l * n - m * m) / area
    spread = np.sqrt(np.maximum(mean * mean - gaussian, 0))

    # Camera coordinates have y down and z away; the label faces the camera with y up.
    normal = away / length[..., None] * np.array([-1.0, 1.0, 1.0])
    return Surface(normal, np.stack([mean + spread, mean - spread], axis=-1))


def _inverse_depth_fit(w: Floats, focal: float) -> Floats:
    """Value, first and second derivatives of w along x, y: [6, H, W], NaN where unknown."""
    steps = np.arange(-_RADIUS, _RADIUS + 1)
    disc = np.hypot(*np.meshgrid(steps, steps)) <= _RADIUS
    # Offsets in units of the radius keep the normal equations well scaled.
    v, u = (grid[disc] / _RADIUS for grid in np.meshgrid(steps, steps, indexing="ij"))
    basis = np.stack([np.ones_like(u), u, v, u * u / 2, u * v, v * v / 2], axis=-1)  # [N, 6]
    products = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), 36)
    gauss = np.exp(-2 * (u * u + v * v))
    ridge = 1e-6 * gauss.sum() * np.eye(6)  # only so that an empty window can be solved

    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(w, _RADIUS, constant_values=np.nan), disc.shape
    )
    out = np.full((6, *w.shape), np.nan)
    for row in range(w.shape[0]):
        change = windows[row][:, disc] / w[row][:, None] - 1  # [W, N]
        weight = gauss * np.exp(-0.5 * (change / _DEPTH_TOLERANCE) ** 2)
        known = ~np.isnan(change)
        weight, change = np.where(known, weight, 0), np.where(known, change, 0)
        left = (weight @ products).reshape(-1, 6, 6) + ridge
        right = (weight * change) @ basis
        solution = np.linalg.solve(left, right[..., None])[..., 0]
        solution[:, 0] += 1
        trusted = weight.sum(-1) > _MIN_SUPPORT * gauss.sum()
        out[:, row, trusted] = (solution * w[row][:, None])[trusted].T
    scale = focal / _RADIUS
    out[1:3] *= scale
    out[3:] *= scale * scale
    return out


def physical_labels(
    image: NDArray[np.uint8], depth: Floats, camera: Camera
) -> tuple[dict[str, Floats], dict[str, Bools]]:
    """All eleven labels of an image with depth, in the units that ``tasks.encode`` takes.

    =====================  =====================================================================
    depth_euclidean        distance to the optical centre, m
    depth_zbuffer          distance to the camera plane, m
    normal                 :func:`surface`
    reshading              Lambertian, white, the light at the camera: the cosine between normal
                           and line of sight, three equal channels
    edge_occlusion         Canny (sigma 1) on log depth: 1 where the depth steps by some 4 % or more
    principal_curvature    :func:`surface`, clipped at +-100 / m, averaged over known pixels by a
                           Gaussian of sigma 3: patches of 8 pixels cannot see finer detail
    keypoints3d            corners of the normals: r / (r + 0.3), r the smaller eigenvalue of their
                           structure tensor (sigma 2.5; Shi and Tomasi, CVPR 1994)
    segment_unsup25d       Felzenszwalb on log depth and normals; the segment's mean depth / 5.12 m
    edge_texture           Sobel magnitude of luminance after a Gaussian of sigma 1, over 0.1
    keypoints2d            corners of luminance: r / (r + 0.05)
    segment_unsup2d        Felzenszwalb on colour; the segment's mean luminance
    =====================  =====================================================================

    A segment's number would be arbitrary; its mean luminance or depth is a value that another part
    of the scene shares and a network can learn.

    Geometry operators that need a value everywhere see the nearest known one, and their labels are
    masked where missing pixels make up more than half of their (Gaussian) window. Geometry is never
    valid at a pixel without depth. Colour labels are valid everywhere.

    Args:
        image: [H, W, 3], uint8 RGB.
        depth: [H, W], z-buffer depth in metres, NaN where missing.
        camera: The camera of this image.

    Returns:
        ``(labels, valid)``: {task: [H, W, C] float64}, NaN or anything where not valid, and
        {task: [H, W] bool}.
    """
    height, width = depth.shape
    known = np.isfinite(depth)
    u = (np.arange(width) - camera.cx) / camera.focal
    v = (np.arange(height)[:, None] - camera.cy) / camera.focal
    stretch = np.sqrt(1 + u * u + v * v)  # length of the ray to depth 1

    normal, curvature = surface(depth, camera)
    fitted = known & np.isfinite(normal[..., 0]) & np.isfinite(curvature[..., 0])
    # The unit vector to the camera, with y up and z towards the camera, is (-u, v, 1) / stretch.
    towards = np.stack(np.broadcast_arrays(-u / stretch, v / stretch, 1 / stretch), axis=-1)
    shading = (normal * towards).sum(-1).clip(0, 1)

    filled_log = np.log(_fill(depth, known))
    filled_normal = _fill(normal, fitted)
    luminance = color.rgb2gray(image)
    patches = segmentation.felzenszwalb(image, scale=200, sigma=0.8, min_size=100)
    pieces = segmentation.felzenszwalb(
        # The third component of a unit vector follows from two.
        np.concatenate([4 * filled_log[..., None], filled_normal[..., :2]], axis=-1),
        scale=300,
        sigma=0.8,
        min_size=100,
        channel_axis=-1,
    )

    labels = {
        "depth_euclidean": depth * stretch,
        "depth_zbuffer": depth,
        "normal": normal,
        "reshading": np.repeat(shading[..., None], 3, axis=-1),
        "edge_occlusion": feature.canny(filled_log, 1, 0.06, 0.12).astype(np.float64),
        "principal_curvature": _smooth(curvature.clip(-100, 100), fitted, sigma=3),
        "keypoints3d": _corners(filled_normal, half=0.3),
        "segment_unsup25d": _mean_per_segment(depth, pieces, known) / 5.12,
        "edge_texture": filters.sobel(filters.gaussian(luminance, 1)) / 0.1,
        "keypoints2d": _corners(luminance[..., None], half=0.05),
        "segment_unsup2d": _mean_per_segment(luminance, patches, np.ones_like(known)),
    }
    valid = {
        "depth_euclidean": known,
        "depth_zbuffer": known,
        "normal": fitted,
        "reshading": fitted,
        "edge_occlusion": known & (ndimage.gaussian_filter(known.astype(float), 4) > 0.5),
        "principal_curvature": fitted,
        "keypoints3d": fitted
        & (ndimage.gaussian_filter(fitted.astype(float), _CORNER_SIGMA) > 0.5),
        "segment_unsup25d": known,
    }
    anywhere = np.ones_like(known)
    return (
        {name: labels[name].reshape(height, width, -1) for name in TASKONOMY},
        {name: valid.get(name, anywhere) for name in TASKONOMY},
    )


def _fill(values: Floats, known: Bools) -> Floats:
    """Every unknown pixel takes the value of the nearest known one."""
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    filled: Floats = values[tuple(nearest)]
    return filled


def _smooth(values: Floats, known: Bools, sigma: float) -> Floats:
    """Gaussian mean over the known pixels; anything where a pixel is not known."""
    total = ndimage.gaussian_filter(np.where(known[..., None], values, 0), (sigma, sigma, 0))
    weight = ndimage.gaussian_filter(known.astype(np.float64), sigma)
    mean: Floats = total / np.maximum(weight, 1e-6)[..., None]
    return mean


def _corners(channels: Floats, half: float) -> Floats:
    """Shi-Tomasi response r of an image [H, W, C] with all its channels, as r / (r + half)."""
    per_channel = [
        feature.structure_tensor(channels[..., c], sigma=_CORNER_SIGMA, mode="nearest")
        for c in range(channels.shape[-1])
    ]
    tensor = np.sum(per_channel, axis=0)
    eigenvalues = feature.structure_tensor_eigenvalues(tensor)
    response: Floats = eigenvalues[1].clip(min=0)  # rounding may leave it below
    return response / (response + half)


def _mean_per_segment(values: Floats, segments: NDArray[np.int64], known: Bools) -> Floats:
    inside, size = segments[known], int(segments.max()) + 1
    total = np.bincount(inside, values[known], minlength=size)
    mean: Floats = total / np.maximum(np.bincount(inside, minlength=size), 1)
    return mean[segments]


def views(cache: str | os.PathLike[str] | None = None) -> dict[str, View]:
    """The views of the photograph with their labels: ``"left"``, ``"held_out"`` and ``"right"``.

    Training crops come from the left and the right one. The labels take about a second to compute
    and are then kept in a file. Its name holds a digest of the recipe and of the libraries behind
    it, so a label never outlives either. A file that cannot be read is computed again; a folder
    that cannot be written costs no more than that.

    Args:
        cache: Folder of the file; default ``$TASKGROUP_CACHE``, or ``~/.cache/taskgroup``.

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
    """Every second pixel, low-passed first."""
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (0.7, 0.7, 0))
    half: NDArray[np.uint8] = np.rint(smooth[::2, ::2]).astype(np.uint8)
    return half


def photos() -> dict[str, Photo]:
    """The views of the photograph with their depth, of which :func:`views` makes labels."""
    photograph, _, disparity = stereo_motorcycle()
    known = np.isfinite(disparity)
    shifted = np.where(known, disparity, np.nan).astype(np.float64) + _DISPARITY_OFFSET
    depth = _CAMERA.focal * _BASELINE / shifted
    return {
        view: Photo(
            _half(photograph[:, columns]),
            # Depth is picked, not averaged: between two surfaces there is none.
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
    """Where the labels of this recipe are kept; None if there is no telling the recipe."""
    try:
        recipe = [inspect.getsource(module) for module in (sys.modules[__name__], encoding)]
    except OSError:  # installed without sources
        return None
    recipe += [library.__version__ for library in (np, scipy, skimage)]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()
    try:
        folder = folder or os.environ.get("TASKGROUP_CACHE") or Path.home() / ".cache" / "taskgroup"
    except RuntimeError:  # no home
        return None
    return Path(folder) / f"motorcycle-{digest[:16]}.npz"


def _read(file: Path) -> dict[str, NDArray[Any]] | None:
    names = [f"{v}/{task}{end}" for v in _COLUMNS for task in TASKONOMY for end in ("", "/valid")]
    try:
        # Opened here: np.load leaves a file that it cannot read open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _write(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    # Written aside and renamed: another process sees the whole file or none.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as part:
            try:
                np.savez_compressed(part, allow_pickle=False, **arrays)
                part.close()
                Path(part.name).replace(file)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError:
        pass


class Motorcycle:
    """Crops of the photograph: random ones to train on, fixed ones to evaluate on.

    Args:
        size: Height and width of a crop in pixels, or one number for both; at most 250 x 80.
        flip: Mirror half of the random training crops. Normals are mirrored with them.
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
        # Mirrored beforehand, so that a crop is one slice whichever way round it is.
        self._train = [(maps[name], maps[name].mirrored()) for name in _TRAINING]
        self._held_out = maps["held_out"]
        rows, columns = self._held_out.values.shape[1:]
        if not (0 < height <= rows and 0 < width <= columns):
            raise ValueError(f"a crop of {height} x {width} does not fit into {rows} x {columns}")

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Samples:
        """Random training crops, uniform over all places left and right of the band.

        Args:
            batch: Number of crops B.
            generator: A CPU generator, the only source of randomness: a run that restores its state
                goes on exactly. Default: torch's own.

        Returns:
            B crops, on the CPU.
        """
        return self._gather(self._draw(batch, generator, self.flip))

    def fixed_train(self, n: int) -> Samples:
        """Training crops that are the same at every call, not mirrored: for pictures and metrics.

        Args:
            n: Number of crops.

        Returns:
            n crops, on the CPU.
        """
        return self._gather(self._draw(n, torch.Generator().manual_seed(0), flip=False))

    def held_out(self) -> Samples:
        """The evaluation crops: a grid over the held-out view in steps of a quarter crop or less.

        Returns:
            The crops row by row, on the CPU; 26 of them at a size of 64.
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
    """A view as two tensors, so that a crop is two slices.

    Attributes:
        values: [19, H, W], float32: image, then the labels in the order of TASKONOMY.
        valid: [11, H, W], bool.
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
        # The x of the normals changes sign, about the stored 127, which is -1/255.
        values[_NORMAL_X] = -2 / 255 - values[_NORMAL_X]
        return _Maps(values, self.valid.flip(-1))
