"""Pictures of any kind, read to be looked at: scaled, not clipped."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from taskgroup.lab.data.files import BadSampleError, read_photo

GREY = np.add.outer(2 * np.arange(40), 4 * np.arange(44)).astype(np.uint8)  # 0 to 250
DEEP = GREY * np.uint16(257)


def png(path, values):
    """A PNG of 16 bits and any channels, which Pillow does not write."""
    height, width, channels = np.atleast_3d(values).shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, data):
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(name + data))
        return size + name + data + check

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def pillow(mode):
    return lambda path: Image.fromarray(GREY).convert(mode).save(path)


def tiff(values, **options):
    return lambda path: tifffile.imwrite(path, values, **options)


def channels(*values):
    return np.stack(values, axis=-1)


OPAQUE = np.full_like(DEEP, 65535)
FLOATS = GREY.astype(np.float32)
PICTURES = {
    "l.png": pillow("L"),
    "la.png": pillow("LA"),
    "p.png": pillow("P"),
    "rgba.png": pillow("RGBA"),
    "cmyk.tiff": pillow("CMYK"),
    "l16.png": lambda path: png(path, DEEP),
    "la16.png": lambda path: png(path, channels(DEEP, OPAQUE)),
    "rgb16.png": lambda path: png(path, channels(DEEP, DEEP, DEEP)),
    "rgba16.png": lambda path: png(path, channels(DEEP, DEEP, DEEP, OPAQUE)),
    "l16.tiff": tiff(DEEP),
    "l16be.tiff": tiff(DEEP, byteorder=">"),
    "rgb16.tiff": tiff(channels(DEEP, DEEP, DEEP), photometric="rgb"),
    "l12.tiff": tiff(GREY * np.uint16(16)),
    "l10.tiff": tiff(GREY * np.uint16(4)),
    "l8in16.tiff": tiff(GREY.astype(np.uint16)),
    "l32.tiff": tiff(GREY * np.int32(1_000_000)),
    "float.tiff": tiff(FLOATS / 255),
    "float255.tiff": tiff(FLOATS),
    "floatminus.tiff": tiff(FLOATS / 125 - 1),
    "pgm12.pgm": lambda path: path.write_bytes(
        b"P5 44 40 4095\n" + (GREY * np.uint16(16)).astype(">u2").tobytes()
    ),
}
# By how much the range of what is stored differs from that of the picture: 250 of 255, or all.
STRETCHED = ("l32.tiff", "float255.tiff", "floatminus.tiff")


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_scaled_to_8_bits(name, tmp_path):
    PICTURES[name](tmp_path / name)
    found = read_photo(tmp_path / name)
    assert found.shape == (40, 44, 3)
    assert found.dtype == np.uint8
    expected = GREY * (255 / 250) if name in STRETCHED else GREY
    # CMYK and 10 or 12 bits round, and their highest value is not quite 255.
    np.testing.assert_allclose(found, channels(expected, expected, expected), atol=1.01)


def test_a_dark_picture_of_floats_stays_dark(tmp_path):
    tifffile.imwrite(tmp_path / "dark.tiff", FLOATS / 1000)
    found = read_photo(tmp_path / "dark.tiff")
    np.testing.assert_allclose(found[..., 0], GREY * 0.255, atol=0.51)


def test_one_bit_a_pixel(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_photo(tmp_path / "one.png")[..., 1], 255 * (GREY > 100))


def test_what_is_transparent_is_white(tmp_path):
    alpha = np.where(np.arange(44) < 20, 255, 0).astype(np.uint8) + np.zeros_like(GREY)
    picture = Image.fromarray(channels(GREY, GREY, GREY, alpha))
    picture.save(tmp_path / "half.png")
    found = read_photo(tmp_path / "half.png")[..., 0]
    np.testing.assert_array_equal(found[:, :20], GREY[:, :20])
    assert (found[:, 20:] == 255).all()
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=8)
    found = read_photo(tmp_path / "palette.png")[..., 0]
    seen = np.array(palette) == 8
    assert seen.any()
    assert (found[seen] == 255).all()
    np.testing.assert_array_equal(found[~seen], GREY[~seen])
    # An alpha channel that hides all of the picture is a mistake of who wrote it.
    Image.fromarray(channels(GREY, GREY, GREY, 0 * GREY)).save(tmp_path / "all.png")
    np.testing.assert_array_equal(read_photo(tmp_path / "all.png")[..., 0], GREY)


@pytest.mark.parametrize("name", ["turned.png", "turned.tiff"])
@pytest.mark.parametrize("values", [GREY, DEEP, FLOATS / 255])
def test_turned_as_exif_says(values, name, tmp_path):
    if values.dtype == np.float32:
        name = "turned.tiff"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(values).save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(read_photo(tmp_path / name)[..., 0], np.rot90(GREY, 3))


def test_values_that_are_no_picture(tmp_path):
    values = FLOATS / 255
    values[2, 3:6] = [np.nan, np.inf, -np.inf]
    tifffile.imwrite(tmp_path / "nan.tiff", values)
    with pytest.raises(BadSampleError, match=r"nan\.tiff holds 3 values that are NaN or infinite"):
        read_photo(tmp_path / "nan.tiff")
    tifffile.imwrite(tmp_path / "unsigned.tiff", GREY * np.uint32(2**24))  # Pillow: signed
    with pytest.raises(BadSampleError, match=r"unsigned\.tiff holds whole numbers from -\d+ to"):
        read_photo(tmp_path / "unsigned.tiff")
    tifffile.imwrite(tmp_path / "colours.tiff", channels(values, values, values), photometric="rgb")
    with pytest.raises(BadSampleError, match=r"colours\.tiff cannot be read: cannot identify"):
        read_photo(tmp_path / "colours.tiff")


def test_a_picture_of_one_value(tmp_path):
    for dtype, value in ((np.uint16, 0), (np.uint16, 65535), (np.float32, 0.0), (np.float32, 1.0)):
        tifffile.imwrite(tmp_path / "flat.tiff", np.full((4, 4), value, dtype))
        assert (read_photo(tmp_path / "flat.tiff") == (255 if value else 0)).all()
