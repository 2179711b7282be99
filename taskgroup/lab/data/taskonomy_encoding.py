"""How Taskonomy stores labels, and how stored labels are normalised for training.

Taskonomy stores every label as an 8- or 16-bit image. :func:`encode` turns a physical label
(metres, unit normals, 1/m, ...) into that image. :func:`normalise` turns the image into the values
that a network is trained on. The scales are those of the published multi-task runs on Taskonomy, so
losses and metrics can be compared with the published ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from taskgroup.lab.vision.tasks import TASKONOMY

__all__ = ["encode", "normalise"]

# The shares of the 16-bit range at which edges and keypoints saturate.
_CLIP = {"edge_occlusion": 0.00625, "edge_texture": 0.08, "keypoints2d": 0.005, "keypoints3d": 1.0}
_OCCLUSION_SIGMA = 4.0  # px
_CURVATURE_MEAN = np.array([123.572, 120.1], dtype=np.float32)
_CURVATURE_STD = np.array([31.922, 21.658], dtype=np.float32)
# The radius at which curvature saturates. The published images do not state theirs; with 2 cm, the
# labels of the embedded scene have about the published standard deviations.
_MIN_RADIUS = 0.02  # m


def encode(task: str, label: NDArray[np.floating]) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Convert a physical label to the integers that Taskonomy stores.

    ==================================  ================================  ==========================
    task                                physical label                    stored
    ==================================  ================================  ==========================
    depth_euclidean, depth_zbuffer      metres                            16 bit: 512 per metre
    normal                              unit vectors                      8 bit: 127 + 127 n
    reshading                           brightness, 0 to 1                8 bit: 255 v
    principal_curvature                 1/m, clipped at +-50              8 bit: 127 + 2.54 k
    edge_occlusion                      1 on the edge, 0 elsewhere        16 bit: see below
    edge_texture, keypoints2d and 3d    strength, 0 to 1                  16 bit: c 2^16 v,
                                                                          c = .08, .005, 1
    segment_unsup2d, segment_unsup25d   value of the segment, 0 to 1      8 bit: 255 v
    ==================================  ================================  ==========================

    An occlusion edge is a line of one pixel. It is stored with the value that the Gaussian of
    :func:`normalise` smooths to full strength.

    Args:
        task: A name in :data:`~taskgroup.lab.vision.tasks.TASKONOMY`.
        label: [H, W, C], in the units above. Values that are not finite count as 0; in depth, they
            count as missing and are stored as 65535.

    Returns:
        [H, W, C], uint8 or uint16, rounded to the nearest integer and clipped to the type's range.

    Raises:
        ValueError: An unknown task.

    Example:
        >>> encode("depth_zbuffer", np.array([[[2.0], [np.nan]]])).tolist()
        [[[1024], [65535]]]
    """
    missing = ~np.isfinite(label)
    x = np.where(missing, 0.0, label)
    match task:
        case "depth_euclidean" | "depth_zbuffer":
            return _round(np.where(missing, np.inf, 512 * x), np.uint16)
        case "normal":
            return _round(127 + 127 * x, np.uint8)
        case "principal_curvature":
            return _round(127 + 127 * (_MIN_RADIUS * x).clip(-1, 1), np.uint8)
        case "edge_occlusion":
            # A line of this height has height 1 once it is smoothed.
            peak = math.sqrt(2 * math.pi) * _OCCLUSION_SIGMA
            return _round(_CLIP[task] * 2**16 * peak * x, np.uint16)
        case "edge_texture" | "keypoints2d" | "keypoints3d":
            return _round(_CLIP[task] * 2**16 * x, np.uint16)
        case "reshading" | "segment_unsup2d" | "segment_unsup25d":
            return _round(255 * x, np.uint8)
    raise _unknown(task)


def normalise(task: str, stored: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert stored integers to the label that a network is trained on.

    ==========================================  ====================================================
    task                                        label, from the stored x
    ==========================================  ====================================================
    depth_euclidean, depth_zbuffer              ln(1 + x) / ln(2^16)
    normal, reshading, segment_unsup2d and 25d  2 x / 255 - 1
    principal_curvature                         (x - [123.572, 120.1]) / [31.922, 21.658]
    edge_occlusion                              x / (.00625 2^16), Gaussian of sigma 4 px;
                                                from 0..1 to [-1, 1]
    edge_texture, keypoints2d and 3d            x / (c 2^16), c = .08, .005, 1; from 0..1 to [-1, 1]
    ==========================================  ====================================================

    "From 0..1 to [-1, 1]" means 2 min(x, 1) - 1. Normals are centred at 127, not at 127.5, so that
    a component of zero becomes -1/255.

    Args:
        task: A name in :data:`~taskgroup.lab.vision.tasks.TASKONOMY`.
        stored: [H, W, C], as :func:`encode` returns it.

    Returns:
        [H, W, C], float32.

    Raises:
        ValueError: An unknown task.

    Example:
        >>> normalise("keypoints3d", np.array([[[0], [2**15]]], dtype=np.uint16)).tolist()
        [[[-1.0], [0.0]]]
    """
    x = stored.astype(np.float32)
    match task:
        case "depth_euclidean" | "depth_zbuffer":
            np.log1p(x, out=x)
            x /= np.float32(math.log(2**16))
        case "normal" | "reshading" | "segment_unsup2d" | "segment_unsup25d":
            x /= np.float32(127.5)
            x -= 1
        case "principal_curvature":
            x -= _CURVATURE_MEAN
            x /= _CURVATURE_STD
        case "edge_occlusion" | "edge_texture" | "keypoints2d" | "keypoints3d":
            x /= np.float32(_CLIP[task] * 2**16)
            if task == "edge_occlusion":
                x = ndimage.gaussian_filter(x, (_OCCLUSION_SIGMA, _OCCLUSION_SIGMA, 0))
            np.minimum(x, 1, out=x)
            x *= 2
            x -= 1
        case _:
            raise _unknown(task)
    return x


def _round(x: NDArray[np.float64], dtype: type[np.uint8] | type[np.uint16]) -> NDArray[Any]:
    return np.rint(x).clip(0, np.iinfo(dtype).max).astype(dtype)


def _unknown(task: str) -> ValueError:
    return ValueError(f"unknown task {task!r}: the Taskonomy tasks are {', '.join(TASKONOMY)}")
