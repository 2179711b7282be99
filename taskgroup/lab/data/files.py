"""Read single files of a data set; every error names the file and says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = [
    "BadSampleError",
    "read_depth",
    "read_grey",
    "read_grey16",
    "read_mat",
    "read_photo",
    "read_planes",
    "read_rgb",
    "read_size",
]

_WORDS = {
    "RGB": "three 8-bit channels",
    "RGBA": "four 8-bit channels",
    "LA": "two 8-bit channels",
    "L": "one 8-bit channel",
    "P": "one 8-bit channel with a palette",
    "1": "one bit a pixel",
    "I;16": "one 16-bit channel",
    "I": "one 32-bit channel",
    "F": "one channel of floats",
}
# One channel of more than 8 bits, which Pillow's convert() clips instead of scaling it.
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class BadSampleError(ValueError):
    """A file of a sample is missing, broken, or not what it should be."""


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Read an 8-bit RGB image: ``[H, W, 3]``.

    Raises:
        BadSampleError: if the file is missing, broken, or holds something else. All functions below
            raise it too.
    """
    return _read(path, ("RGB",), "RGB")


def read_planes(path: Path) -> NDArray[np.uint8]:
    """Read the same as :func:`read_rgb`; in memory each of the three channels is contiguous.

    NumPy is slow on a last dimension of 3.
    """
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(read_rgb(path), -1, 0)), 0, -1)


def read_size(path: Path) -> tuple[int, int]:
    """Read the height and width of an image, which do not need its pixels."""
    with _reading(path), Image.open(path) as image:
        return image.height, image.width


def read_photo(path: Path) -> NDArray[np.uint8]:
    """Read an image of any kind as RGB, ``[H, W, 3]``, as a viewer would show it.

    The image is rotated as its EXIF data says, and transparent parts become white. Grey values of
    more than 8 bits are scaled to 8 bits: integers from the range of the bits in use (8, 10, 12 or
    16), floats from the range 0 to 1. If values lie outside that range, their minimum and maximum
    take the place of its ends.

    Raises:
        BadSampleError: also if a value is NaN or infinite, or an integer is negative.
    """
    # Pillow gets an open file: it may map a path into memory, and then Pillow 13.0 reads a rotated
    # TIFF with its sides exchanged.
    with _reading(path), path.open("rb") as file, Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode not in _DEEP:
            return np.array(_on_white(image).convert("RGB"))
        values = np.array(image)
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise BadSampleError(
            f"{path} holds {bad} values that are NaN or infinite; save it as an 8-bit image."
        )
    if values.dtype.kind == "i" and values.min() < 0:  # unsigned 32-bit numbers look like that too
        raise BadSampleError(
            f"{path} holds whole numbers from {values.min()} to {values.max()}, which are not "
            "grey values; save it as an 8-bit image."
        )
    return np.repeat(_to_8_bits(values)[..., None], 3, axis=2)


def _on_white(image: Image.Image) -> Image.Image:
    """Make the transparent parts of an image white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (0, 0):  # all transparent: nobody means that
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale finite numbers to the range 0 to 255, as :func:`read_photo` says."""
    low, high = min(0.0, float(values.min())), float(values.max())
    ranges = (1.0,) if values.dtype.kind == "f" else (255.0, 1023.0, 4095.0, 65535.0)
    high = next((top for top in ranges if high <= top), high)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Read an 8-bit image of one channel, or the indices into a palette: ``[H, W]``, uint8."""
    return _read(path, ("L", "P"), "L")


def read_grey16(path: Path) -> NDArray[np.uint16]:
    """Read a 16-bit image of one channel: ``[H, W]``, uint16."""
    # Older versions of Pillow open 16-bit files in the 32-bit mode "I".
    stored = _read(path, ("I;16", "I"), "I;16")
    if stored.dtype.itemsize > 2 and (stored.min() < 0 or stored.max() >= 2**16):
        raise BadSampleError(
            f"{path} must hold one 16-bit channel; it holds numbers from {stored.min()} to "
            f"{stored.max()}."
        )
    return stored.astype(np.uint16)


def read_depth(path: Path) -> NDArray[np.float32]:
    """Read a depth map ``[H, W]`` from an ``.npy`` file: metres, 0 where depth is missing."""
    with _reading(path):
        depth = np.load(path, allow_pickle=False)
    if not isinstance(depth, np.ndarray) or (depth.ndim == 3 and 1 not in depth.shape):
        raise BadSampleError(f"{path} must hold one depth map, H x W.")
    depth = depth.squeeze()
    if depth.ndim != 2 or depth.dtype.kind not in "fui":
        raise BadSampleError(
            f"{path} must hold numbers, H x W; it holds {depth.dtype} of shape {depth.shape}."
        )
    if depth.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(depth))):
        raise BadSampleError(
            f"{path} holds {bad} depths that are NaN or infinite; missing depth is stored as 0."
        )
    return depth.astype(np.float32)


def read_mat(path: Path, key: str) -> NDArray[Any]:
    """Read a variable of a MATLAB file."""
    with _reading(path):
        variables = scipy.io.loadmat(path, variable_names=[key])
    if key not in variables:
        raise BadSampleError(f"{path} has no variable {key}.")
    return np.asarray(variables[key])


def _read(path: Path, modes: tuple[str, ...], wanted: str) -> NDArray[Any]:
    with _reading(path), Image.open(path) as image:
        mode = image.mode
        if mode in modes:
            return np.array(image)  # a copy, since torch needs a writable array
    holds = _WORDS.get(mode, f"mode {mode}")
    raise BadSampleError(f"{path} must hold {_WORDS[wanted]}; it holds {holds}.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error into a :class:`BadSampleError` that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise BadSampleError(f"{path} is missing.") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow, NumPy and SciPy raise various errors for broken files
        why = " ".join(str(error).split()) or "it is cut off"
        raise BadSampleError(f"{path} cannot be read: {why.rstrip('.')}.") from None
