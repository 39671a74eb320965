"""A zoo of pictures: every format, mode, orientation and shape, against pixels computed with NumPy alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import tifffile
from PIL import Image

from dualfocus.runtime import PictureError, PictureWarning, decode, open_picture
from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.decode import PIXEL_LIMIT, SIDE_LIMIT

SHAPES = [(23, 17), (1, 1), (1, 9), (9, 1), (2, 400), (400, 2)]  # (H, W)
UPRIGHT = {  # EXIF's table: where the first row and the first column of what is stored belong
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def samples(height: int, width: int, channels: int, *, smooth: bool) -> np.ndarray:
    """(H, W, channels) uint8, noise or a slope that lossy formats keep."""
    if not smooth:
        return np.random.default_rng(height + width).integers(0, 256, (height, width, channels), np.uint8)
    y, x = np.mgrid[:height, :width]
    slope = 40 + 150 * (x / max(1, width - 1) + y / max(1, height - 1)) / 2
    return np.stack([slope + 10 * c for c in range(channels)], -1).astype(np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels] * 3, -1).astype(np.uint8)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float) / 255
    return colour * share + 255 * (1 - share)


Source = tuple[Image.Image, np.ndarray]  # what is saved, and its (H, W, 3) RGB


def one_bit(s: np.ndarray) -> Source:
    return Image.fromarray(s[..., 0] > 127), grey((s[..., 0] > 127) * 255)


def eight_bit(s: np.ndarray) -> Source:
    return Image.fromarray(s[..., 0]), grey(s[..., 0])


def grey_alpha(s: np.ndarray) -> Source:
    return Image.merge("LA", [Image.fromarray(s[..., 0]), Image.fromarray(s[..., 1])]), over_white(
        grey(s[..., 0]), s[..., 1:2]
    )


def rgb(s: np.ndarray) -> Source:
    return Image.fromarray(s[..., :3]), s[..., :3]


def rgba(s: np.ndarray) -> Source:
    return Image.fromarray(s), over_white(s[..., :3], s[..., 3:])


def cmyk(s: np.ndarray) -> Source:
    ink = s.astype(float) / 255
    return Image.fromarray(s, "CMYK"), 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def ycbcr(s: np.ndarray) -> Source:
    y, cb, cr = (s[..., c].astype(float) for c in range(3))
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    return Image.fromarray(s[..., :3], "YCbCr"), np.stack([red, green, blue], -1).clip(0, 255)


def palette(s: np.ndarray) -> Source:
    colours = np.random.default_rng(1).integers(0, 256, (16, 3), np.uint8)
    indices = s[..., 0] % 16
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    image.info["transparency"] = 3
    colours[3] = 255
    return image, colours[indices]


def opaque_palette(s: np.ndarray) -> Source:
    image, _ = palette(s)
    del image.info["transparency"]
    colours = np.array(image.getpalette()).reshape(-1, 3)
    return image, colours[np.asarray(image)]


def sixteen_bit(s: np.ndarray) -> Source:
    wide = s[..., 0].astype(np.uint16) * 256 + s[..., 1]
    wide[0, 0] = 65535  # so that it is known to reach white
    return Image.fromarray(wide), grey(wide >> 8)


def floats(s: np.ndarray) -> Source:
    levels = s[..., 0].copy()
    levels[0, 0] = 255
    return Image.fromarray((levels / 255).astype(np.float32)), grey(levels)


Make = Callable[[np.ndarray], Source]
# format, options, mode, how many levels a pixel may be off and how many on average
ZOO: list[tuple[str, dict[str, object], Make, float, float]] = [
    ("JPEG", {"quality": 95}, eight_bit, 6, 1.5),
    ("JPEG", {"quality": 95, "subsampling": 0}, rgb, 9, 3),
    ("JPEG", {"quality": 95, "progressive": True}, rgb, 9, 3),
    ("JPEG", {"quality": 95}, cmyk, 9, 3),
    ("JPEG", {"quality": 95, "subsampling": 0}, ycbcr, 9, 3),
    ("MPO", {"quality": 95, "subsampling": 0, "save_all": True}, rgb, 9, 3),
    ("MPO", {"quality": 95, "save_all": True}, eight_bit, 6, 1.5),
    ("PNG", {}, one_bit, 0, 0),
    ("PNG", {}, eight_bit, 0, 0),
    ("PNG", {}, grey_alpha, 1, 1),
    ("PNG", {}, palette, 0, 0),
    ("PNG", {}, rgb, 0, 0),
    ("PNG", {}, rgba, 1, 1),
    ("PNG", {}, sixteen_bit, 0, 0),
    ("WEBP", {"lossless": True}, rgb, 0, 0),
    ("WEBP", {"lossless": True, "exact": True}, rgba, 1, 1),
    ("WEBP", {"quality": 95}, rgb, 16, 4),
    ("AVIF", {"quality": 95, "subsampling": "4:4:4", "speed": 10}, rgb, 9, 3),
    ("AVIF", {"quality": 95, "subsampling": "4:4:4", "speed": 10}, rgba, 12, 4),
    ("AVIF", {"quality": 95, "speed": 10}, eight_bit, 9, 3),
    ("TIFF", {}, one_bit, 0, 0),
    ("TIFF", {"compression": "group4"}, one_bit, 0, 0),
    ("TIFF", {}, eight_bit, 0, 0),
    ("TIFF", {"compression": "tiff_lzw"}, grey_alpha, 1, 1),
    ("TIFF", {}, opaque_palette, 0, 0),
    ("TIFF", {}, rgb, 0, 0),
    ("TIFF", {"compression": "tiff_adobe_deflate"}, rgb, 0, 0),
    ("TIFF", {"compression": "packbits"}, rgba, 1, 1),
    ("TIFF", {}, cmyk, 1.5, 1),
    ("TIFF", {}, ycbcr, 2, 1),
    ("TIFF", {}, sixteen_bit, 0, 0),
    ("TIFF", {"compression": "tiff_lzw"}, sixteen_bit, 0, 0),
    ("TIFF", {}, floats, 0, 0),
    ("TIFF", {"compression": "tiff_adobe_deflate"}, floats, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    "number", range(len(ZOO)), ids=[f"{z[0]}-{z[2].__name__}-{n}" for n, z in enumerate(ZOO)]
)
def test_every_orientation_and_shape(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_STRIP", 40)  # pixels: most pictures are converted in several pieces
    format, options, make, most, average = ZOO[number]
    for shape in SHAPES:
        image, expected = make(samples(*shape, 4, smooth=most > 2))
        for orientation, upright in UPRIGHT.items():
            data = saved(image, format, orientation, **options)
            found = open_picture(data).astype(float)
            target = upright(expected)
            assert found.shape == target.shape, (shape, orientation)
            off = np.abs(found - target)
            assert off.max() <= most, (shape, orientation)
            assert off.mean() <= average, (shape, orientation)


def saved(image: Image.Image, format: str, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if format == "MPO":
        options["append_images"] = [image.transpose(Image.Transpose.ROTATE_180)]
    file = io.BytesIO()
    image.save(file, format, exif=exif, **options)  # type: ignore[arg-type]
    return file.getvalue()


def refused(source: object, name: str = "the picture") -> str:
    """The sentence that refuses `source`."""
    with pytest.raises(PictureError) as caught:
        open_picture(source, name)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- levels: how samples become 8 bits


def tiff(array: np.ndarray, tags: list[tuple[object, ...]] = (), **options: object) -> bytes:  # type: ignore[assignment]
    file = io.BytesIO()
    tifffile.imwrite(
        file, array, extratags=[(*tag, True) for tag in tags], **{"photometric": "minisblack", **options}
    )
    return file.getvalue()


STEPS = np.linspace(0, 1, 256).reshape(16, 16)  # from black to white
GREY = grey(np.arange(256).reshape(16, 16))
ORDERS = ("<", ">")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ORDERS)
def test_unsigned_sixteen_bits_keep_their_upper_eight(order: str, compression: str | None) -> None:
    wide = (STEPS * 65535).astype(np.uint16)
    found = open_picture(tiff(wide, byteorder=order, compression=compression))
    np.testing.assert_array_equal(found, grey(wide >> 8))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_unsigned_thirty_two_bits_keep_their_upper_eight(compression: str | None) -> None:
    wide = (STEPS * (2**32 - 1)).astype(np.uint32)
    np.testing.assert_array_equal(open_picture(tiff(wide, compression=compression)), grey(wide >> 24))


@pytest.mark.parametrize("order", ORDERS)
def test_floats_reach_from_zero_to_one(order: str) -> None:
    np.testing.assert_array_equal(open_picture(tiff(STEPS.astype(np.float32), byteorder=order)), GREY)


@pytest.mark.parametrize("black_is_zero", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_white_is_zero(kind: type[np.generic], black_is_zero: bool) -> None:
    white = 1 if kind is np.float32 else np.iinfo(kind).max  # type: ignore[type-var]
    photometric = "minisblack" if black_is_zero else "miniswhite"
    found = open_picture(tiff((STEPS * white).astype(kind), photometric=photometric)).astype(int)
    assert np.abs(found - (GREY if black_is_zero else 255 - GREY.astype(int))).max() <= 1


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (np.uint16, 0, 4095),
        (np.uint16, 1000, 2000),
        (np.int16, -1000, 1000),
        (np.int32, 0, 255),
        (np.uint32, 0, 255),
        (np.float32, -3.5, 17.25),
        (np.float32, 0, 65535),
        (np.int8, -128, 127),
    ],
)
def test_the_range_that_a_tiff_names(kind: type[np.generic], low: float, high: float) -> None:
    """What it calls black and white are 0 and 255; between them, the nearest or the next below."""
    values = low + STEPS * (high - low)
    data = (values if kind is np.float32 else np.rint(values)).astype(kind)
    code = {np.uint16: "H", np.int16: "h", np.int32: "i", np.uint32: "I", np.float32: "f", np.int8: "b"}[kind]
    cast = float if kind is np.float32 else int
    found = open_picture(tiff(data, [(340, code, 1, cast(low)), (341, code, 1, cast(high))])).astype(int)
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)
    assert np.abs(found - GREY).max() <= 1


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14])
def test_fewer_bits_in_sixteen_are_refused(bits: int) -> None:
    narrow = (STEPS * (2**bits - 1)).astype(np.uint16)
    for source in (tiff(narrow), png(16, 16, 16, 0, narrow.astype(">u2").tobytes()), Image.fromarray(narrow)):
        assert f"from 0 to {2**bits - 1} where 65535 is white" in refused(source)
    colour = np.stack([narrow] * 3, -1)
    for source in (tiff(colour, photometric="rgb"), png(16, 16, 16, 2, colour.astype(">u2").tobytes())):
        assert "where 65,535 is white" in refused(source)


def test_black_is_black() -> None:
    for dtype in (np.uint16, np.uint32, np.float32):
        assert not open_picture(tiff(np.zeros((3, 4), dtype))).any()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        ((STEPS * 255).astype(np.uint32), "from 0 to 255 where 4.29497e+09 is white"),
        ((STEPS * 255).astype(np.int32), "signed samples, from 0 to 255"),
        ((STEPS * 65535 - 32768).astype(np.int16), "signed samples, from -32768 to 32767"),
        ((STEPS * 255 - 128).astype(np.int8), "signed samples, from -128 to 127"),
        ((STEPS * 255).astype(np.float32), "from 0 to 255 where 1 is white"),
        ((STEPS * 65535).astype(np.float32), "from 0 to 65535 where 1 is white"),
        ((STEPS - 0.5).astype(np.float32), "from -0.5 to 0.5 where 1 is white"),
        ((STEPS / 100).astype(np.float32), "from 0 to 0.01 where 1 is white"),
        (np.where(STEPS < 0.5, STEPS, np.nan).astype(np.float32), "no finite numbers"),
        (np.where(STEPS < 0.5, STEPS, np.inf).astype(np.float32), "no finite numbers"),
    ],
)
def test_an_unknown_range_is_refused(array: np.ndarray, said: str) -> None:
    assert said in refused(tiff(array))


def test_a_range_that_is_none() -> None:
    data = tiff((STEPS * 65535).astype(np.uint16), [(340, "H", 1, 7), (341, "H", 1, 7)])
    assert "from 7 to 7" in refused(data)
    for low, high in ((1.0, 0.0), (0.0, np.nan), (0.0, np.inf), (0.0, 1e-40), (-1e300, 1e300)):
        data = tiff(STEPS.astype(np.float32), [(340, "d", 1, low), (341, "d", 1, high)])
        assert f"from {low:g} to {high:g}" in refused(data)


def test_twelve_bits_are_scaled_by_their_number() -> None:
    """Written by hand: rows of packed 12-bit samples in a little-endian TIFF."""
    levels = (STEPS * 4095).astype(np.uint16)
    rows = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
        for a, b in levels.reshape(-1, 2).astype(int).tolist()
    )
    tags = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16)]
    data = little_tiff([*tags, (279, len(rows))], rows)
    np.testing.assert_array_equal(open_picture(data), grey(levels >> 4))


def little_tiff(tags: list[tuple[int, int]], rows: bytes) -> bytes:
    """A TIFF file, written by hand: `rows` from byte 8 on, then its directory."""
    directory = len(tags).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags
    )
    return b"II*\0" + (8 + len(rows)).to_bytes(4, "little") + rows + directory + bytes(4)


def test_channels_of_sixteen_bits_that_are_stored_apart() -> None:
    planes = np.random.default_rng(0).integers(0, 65536, (3, 20, 30), np.uint16)
    apart = {"photometric": "rgb", "planarconfig": "separate"}
    assert "stored apart" in refused(tiff(planes, **apart))  # Pillow reads noise
    found = open_picture(tiff(planes, compression="zlib", **apart))
    np.testing.assert_array_equal(found, planes.transpose(1, 2, 0) >> 8)


@pytest.mark.parametrize("white", [1, 100, 255, 1000, 4095, 65535])
def test_a_pgm_says_its_white(white: int) -> None:
    levels = np.rint(STEPS * white).astype(int)
    stored = levels.astype(np.uint8 if white < 256 else ">u2").tobytes()
    found = open_picture(b"P5 16 16 %d\n" % white + stored).astype(int)
    assert np.abs(found - grey(np.rint(levels * 255 / white))).max() <= 1


@pytest.mark.parametrize("file", [b"P1 2 1 0 1", b"P2 2 1 255 255 0", b"P5 2 1 255\n\xff\0", b"P4 2 1\n\x40"])
def test_a_picture_of_a_few_bytes(file: bytes) -> None:
    np.testing.assert_array_equal(open_picture(file), [[[255] * 3, [0] * 3]])


def test_a_range_that_colours_of_sixteen_bits_do_not_have() -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), np.uint16)
    for white in (4095, 32767):
        said = refused(
            tiff(levels >> 16 - white.bit_length(), [(341, "H", 3, (white,) * 3)], photometric="rgb")
        )
        assert f"from 0 to {white}, a range that is read for grey alone" in said
    same = open_picture(
        tiff(levels, [(340, "H", 3, (0,) * 3), (341, "H", 3, (65535,) * 3)], photometric="rgb")
    )
    np.testing.assert_array_equal(same, levels >> 8)


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """A chunk of a PNG; with `damage`, its check sum is wrong."""
    total = zlib.crc32(kind + data) ^ damage
    return len(data).to_bytes(4, "big") + kind + data + total.to_bytes(4, "big")


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"tEXt", b"a\0b", 1),
        chunk(b"gAMA", bytes(4), 1),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"ab"),
        chunk(b"pHYs", b"ab"),
        chunk(b"sRGB", b""),
        chunk(b"iCCP", b"abc"),
        chunk(b"eXIf", b"abc", 1),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
    ],
)
def test_a_pngs_optional_chunks_never_cost_the_picture(broken: bytes) -> None:
    image, expected = palette(samples(20, 30, 4, smooth=False))
    file = saved(image, "PNG", 6)
    np.testing.assert_array_equal(open_picture(file[:33] + broken + file[33:]), UPRIGHT[6](expected))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    file = stream.getvalue()  # without EXIF
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='3'/>")
    np.testing.assert_array_equal(open_picture(file[:33] + broken + xmp + file[33:]), UPRIGHT[3](expected))


def test_a_pngs_damaged_pixels_are_no_optional_chunk() -> None:
    file = bytearray(saved(rgb(samples(20, 30, 4, smooth=False))[0], "PNG"))
    file[20] ^= 1  # the width
    assert "not a picture that can be read" in refused(bytes(file))


def test_transparent_greys_of_every_depth() -> None:
    for depth in (1, 2, 4, 8, 16):
        levels = np.arange(4) % 2**depth if depth < 8 else np.array([0, 5, 130, 255])
        levels = levels * (257 if depth == 16 else 1)
        packed = levels.astype(">u2" if depth == 16 else np.uint8).tobytes()
        if depth < 8:
            bits = np.unpackbits(levels.astype(np.uint8)[:, None], 1)[:, -depth:]
            packed = np.packbits(bits.ravel()).tobytes()
        key = levels[1]
        found = open_picture(png(4, 1, depth, 0, packed, int(key).to_bytes(2, "big")))
        expected = np.where(levels == key, 255, levels * 255 // (2**depth - 1))
        np.testing.assert_array_equal(found[0], np.stack([expected] * 3, -1))


def test_a_transparent_colour_of_sixteen_bits() -> None:
    colours = np.array(
        [[256, 512, 60000], [257, 512, 60000], [256, 512, 60000], [256, 512, 60001]], np.uint16
    )
    data = png(4, 1, 16, 2, colours.astype(">u2").tobytes(), colours[0].astype(">u2").tobytes())
    expected = np.where((colours == colours[0]).all(-1, keepdims=True), 255, colours >> 8)
    np.testing.assert_array_equal(open_picture(data)[0], expected)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file, written by hand: what Pillow does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    if transparent:
        chunks.insert(1, chunk(b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# --- Pillow's images


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_a_pillow_image(mode: str) -> None:
    level = 255 if mode == "1" else 204  # of the palette that Pillow converts to
    image = Image.new("RGB", (5, 4), (level, level, level))
    via = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode)
    image = (image.convert(via) if via else image).convert(mode)
    found = open_picture(image).astype(int)
    assert found.shape == (4, 5, 3)
    assert np.abs(found - level).max() <= 2


def test_modes_without_a_white_are_refused() -> None:
    grey = Image.new("L", (5, 4), 200)
    assert "signed samples" in refused(grey.convert("I"))
    assert "where 1 is white" in refused(grey.convert("F"))
    assert "colour mode LAB" in refused(Image.new("LAB", (3, 3)))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_in_either_order(mode: str) -> None:
    wide = (STEPS * 65535).astype(np.uint16)
    kind = ">u2" if mode.endswith("B") else "<u2"
    image = Image.frombytes(mode, (16, 16), wide.astype(kind).tobytes())
    np.testing.assert_array_equal(open_picture(image), grey(wide >> 8))


# --- EXIF that is broken, and what else says how a picture is turned

ORIENTATION = bytes.fromhex("1201 0300 01000000 06000000".replace(" ", ""))  # 6, little-endian


def exif(*entries: bytes, head: bytes = b"II*\0\x08\0\0\0") -> bytes:
    return b"Exif\0\0" + head + len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)


BROKEN = {
    "a rational outside": (exif(ORIENTATION, bytes.fromhex("1a01050001000000ffffff7f")), 6),
    "a wrong type": (exif(ORIENTATION, bytes.fromhex("1a0163000100000000000000")), 6),
    "too many entries": (exif(ORIENTATION).replace(b"\x01\0\x12\x01", b"\xff\xff\x12\x01"), 6),
    "a directory outside": (exif(ORIENTATION, head=b"II*\0\xff\xff\xff\xff"), 1),
    "another header": (exif(ORIENTATION, head=b"XX*\0\x08\0\0\0"), 1),
    "an EXIF directory outside": (exif(ORIENTATION, bytes.fromhex("6987040001000000ffffffff")), 6),
    "orientation 0": (exif(ORIENTATION.replace(b"\x06", b"\x00")), 1),
    "orientation 9": (exif(ORIENTATION.replace(b"\x06", b"\x09")), 1),
    "as a long": (exif(bytes.fromhex("1201 0400 01000000 06000000".replace(" ", ""))), 6),
    "cut": (exif(ORIENTATION)[:20], 1),
    "empty": (b"Exif\0\0", 1),
    "twice": (b"Exif\0\0" + exif(ORIENTATION), 6),
}


@pytest.mark.parametrize("kind", list(BROKEN))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_broken_block_never_costs_the_picture(format: str, kind: str) -> None:
    block, orientation = BROKEN[kind]
    image, expected = rgb(samples(20, 30, 4, smooth=True))
    file = io.BytesIO()
    image.save(file, format, exif=block, **({"lossless": True} if format == "WEBP" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_picture(file.getvalue()).astype(int)
    assert found.shape == UPRIGHT[orientation](expected).shape
    assert np.abs(found - UPRIGHT[orientation](expected)).max() <= (10 if format == "JPEG" else 0)


def test_an_avif_says_by_itself_how_it_is_turned() -> None:
    image, expected = rgb(samples(20, 30, 4, smooth=True))
    data = saved(image, "AVIF", 6, xmp=b'<x tiff:Orientation="8"/>', quality=95, speed=10)
    assert np.abs(open_picture(data).astype(int) - UPRIGHT[6](expected)).max() <= 9
    data = saved(image, "AVIF", 1, xmp=b'<x tiff:Orientation="8"/>', quality=95, speed=10)
    assert np.abs(open_picture(data).astype(int) - expected).max() <= 9
    block = Image.Exif()
    block[0x0112], block[0x010E] = 6, "a picture"
    file = io.BytesIO()
    image.save(file, "AVIF", exif=block, quality=95, speed=10)
    data = file.getvalue()
    start = data.index(b"a picture") - 30
    for damage in (b"\xff" * 20, bytes(20)):
        broken = data[:start] + damage + data[start + 20 :]
        assert np.abs(open_picture(broken).astype(int) - UPRIGHT[6](expected)).max() <= 9


def test_a_tiff_with_a_broken_exif_directory_is_turned() -> None:
    rows = bytes(range(8))
    tags = [
        (256, 4),
        (257, 2),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (274, 6),
        (277, 1),
        (278, 2),
        (279, 8),
    ]
    expected = UPRIGHT[6](grey(np.arange(8).reshape(2, 4)))
    for value in (0xFFFFFFFF, 5, 8):
        for tag in (34665, 34853):
            found = open_picture(little_tiff([*tags, (tag, value)], rows))
            np.testing.assert_array_equal(found, expected)


def test_xmp_says_it_where_exif_does_not() -> None:
    image, expected = rgb(samples(20, 30, 4, smooth=False))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, xmp=b'<x tiff:Orientation="8"/>')
    np.testing.assert_array_equal(open_picture(file.getvalue()), UPRIGHT[8](expected))
    for packet in ("tiff:Orientation='8'", 'tiff:Orientation = "8"', "\ud800<tiff:Orientation>\n8<"):
        image.info["xmp"] = packet
        np.testing.assert_array_equal(open_picture(image), UPRIGHT[8](expected))


def test_an_opened_file_is_turned_as_the_file_is() -> None:
    for format in ("PNG", "TIFF"):
        image, expected = rgb(samples(20, 30, 4, smooth=False))
        opened = Image.open(io.BytesIO(saved(image, format, 6)))
        np.testing.assert_array_equal(open_picture(opened), UPRIGHT[6](expected))
        np.testing.assert_array_equal(open_picture(opened), UPRIGHT[6](expected))  # it is loaded now


# --- files that end early


@pytest.mark.parametrize(("height", "progressive"), [(24, False), (24, True), (200, False), (200, True)])
def test_a_jpeg_without_its_last_two_bytes_is_whole(height: int, progressive: bool) -> None:
    image, _ = rgb(samples(height, 160, 4, smooth=False))
    data = saved(image, "JPEG", progressive=progressive)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(open_picture(data[:-2]), open_picture(data))


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"progressive": True}])
def test_a_jpeg_whose_end_is_nul(options: dict[str, object]) -> None:
    """As a file has it that was given its size before a transfer broke off."""
    image, _ = rgb(samples(600, 400, 4, smooth=False))
    file = saved(image, "JPEG", 1, quality=85, **options)
    whole, cut = open_picture(file), len(file) * 99 // 100
    with pytest.warns(PictureWarning, match="of its 600 rows are missing") as noted:
        found = open_picture(file[:cut] + bytes(len(file) - cut))
    missing = int(str(noted[0].message).split(": ")[1].split()[0])
    assert 0 < missing < 60
    np.testing.assert_array_equal(found[: 600 - missing], whole[: 600 - missing])
    np.testing.assert_array_equal(open_picture(file + bytes(999)), whole)


def test_a_progressive_jpeg_may_lack_some_of_its_last_scan_and_no_other() -> None:
    image, _ = rgb(samples(400, 160, 4, smooth=False))
    data = saved(image, "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) == 10  # libjpeg's script
    last = len(data) - scans[-1]
    with pytest.warns(PictureWarning, match="of its 400 rows are missing"):
        found = open_picture(data[: len(data) - last // 20])
    wrong = np.flatnonzero((found != open_picture(data)).any((1, 2)))
    assert wrong.min() >= 360
    for cut in (scans[-1] - 2, scans[-1], (scans[-2] + 9 * scans[-1]) // 10, scans[5], scans[1]):
        assert "is damaged" in refused(data[:cut])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_a_tenth_of_the_rows_may_be_missing(format: str) -> None:
    image, _ = rgb(samples(400, 160, 4, smooth=False))
    image = image.convert("L") if format == "GIF" else image
    data = saved(image, format) if format in ("JPEG", "PNG", "TIFF") else plain(image, format)
    full = open_picture(data)
    with pytest.warns(PictureWarning, match="is not complete: [0-9]+ of its 400 rows are missing") as noted:
        found = open_picture(data[: int(len(data) * 0.95)], "photo")
    missing = int(str(noted[0].message).split()[4])
    assert 16 <= missing <= 40
    wrong = int((found != full).any((1, 2)).sum())
    assert missing - 16 <= wrong <= missing  # of a JPEG, the row of blocks that broke off counts as a whole
    for part in (0.85, 0.5, 0.1):
        assert "the rows" in refused(data[: int(len(data) * part)]).replace("its 400 rows", "the rows")


def plain(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"progressive": True}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"speed": 10}),
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"tiffinfo": {274: 3}}),
        ("TIFF", {"tiffinfo": {274: 3}, "compression": "tiff_lzw"}),
        ("TIFF", {"tiffinfo": {274: 6}}),
        ("TIFF", {"tiffinfo": {274: 6}, "compression": "tiff_lzw"}),
        ("GIF", {}),
        ("GIF", {"transparency": 0}),
        ("BMP", {}),
    ],
)
def test_cut_anywhere(format: str, options: dict[str, object]) -> None:
    """Refused, or of its rows no more than a tenth is wrong, of which a warning speaks."""
    image, _ = rgb(samples(100, 100, 4, smooth=False))
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    data = file.getvalue()
    full = open_picture(data)
    for part in (0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.93, 0.96, 0.98, 0.995):
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            try:
                found = open_picture(data[: int(len(data) * part)])
            except PictureError:
                continue
        differ = (found != full).any(2)
        wrong = int(min(differ.any(1).sum(), differ.any(0).sum()))  # what is stored as rows may be columns
        assert wrong <= 10
        assert bool(wrong) <= len(noted) <= 1


# --- too large


def test_bombs() -> None:
    assert f"larger than {PIXEL_LIMIT:,} pixels" in refused(png(30_000, 30_000, 1, 0, b"\0" * 30_000))
    assert f"sides of at most {SIDE_LIMIT:,}" in refused(
        png(SIDE_LIMIT + 1, 1, 1, 0, bytes(SIDE_LIMIT // 8 + 1))
    )
    assert "sides of at most" in refused(np.broadcast_to(np.uint8(0), (1, SIDE_LIMIT + 1, 3)))
    for format, at, sides in (
        ("BMP", 18, b"\xff\xff\0\0\xff\xff\0\0"),
        ("GIF", 6, b"\xff\xff\xff\xff"),
        ("JPEG", 163, b"\xff\xdc\xff\xdc"),
    ):
        data = bytearray(plain(Image.new("RGB", (9, 9)), format))
        assert data[at : at + len(sides)].count(9) == 2
        data[at : at + len(sides)] = sides
        assert "larger than" in refused(bytes(data))
    tags = [(256, 65535), (257, 65535), (258, 1), (259, 1), (262, 1), (273, 8), (277, 1), (279, 1)]
    assert "larger than" in refused(little_tiff(tags, b"\0"))


def test_the_longest_side_is_read() -> None:
    assert open_picture(png(SIDE_LIMIT, 1, 1, 0, b"\xff" * (SIDE_LIMIT // 8))).shape == (1, SIDE_LIMIT, 3)


def test_a_jpeg_of_a_million_scans() -> None:
    data = plain(Image.new("L", (2000, 2000)), "JPEG")
    body = data[data.index(b"\xff\xda") : -2]
    assert "scans" in refused(data[:-2] + body * 1000 + b"\xff\xd9")


def test_a_tiff_of_a_million_strips() -> None:
    many = (1 << 18) + 1
    tags = [(256, 1), (257, many), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    data = little_tiff(tags, bytes(4 * many))
    at = data.rindex((273).to_bytes(2, "little") + b"\4\0\1\0")
    data = data[: at + 4] + many.to_bytes(4, "little") + data[at + 8 :]
    assert "more than 262,144 strips" in refused(data)
    big = io.BytesIO()
    tifffile.imwrite(
        big, np.zeros((16, many), np.uint8), bigtiff=True, tile=(16, 16), photometric="minisblack"
    )
    assert open_picture(big.getvalue()).shape == (16, many, 3)
    big = io.BytesIO()
    tifffile.imwrite(
        big, np.zeros((many, 1), np.uint8), bigtiff=True, rowsperstrip=1, photometric="minisblack"
    )
    assert "more than 262,144 strips" in refused(big.getvalue())


def test_pillows_own_limit_may_be_lower(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "larger than 100 pixels" in refused(png(20, 20, 8, 0, bytes(400)))
    assert open_picture(png(9, 9, 8, 0, bytes(81))).shape == (9, 9, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    test_bombs()


def test_a_large_ppm_that_is_read_slowly() -> None:
    assert "PPM" in refused(b"P2 3000 3000 255 " + b"7 " * 9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_largest_pictures_take_less_than_two_gigabytes(tmp_path, kind: str) -> None:
    side = {"WEBP": 9459}.get(kind, 13377)
    Image.new("RGBA" if kind == "PNG" else "RGB", (side, side), (9, 99, 199)).save(
        tmp_path / "large", kind, **({"progressive": True} if kind == "JPEG" else {}), exif=exif(ORIENTATION)
    )
    code = (
        "import sys; from dualfocus.runtime import open_picture;"
        "print(open_picture(sys.argv[1]).shape);"
        # not getrusage: before exec, the child has the memory of these tests
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    shape, kilobytes = run.stdout.splitlines()
    assert shape == f"({side}, {side}, 3)"
    assert int(kilobytes) < 2_000_000


# --- what is not read, by name

FOREIGN = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg xmlns="http://www.w3.org/2000/svg">',
    "JPEG XL": b"\xff\x0a\xfa\x7f",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "Photoshop": b"8BPS\0\1",
    "ICO": b"\0\0\1\0\1\0",
    "raw file": b"II*\0\x10\0\0\0CR\2\0",
    "video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "GGUF": b"GGUF\3\0\0\0",
    "safetensors": b"\x40\0\0\0\0\0\0\0" + b'{"__metadata__":{}}',
    "ZIP": b"PK\3\4\x14\0",
    "archive": b"\x1f\x8b\x08\0",
    "NumPy": b"\x93NUMPY\1\0",
    "text": b"cat sits\non mat",
    "web page": b"\n<!DOCTYPE html><html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid",
    "DICOM": bytes(128) + b"DICM\2\0",
    "OpenEXR": b"\x76\x2f\x31\x01\2\0\0\0",
    "PAM": b"P7\nWIDTH 1\nHEIGHT 1\n",
    "PFM picture in colour": b"PF\n1 1\n-1.0\n",
    "PCX": b"\n\5\1\x08\0\0",
    "SGI": b"\x01\xda\x01\1\0\3",
}


@pytest.mark.parametrize("what", list(FOREIGN))
def test_what_is_no_picture_is_named(tmp_path, what: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(FOREIGN[what] + bytes(100 if what not in ("text", "web page") else 0))
    sentence = refused(path)
    assert sentence.startswith(f"{path} is ")
    assert what in sentence


def test_markup_without_end_is_no_riddle() -> None:
    assert "is text" in refused(b"<!---->" * 580)
    assert "is text" in refused(b"<?xml " + b" " * 4000)


@pytest.mark.parametrize("format", ["PCX", "SGI", "TGA", "IM", "DIB", "SPIDER"])
def test_other_formats_of_pillows_are_not_read(format: str) -> None:
    image = Image.new("F" if format == "SPIDER" else "RGB", (20, 20))
    named = {"PCX": "is a PCX picture, which", "SGI": "is an SGI picture, which"}
    said = named.get(format, "is not a picture that can be read, expected JPEG, PNG,")
    assert said in refused(plain(image, format))


def test_no_other_program_is_run(tmp_path, monkeypatch) -> None:
    """A `gs` that would leave a file is in the path; an EPS goes nowhere, opened by Pillow or not."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"
    refused(data)
    refused(Image.open(io.BytesIO(data)))
    assert not (tmp_path / "called").exists()


def test_a_cameras_raw_file_is_no_thumbnail() -> None:
    tags = [(256, 4), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 4)]
    for further, raw in (
        ([(50706, 0x401)], True),
        ([(254, 1), (330, 8)], True),
        ([(254, 1)], False),
        ([], False),
    ):
        data = little_tiff(sorted([*tags, *further]), bytes(4))
        if raw:
            assert "a camera's raw file" in refused(data)
        else:
            assert open_picture(data).shape == (1, 4, 3)


def test_heic(monkeypatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image, expected = rgb(samples(40, 60, 4, smooth=True))
    for orientation, upright in UPRIGHT.items():
        block = Image.Exif()
        block[0x0112] = orientation
        file = io.BytesIO()
        written = pillow_heif.from_pillow(image)
        written.save(file, quality=-1, chroma=444, exif=block.tobytes())
        found = open_picture(file.getvalue()).astype(int)
        assert np.abs(found - upright(expected)).max() <= 4, orientation
    assert "HEIF" not in Image.OPEN  # nothing is registered with Pillow
    assert "cannot be read" in refused(file.getvalue()[:-200])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install 'dualfocus[heif]'" in refused(file.getvalue())


@pytest.mark.parametrize(("format", "plugin"), [("AVIF", "AvifImagePlugin"), ("WEBP", "WebPImagePlugin")])
def test_a_pillow_that_was_built_without(format: str, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = plain(Image.new("RGB", (20, 20)), format)
    monkeypatch.setattr(f"PIL.{plugin}.SUPPORTED", False)
    monkeypatch.setattr("PIL.features.check", lambda _: False)
    assert f"is {format}, which the installed Pillow was built without" in refused(data)


# --- where pictures come from


def test_every_source_gives_the_same_pixels(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    image, expected = rgb(samples(7, 5, 4, smooth=False))
    path = tmp_path / "a.png"
    image.save(path)
    data = path.read_bytes()
    used = io.BytesIO(data)
    used.read()  # it is read from its beginning
    channels_last = torch.from_numpy(expected.copy())
    sources = [
        path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), used, image, expected,
        channels_last, channels_last.permute(2, 0, 1), expected[::-1][::-1],
    ]  # fmt: skip
    with path.open("rb") as opened:
        for source in [*sources, opened]:
            found = open_picture(source)
            np.testing.assert_array_equal(found, expected)
            assert found.flags.c_contiguous
            assert found.dtype == np.uint8
    channels_last[:] = 0
    found = open_picture(channels_last)
    channels_last[:] = 1
    assert not found.any()  # a copy


def test_what_is_no_source() -> None:
    torch = pytest.importorskip("torch")
    for source, said in (
        (torch.zeros(3, 4, 5), "the tensor is float32 of shape (3, 4, 5)"),
        (torch.zeros(3, 4, 3, dtype=torch.uint8), "both ways"),
        (torch.zeros(4, 5, dtype=torch.uint8), "uint8 of shape (4, 5)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8).to_sparse(), "the tensor cannot be read"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8, device="meta"), "the tensor cannot be read"),
        (np.zeros((4, 5), np.uint8), "uint8 of shape (4, 5), expected uint8 (H, W, 3)"),
        (np.zeros((4, 5, 3)), "float64"),
        ([1, 2], "of type list"),
        (None, "of type NoneType"),
        (io.StringIO("x"), "opened as text"),
        ("https://example.com/a//b.jpg?c", "https://example.com/a//b.jpg?c is a URL"),
        ("data:image/png;base64," + "A" * 9999, "a data: URI was given"),
        ("", "file name is empty"),
        (BUILT_IN, "is a bundle, expected a picture"),
        ("A" * 9999, "does not exist"),
        ("a\0b.png", "cannot be read"),
    ):
        sentence = refused(source)
        assert said in sentence
        assert len(sentence) < 250


def test_an_endless_device() -> None:
    assert refused("/dev/zero") == "/dev/zero is not a regular file"


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_pipe(buffering: int) -> None:
    image, expected = rgb(samples(300, 400, 4, smooth=False))  # more than a pipe holds
    data = saved(image, "PNG")
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb", buffering) as file:
        np.testing.assert_array_equal(open_picture(file), expected)
    thread.join()


class Reader:
    """All that is asked of a file object."""

    def __init__(self, result: object) -> None:
        self._result = result

    def read(self, size: int = -1) -> object:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def test_an_object_that_reads() -> None:
    image, expected = rgb(samples(7, 5, 4, smooth=False))
    data = saved(image, "PNG")
    for read in (data, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(open_picture(Reader(read)), expected)  # type: ignore[arg-type]
    assert "does not wait" in refused(Reader(None))
    assert "cannot be read: -3" in refused(Reader(zlib.error(-3)))
    assert "opened as text" in refused(Reader("text"))
    assert "cannot be read" in refused(io.BytesIO)  # the class
    assert refused(Reader(b"")) == "the picture is empty, expected a picture"


def test_a_closed_file(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with path.open("rb") as file:
        pass
    assert "closed" in refused(file)


# --- nothing of a library's reaches stderr

SILENT = """
import sys, threading
sys.path.insert(0, {tests!r})
import warnings
from test_fuzz_pictures import mutations
from dualfocus.runtime import InputError, PictureWarning, open_picture
warnings.simplefilter("always")
warnings.simplefilter("ignore", PictureWarning)
from test_pictures import little_tiff
logged = little_tiff([(256, 9), (257, 9), (258, 8), (262, 2), (273, 8), (277, 12288)], bytes(9))
def read(seed):
    for data in [logged, *mutations(seed, 100)]:
        try:
            open_picture(data)
        except InputError:
            pass
threads = [threading.Thread(target=read, args=[seed]) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
from PIL import TiffImagePlugin
print(warnings.filters[0][:3])
warnings.warn_explicit("still heard", UserWarning, "x", 1, module="PIL.x")
"""


def test_silence_in_threads() -> None:
    from pathlib import Path

    run = subprocess.run(
        [sys.executable, "-c", SILENT.format(tests=str(Path(__file__).parent))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "x:1: UserWarning: still heard\n")
    assert "PictureWarning" in run.stdout  # the caller's own filters are as they were


def test_libtiffs_own_words_are_heard_by_nobody(capfd) -> None:
    data = bytearray(saved(rgb(samples(90, 90, 4, smooth=False))[0], "TIFF", compression="tiff_lzw"))
    data[300:400] = b"\xff" * 100
    refused(bytes(data))
    threads = [threading.Thread(target=lambda: refused(bytes(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="decoder error"):
        Image.open(io.BytesIO(data)).load()  # Pillow by itself is as it was
    assert "tempfile.tif" in capfd.readouterr().err
