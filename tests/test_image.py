"""Pictures of every kind a user may have, and what is no picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dualfocus.runtime import PictureError, open_picture
from dualfocus.runtime.image import view, whole
from dualfocus.runtime.manifest import ImageSpec


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def assert_rgb(array: np.ndarray, height: int, width: int) -> None:
    assert (array.dtype, array.shape) == (np.uint8, (height, width, 3))
    assert array.flags.c_contiguous


@pytest.fixture
def image(picture) -> Image.Image:
    return Image.fromarray(picture)


def test_path_bytes_pillow_and_array_are_one_picture(tmp_path, image, picture):
    path = tmp_path / "a picture.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image, picture):
        array = open_picture(source)
        assert_rgb(array, 240, 320)
        np.testing.assert_array_equal(array, picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    upright = np.zeros((30, 50, 3), np.uint8)
    upright[:10, :20] = 200  # a mark in the upper left corner
    undo = {  # how a camera stored it, by EXIF's table
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(open_picture(encoded(stored, exif=exif)), upright)


def test_grey():
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    array = open_picture(encoded(Image.fromarray(grey)))
    np.testing.assert_array_equal(array, np.stack([grey] * 3, -1))


def test_one_bit():
    array = open_picture(encoded(Image.fromarray(np.eye(9, dtype=bool))))
    np.testing.assert_array_equal(array[..., 0], np.eye(9) * 255)


def test_palette(image):
    palette = image.quantize(17)
    np.testing.assert_array_equal(open_picture(encoded(palette)), np.asarray(palette.convert("RGB")))


def test_cmyk():
    array = open_picture(encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG", quality=95))
    assert_rgb(array, 10, 20)
    np.testing.assert_allclose(array, np.broadcast_to([255, 0, 0], (10, 20, 3)), atol=3)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(format):
    grey = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    array = open_picture(encoded(Image.fromarray(grey), format))
    np.testing.assert_array_equal(array, np.stack([grey >> 8] * 3, -1))


def test_sixteen_bit_colour():
    rgb = np.random.default_rng(0).integers(0, 65536, (10, 20, 3), np.uint16)
    array = open_picture(png(20, 10, 16, 2, rgb.astype(">u2").tobytes()))
    assert_rgb(array, 10, 20)
    np.testing.assert_array_equal(array, rgb >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    image = Image.new("RGBA", (4, 1), (100, 100, 100, 255))
    image.putpixel((0, 0), (100, 100, 100, 0))
    image.putpixel((1, 0), (100, 100, 100, 51))  # a fifth
    array = open_picture(encoded(image.convert(mode)))
    np.testing.assert_allclose(array[0, :, 0], [255, 224, 100, 100], atol=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_colour_is_white(format):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 100, 110, 120])
    image.putpixel((1, 0), 1)
    array = open_picture(encoded(image, format, transparency=1))
    np.testing.assert_array_equal(array[0], [[10, 20, 30], [255, 255, 255], [10, 20, 30]])


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(open_picture(data)[0, 0], [255, 0, 0])


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file, written by hand: what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = len(rows) // height if height else 0
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def refused(source: object) -> str:
    """The sentence that refuses `source`."""
    with pytest.raises(PictureError) as caught:
        open_picture(source)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


def test_missing(tmp_path):
    assert refused(tmp_path / "none.png").endswith("none.png does not exist")


def test_a_folder(tmp_path):
    assert "is a folder" in refused(tmp_path)


def test_a_file_in_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "does not exist" in refused(tmp_path / "file" / "a.png")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"not a picture", "is text"),
        (b"\x89PNG\r\n\x1a\n", "is not a picture"),
        (b"\xff\xd8\xff\xe0", "is not a picture"),
        (b"GIF89a\0", "is not a picture"),
        (b"II*\0\x08\0\0\0", "is a TIFF that is damaged or not supported"),
    ],
)
def test_no_picture(tmp_path, data, said):
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", data):
        assert said in refused(source)


def test_a_file_beyond_the_limit(tmp_path, image, monkeypatch):
    data = encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr("dualfocus.runtime.image.FILE_LIMIT", len(data))
    for source in (tmp_path / "a.png", data):
        open_picture(source)
    monkeypatch.setattr("dualfocus.runtime.image.FILE_LIMIT", len(data) - 1)
    for source in (tmp_path / "a.png", data):
        assert f"more than {len(data) - 1:,} bytes" in refused(source)


def test_want_of_memory_is_no_damage(image, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    for work in ("PIL.ImageFile.ImageFile.load", "PIL.Image.Image.crop"):
        with monkeypatch.context() as patched:
            patched.setattr(work, fail)
            with pytest.raises(MemoryError):
                open_picture(encoded(image))


def test_no_pixels():
    assert "0 x 5" in refused(Image.new("RGB", (0, 5)))
    refused(png(0, 5, 8, 2, b""))


def test_a_decompression_bomb():
    assert "larger than" in refused(png(30_000, 30_000, 1, 0, b""))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_another_array(array):
    assert "expected uint8 (H, W, 3)" in refused(array)


def test_a_view_is_the_kernels_of_a_crop(picture):
    spec = ImageSpec(14, 1, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "pad")
    assert whole(picture) == (0, 0, 320, 240)
    seen = view(picture, (10, 20, 60, 50), spec)
    cut = view(picture[20:50, 10:60], (0, 0, 50, 30), spec)
    assert (seen.shape, seen.dtype) == ((1, 3, 14, 14), np.float32)
    np.testing.assert_array_equal(seen, cut)
    pad = (np.array([127, 102, 76]) / 255 - spec.mean) / spec.std
    np.testing.assert_allclose(seen[0, :, 0, 0], pad, atol=1e-5)  # above a wide crop stands the mean colour
