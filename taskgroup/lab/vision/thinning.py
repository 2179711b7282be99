# mypy: untyped-calls-exclude=skimage
"""Thin regions and thick lines to lines of one pixel."""

from __future__ import annotations

import numpy as np
import skimage.morphology
from numpy.typing import NDArray

import taskgroup as tg

__all__ = ["thin"]

Bools = NDArray[np.bool_]


def thin(image: Bools) -> Bools:
    """Thin a map [H, W] to lines of one pixel, which stay connected.

    The result is that of ``skimage.morphology.thin`` and of MATLAB's ``bwmorph(..., 'thin', Inf)``:
    Guo & Hall, Communications of the ACM 32, 1989.

    Raises:
        ValueError: The map is not [H, W].

    Example:
        >>> thin(np.ones((3, 5), dtype=bool)).astype(int)
        array([[0, 0, 0, 0, 0],
               [0, 1, 1, 1, 0],
               [0, 0, 0, 0, 0]])
    """
    if image.ndim != 2:
        raise ValueError(f"image: [H, W] is needed, got {image.shape}")
    return tg.ops.choose("cpu", cpp=_native, reference=_reference)(image)


def _native(image: Bools) -> Bools:
    thinned: Bools = tg.ops.native.host.thin(np.ascontiguousarray(image))
    return thinned


def _reference(image: Bools) -> Bools:
    thinned: Bools = skimage.morphology.thin(image) if image.size else image.copy()
    return thinned
