"""Find values in a file that are impossible or unlikely in the layout of its data set.

A label that is stored in another way (edges as 0 and 1, depth in millimetres) can be decoded
without an error, but the result is wrong. Every function here returns a sentence that names the
file, or None. The functions ``fault_*`` find impossible values. Every file that is trained on goes
through them, so they are fast compared with the decoding. The functions ``doubt*`` find values that
are possible but most likely a mistake, such as an edge map without an edge; they are for
``taskgroup data check``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.vision.tasks import Task

__all__ = [
    "doubt",
    "doubt_of_depth",
    "doubt_of_image",
    "doubt_of_normals",
    "fault_of_binary",
    "fault_of_classes",
    "fault_of_depth",
    "fault_of_edges",
    "fault_of_normals",
]

_FARTHEST = 100.0  # metres, in a building; the sensor of NYUD-v2 sees 10
_NEAREST = 0.3  # metres; in every room something is farther away
_MOST_EDGES = 0.5  # share of the pixels; edges are lines
_UNIT = 0.3  # tolerance for the length of a normal; interpolated normals are shorter
_FEW = 0.05  # share of the normals that may exceed the tolerance
_NONE = 0.02  # a shorter vector marks an unknown normal; this is one step of 8 bits


def fault_of_binary(path: Path, stored: NDArray[Any], highest: int) -> str | None:
    """Find a map [H, W] of 0 and 1 where the layout has 0 and ``highest``."""
    if stored.max(initial=0) == 1:
        return (
            f"{path} holds nothing above 1, but the layout has values up to {highest}; multiply it "
            f"by {highest} if it is a map of 0 and 1."
        )
    return None


def fault_of_edges(path: Path, stored: NDArray[np.uint8]) -> str | None:
    """Find an edge map [H, W] whose edges would all be lost, since an edge is above 127."""
    if 0 < (highest := stored.max(initial=0)) <= 127:
        return (
            f"{path} holds nothing above {highest}, but an edge is stored as 255; as it is, "
            "there is none."
        )
    return None


def fault_of_classes(path: Path, highest: int, most: int, how: str) -> str | None:
    """Find class numbers above ``most``; ``how`` says how the layout stores classes."""
    return f"{path} holds the class number {highest}, but {how}." if highest > most else None


def fault_of_depth(path: Path, depth: NDArray[np.float32]) -> str | None:
    """Find depths [H, W] in metres that no room has."""
    if (highest := depth.max(initial=0)) > _FARTHEST:
        return (
            f"{path} holds depths up to {highest:,.0f}, but the layout has metres; divide it by "
            "1000 if it is in millimetres, by 100 if it is in centimetres."
        )
    return None


def fault_of_normals(path: Path, vectors: NDArray[np.float32], how: str) -> str | None:
    """Find normals [..., 3] of which most do not have unit length; a sample of them is enough.

    ``how`` is the formula by which the layout stores them.
    """
    off, n_known = _not_unit(vectors)
    if off > n_known / 2:
        return (
            f"{path} must hold unit normals, {how}; {100 * off / n_known:.0f} % of its vectors "
            "have another length."
        )
    return None


def doubt(path: Path, task: Task, label: NDArray[Any], known: NDArray[np.bool_]) -> str | None:
    """Find what is unlikely about a decoded label [H, W, C], where ``known`` [H, W] is true."""
    if not known.any():
        return f"{path} tells nothing: all of its pixels are unknown."
    if task.kind == "values" and (label == label[0, 0]).all():
        return f"{path} holds one value everywhere."
    if task.metric == "ods_f":
        share = label.mean()
        if share == 0:
            return f"{path} has no edge."
        if share > _MOST_EDGES:
            return f"{path} has edges on {100 * share:.0f} % of its pixels; is it inverted?"
    return None


def doubt_of_depth(path: Path, metres: NDArray[np.floating[Any]]) -> str | None:
    """Find unlikely depths among the known ones, of which there must be at least one."""
    farthest = metres.max()
    if not _NEAREST <= farthest <= _FARTHEST:
        return f"{path} holds depths up to {farthest:.3g} m; are they in another unit?"
    return None


def doubt_of_normals(path: Path, vectors: NDArray[np.float32], how: str) -> str | None:
    """Find unlikely normals [..., 3]; see :func:`fault_of_normals`."""
    off, n_known = _not_unit(vectors)
    if not n_known:
        return f"{path} tells nothing: all of its pixels are unknown."
    if off > _FEW * n_known:
        return (
            f"{path} has vectors of another length than 1, {100 * off / n_known:.0f} % of them; "
            f"normals are stored as {how}, and 127 or 128 three times where they are unknown."
        )
    return None


def doubt_of_image(path: Path, image: NDArray[np.uint8]) -> str | None:
    """Find an unlikely image [H, W, 3]."""
    if (highest := image.max(initial=0)) <= 1:
        return f"{path} is black: it holds no value above {highest}, of 255."
    if (image == image[0, 0]).all():
        return f"{path} is of one colour."
    return None


def _not_unit(vectors: NDArray[np.float32]) -> tuple[int, int]:
    """Count the vectors that do not have unit length, and all that are not unknown."""
    length = np.sqrt(np.einsum("...c,...c->...", vectors, vectors))
    known = length > _NONE
    off = np.count_nonzero(known & (np.abs(length - 1) > _UNIT))
    return int(off), int(np.count_nonzero(known))
