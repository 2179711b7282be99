# mypy: untyped-calls-exclude=skimage
"""The eleven Taskonomy labels of an image with depth, in physical units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, feature, filters, segmentation

from taskgroup.lab.vision.tasks import TASKONOMY

__all__ = ["Bools", "Camera", "Floats", "Surface", "physical_labels", "surface"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_RADIUS = 5  # px, of the surface fit
_DEPTH_TOLERANCE = 0.02  # relative difference in depth at which another surface begins
_MIN_SUPPORT = 0.5  # share of the window's weight below which a fit is not trusted
_CORNER_SIGMA = 2.5  # px


class Camera(NamedTuple):
    """A pinhole camera, in pixels; the origin is the centre of the upper left pixel."""

    focal: float
    cx: float
    cy: float


class Surface(NamedTuple):
    """Normals and curvatures at every pixel, as :func:`surface` computes them.

    Attributes:
        normal: [H, W, 3], unit vectors that face the camera: x to the right, y up, z towards the
            camera. NaN where unknown.
        curvature: [H, W, 2], 1/m, the larger one first, positive where the surface bulges towards
            the camera (for a sphere of radius r, both are 1/r). NaN where unknown.
    """

    normal: Floats
    curvature: Floats


def surface(depth: Floats, camera: Camera) -> Surface:
    r"""Compute normals and principal curvatures of a depth map.

    Around each pixel, a quadratic is fitted to the inverse depth w = 1/Z. On a plane, w is exactly
    linear in the pixel coordinates, so planes are found without bias at any slant. The weight of a
    neighbour falls with its distance (Gaussian, half the radius of 5 px) and with the difference in
    w (Gaussian, 2 %), so that a fit does not reach across a depth discontinuity. Missing pixels
    have no weight. Where less than half of the window's weight is left, the result is NaN.

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
    """The value and the first and second derivatives of w: [6, H, W], NaN where unknown."""
    steps = np.arange(-_RADIUS, _RADIUS + 1)
    disc = np.hypot(*np.meshgrid(steps, steps)) <= _RADIUS
    # Offsets in units of the radius keep the normal equations well scaled.
    v, u = (grid[disc] / _RADIUS for grid in np.meshgrid(steps, steps, indexing="ij"))
    basis = np.stack([np.ones_like(u), u, v, u * u / 2, u * v, v * v / 2], axis=-1)  # [N, 6]
    products = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), 36)
    gauss = np.exp(-2 * (u * u + v * v))
    ridge = 1e-6 * gauss.sum() * np.eye(6)  # so that an empty window can be solved

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
    """Compute all eleven labels of an image with depth.

    The units are those that :func:`taskgroup.lab.data.taskonomy_encoding.encode` takes:

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

    The number of a segment would be arbitrary. A network can learn its mean luminance or depth,
    since other parts of the scene share such values.

    Operators on geometry that need a value everywhere take the nearest known one. Their labels are
    masked where missing pixels make up more than half of their (Gaussian) window. Geometry is never
    valid at a pixel without depth. Labels of colour are valid everywhere.

    Args:
        image: [H, W, 3], uint8 RGB.
        depth: [H, W], z-buffer depth in metres, NaN where missing.
        camera: The camera of this image.

    Returns:
        ``(labels, valid)``: {task: [H, W, C] float64}, arbitrary where not valid, and
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
    """Give every unknown pixel the value of the nearest known one."""
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    filled: Floats = values[tuple(nearest)]
    return filled


def _smooth(values: Floats, known: Bools, sigma: float) -> Floats:
    """Gaussian mean over the known pixels; arbitrary where a pixel is not known."""
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
    response: Floats = eigenvalues[1].clip(min=0)  # rounding may make it negative
    return response / (response + half)


def _mean_per_segment(values: Floats, segments: NDArray[np.int64], known: Bools) -> Floats:
    inside, size = segments[known], int(segments.max()) + 1
    total = np.bincount(inside, values[known], minlength=size)
    mean: Floats = total / np.maximum(np.bincount(inside, minlength=size), 1)
    return mean[segments]
