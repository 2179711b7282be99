"""Values that a file cannot hold, or hardly, if it is stored as its layout says.

A label that is stored in another way than the layout's (edges as 0 and 1, depth in millimetres)
decodes without an error, to labels of nothing. All functions here give a sentence that names the
file, or None. Those called ``fault_*`` find values that cannot be what the layout says; every file
that is trained on goes through them, so they take little time beside the decoding. Those called
``doubt*`` find what is possible and yet most likely a mistake, such as an edge map without an edge;
``taskgroup data check`` asks them.
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
_NEAREST = 0.3  # metres; every room has something farther away
_MOST_EDGES = 0.5  # share of the pixels; edges are lines
_UNIT = 0.3  # what the length of a normal may be off by, where normals were interpolated
_FEW = 0.05  # share of the normals that may be off by more
_NONE = 0.02  # vectors as short as that mean that there is no normal: one step of 8 bits


def fault_of_binary(path: Path, stored: NDArray[Any], highest: int) -> str | None:
    """Of a map that is stored as 0 and 1.

    Args:
        path: of the file; as for all that follow.
        stored: [H, W], whole numbers.
        highest: what the layout has in the place of 1.
    """
    if stored.max(initial=0) == 1:
        return (
            f"{path} holds nothing above 1, but the layout has values up to {highest}; multiply it "
            f"by {highest} if it is a map of 0 and 1."
        )
    return None


def fault_of_edges(path: Path, stored: NDArray[np.uint8]) -> str | None:
    """Of an edge map [H, W] whose edges would all be lost: an edge is what is above 127."""
    if 0 < (highest := stored.max(initial=0)) <= 127:
        return (
            f"{path} holds nothing above {highest}, but an edge is stored as 255; as it is, "
            "there is none."
        )
    return None


def fault_of_classes(path: Path, highest: int, most: int, how: str) -> str | None:
    """Of class numbers out of range.

    Args:
        path: of the file.
        highest: the greatest number in it.
        most: the greatest that there may be.
        how: how the layout stores classes.
    """
    return f"{path} holds the class number {highest}, but {how}." if highest > most else None


def fault_of_depth(path: Path, depth: NDArray[np.float32]) -> str | None:
    """Of depths [H, W] in metres that no room has."""
    if (highest := depth.max(initial=0)) > _FARTHEST:
        return (
            f"{path} holds depths up to {highest:,.0f}, but the layout has metres; divide it by "
            "1000 if it is in millimetres, by 100 if it is in centimetres."
        )
    return None


def fault_of_normals(path: Path, vectors: NDArray[np.float32], how: str) -> str | None:
    """Of normals [..., 3] most of which have not unit length.

    Args:
        path: of the file.
        vectors: as they are stored; some of them are enough.
        how: how the layout stores them.
    """
    off, n_known = _not_unit(vectors)
    if off > n_known / 2:
        return (
            f"{path} must hold unit normals, {how}; {100 * off / n_known:.0f} % of its vectors "
            "have another length."
        )
    return None


def doubt(path: Path, task: Task, label: NDArray[Any], known: NDArray[np.bool_]) -> str | None:
    """Of a label that can be read.

    Args:
        path: of its file.
        task: what it is of.
        label: [H, W, C], decoded.
        known: [H, W].
    """
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
    """Of known depths, of which there is one at least."""
    farthest = metres.max()
    if not _NEAREST <= farthest <= _FARTHEST:
        return f"{path} holds depths up to {farthest:.3g} m; are they in another unit?"
    return None


def doubt_of_normals(path: Path, vectors: NDArray[np.float32], how: str) -> str | None:
    """Of normals [..., 3]; see :func:`fault_of_normals`."""
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
    """Of an image [H, W, 3]."""
    if (highest := image.max(initial=0)) <= 1:
        return f"{path} is black: it holds no value above {highest}, of 255."
    if (image == image[0, 0]).all():
        return f"{path} is of one colour."
    return None


def _not_unit(vectors: NDArray[np.float32]) -> tuple[int, int]:
    """How many vectors have not unit length, of how many; those that mean no normal left out."""
    length = np.sqrt(np.einsum("...c,...c->...", vectors, vectors))
    known = length > _NONE
    off = np.count_nonzero(known & (np.abs(length - 1) > _UNIT))
    return int(off), int(np.count_nonzero(known))
