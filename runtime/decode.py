"""A picture's file as upright (H, W, 3) uint8 RGB: what of it counts, and what is refused.

Formats: `formats.READ`, each by its own decoder alone, and HEIC where pillow-heif is installed. No other
program is ever run. Of an animation and of several pages the first counts.

Orientation is EXIF's, read on its own: a block that cannot be read means upright. HEIC and AVIF say it
themselves.

Levels: 8 bits a channel as they are, fewer spread over 0 to 255. Wider samples become 8 bits by the range
that the file gives:

- TIFF's SMinSampleValue and SMaxSampleValue, where it has them, are black and white; colours of 16 bits, of
  which Pillow keeps eight, are refused where these are not 0 and 65,535;
- else unsigned integers reach from 0 to their BitsPerSample, of 16 bits the upper eight count;
- else floats reach from 0 to 1;
- signed integers have no white of their own, and are refused.

A picture whose brightest sample lies below a quarter of that white was stored with another range, such as
12 bits in 16, and is refused, as are floats outside 0 to 1. WhiteIsZero is inverted.

Alpha and transparent colours are laid over white. An embedded colour profile (ICC) is ignored: models are
trained on pictures without, and pixels would depend on the LittleCMS that Pillow was built with.

Damage: a picture may lack a tenth of its rows, as one does whose transfer broke off; a PictureWarning says
how many. They are measured: rows are missing that decode differently when something else follows the file's
end (JPEG), or when something else was in memory before (other formats). Of a JPEG in several scans, the last
one has to have begun. WebP, AVIF and HEIC, which are decoded as a whole, have to be complete, and so have
pictures of more than `WHOLE_LIMIT` pixels. A PNG's optional chunks that are damaged are left out. A JPEG that
is damaged in its middle is decoded as libjpeg does, without a warning: Pillow does not pass on libjpeg's.

Memory: sides and pixels are checked before anything is decoded. Decoding takes Pillow's picture, 4 bytes a
pixel, and what its decoder keeps; converting takes Pillow's picture and the result, 3 bytes a pixel. The
largest pictures took 1.0 to 1.5 GB.
"""

from __future__ import annotations

import ctypes
import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
    features,
)

from dualfocus.runtime import formats
from dualfocus.runtime.errors import PictureError, PictureWarning

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB
SIDE_LIMIT = 1 << 24  # pixels, of the crop kernel
PIXEL_LIMIT = 178_956_970  # twice what Pillow warns of
WHOLE_LIMIT = PIXEL_LIMIT // 2  # of formats whose decoders keep further copies of the whole picture
SLOW_LIMIT = 1 << 22  # of PPM in text, or with another white than 255 and 65535
VALUES_LIMIT = 1 << 18  # of one TIFF tag: Pillow makes an object of each, and a decoder for each strip
SCAN_LIMIT = 3_000_000_000  # a JPEG's pixels times its scans: each goes over all of them
MISSING_ROWS = 0.1  # of all: what a picture may lack

_WHOLE = ("WEBP", "AVIF", "HEIF")
_STRIP = 1 << 20  # pixels that are converted at a time
_JPEG = ("JPEG", "MPO")
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"  # a JPEG's beginning and end
_PNG = b"\x89PNG\r\n\x1a\n"  # its beginning,
_PNG_XMP = b"XML:com.adobe.xmp\0\0"  # and of a chunk with an uncompressed XMP packet
_FILLERS = (bytes(range(1, 128)), b"\xaa" * 127, b"\xfe\xdc\xba" * 42)  # bits that differ from the first on
# of a JPEG's segments, which name their length
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([0-9])")

# how an AVIF names its EXIF block: an item's version, number and protection, then its type
_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)

# Pillow registers what is imported
_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

_UPRIGHT = {  # by EXIF's orientation: how to turn what is stored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF's and EXIF's tags
_BITS, _PHOTOMETRIC, _ORIENTATION, _PLANAR = 258, 262, 274, 284
_SUBFILE, _SUB_IFDS, _SAMPLE_FORMAT, _SMIN, _SMAX, _DNG = 254, 330, 339, 340, 341, 50706
_CFA, _LINEAR_RAW = 32803, 34892  # of a camera's sensor
_TAGS = (_BITS, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _SUBFILE, _SUB_IFDS, _SAMPLE_FORMAT, _SMIN, _SMAX, _DNG)
_UNSIGNED, _SIGNED = 1, 2  # of SampleFormat
_BYTES = (1, 2, 6, 7)  # types of one byte, which stay bytes

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors come out on stderr


def decode(file: bytes, name: str) -> Pixels:
    """The picture in an encoded file. `name` is what messages call it.

    Raises PictureError for what is no picture, is not read here, is too large, or is damaged. Warns with
    PictureWarning where rows are missing.
    """
    if (refusal := formats.refusal(file)) is not None:
        raise _refused(name, *refusal)
    if file.startswith(_SOI):  # what a transfer that broke off left empty would be decoded to pixels
        file = file.rstrip(b"\0")
    with _quiet:
        if formats.is_heif(file):
            return _upright_rgb(_open_heif(file, name), name, orientation=1)
        image = _open(file, name)
        _check_readable(image, name)
        scans = sum(1 for _ in _scans(file)) if image.format in _JPEG else 0
        if scans * image.width * image.height > SCAN_LIMIT:
            raise PictureError(f"{name} is a JPEG in {scans:,} scans, too many for its size: save it again")
        wide = _wide(image)
        image, missing = _load(image, file, name)
        image = _with_png_transparency(image, file, name)
        upright = _upright_rgb(image, name, wide=wide)
    if missing:
        text = f"{name} is not complete: {missing} of its {image.height} rows are missing"
        warnings.warn(PictureWarning(text), stacklevel=3)
    return upright


def convert(image: Image.Image, name: str) -> Pixels:
    """A Pillow image, which may be an opened file. Raises PictureError where it cannot be used."""
    if not (image.width and image.height):
        raise PictureError(f"{name} has no pixels: {image.width} x {image.height}")
    _check_size(image.size, image.format, name)
    if _tiles(image) and image.format == "EPS":  # decoding it would run another program
        raise _refused(name, "PostScript (EPS)", formats.SAVE)
    with _quiet:
        wide = _wide(image)
        if _tiles(image):
            _check_readable(image, name)
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # damaged pixels raise whatever their decoder stumbled over
            raise PictureError(f"{name} is damaged: {_line(error)}") from None
        return _upright_rgb(image, name, wide=wide)


class _Quiet:
    """While any thread is inside, Pillow warns nobody, and libtiff prints nothing on stderr.

    Python's filters and libtiff's handler belong to the process: they are set by whoever comes first and
    restored by whoever leaves last. Warnings of other modules are not touched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()
        self._handler: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.|pillow_heif")
                self._handler = _set_libtiff_handler(None)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _set_libtiff_handler(self._handler)
                self._filters.__exit__(None, None, None)


def _set_libtiff_handler(handler: int | None) -> int | None:
    """Set what libtiff does with errors, None for nothing; returns what it did before.

    Pillow silences libtiff's warnings alone, and offers no way to its errors. Where libtiff is not a library
    of its own, it cannot be reached, and nothing happens.
    """
    try:
        function = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    before: int | None = function(handler)
    return before


_quiet = _Quiet()


def _open(file: bytes, name: str) -> Image.Image:
    """The picture with its size and mode, not decoded."""
    if any(count > VALUES_LIMIT and kind not in _BYTES for _, kind, count, _ in _entries(file)):
        raise PictureError(f"{name} is a TIFF with more than {VALUES_LIMIT:,} strips or tiles: save it again")
    if file[4:8] == b"ftyp":  # AVIF stores its orientation itself: Pillow need not read its EXIF, and fail
        file = _EXIF_ITEM.sub(rb"\1free", file)
    try:
        image = _open_with_pillow(file)
    except Image.DecompressionBombError:
        raise _too_large(name, min(PIXEL_LIMIT, 2 * (Image.MAX_IMAGE_PIXELS or PIXEL_LIMIT))) from None
    except MemoryError:
        raise
    except Exception:  # a damaged header raises whatever its decoder stumbled over
        for feature, brand in (("avif", b"ftyp"), ("webp", b"WEBP")):
            if brand in file[:16] and not features.check(feature):
                raise PictureError(
                    f"{name} is {feature.upper()}, which the installed Pillow was built without: "
                    "pip install --force-reinstall pillow, or save the picture as PNG or JPEG"
                ) from None
        if file[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise PictureError(
                f"{name} is a TIFF that is damaged or not supported: save it with 8 bits a channel, or as PNG"
            ) from None
        raise PictureError(f"{name} is not a picture that can be read, expected {formats.NAMES}") from None
    _check_size(image.size, image.format, name)
    return image


def _open_with_pillow(file: bytes) -> Image.Image:
    """Raises whatever Pillow does."""
    try:
        return Image.open(io.BytesIO(file), formats=formats.READ)
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        if not file.startswith(_PNG):
            raise
    return Image.open(io.BytesIO(_without_extras(file)), formats=formats.READ)


def _without_extras(png: bytes) -> bytes:
    """A PNG with those of its optional chunks alone that count here, and are not damaged.

    Pillow refuses a picture for any that is damaged, or is a text of more than a megabyte.
    """
    kept, at = [png[: len(_PNG)]], len(_PNG)
    while len(png) - at >= 12:  # the length, the type and the check sum
        size, kind = struct.unpack_from(">I4s", png, at)
        chunk = png[at : at + 12 + size]
        counts = kind in (b"tRNS", b"eXIf") or (kind == b"iTXt" and chunk[8:].startswith(_PNG_XMP))
        if kind[:1].isupper() or (counts and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")):
            kept.append(chunk)
        at += 12 + size
    return b"".join(kept)


def _open_heif(file: bytes, name: str) -> Image.Image:
    """A HEIC picture, decoded and upright: its container says how it is turned."""
    try:
        import pillow_heif
    except ImportError:
        raise PictureError(
            f"{name} is a HEIC picture: pip install 'dualfocus[heif]', or save it as JPEG"
        ) from None
    try:
        found = pillow_heif.open_heif(io.BytesIO(file))
        _check_size(found.size, "HEIF", name)
        image: Image.Image = found.to_pillow()
    except (MemoryError, PictureError):
        raise
    except Exception as error:  # libheif's messages come as errors of many kinds
        raise PictureError(f"{name} is a HEIC picture that cannot be read: {_line(error)}") from None
    return image


def _check_size(size: tuple[int, int], format: str | None, name: str) -> None:
    limit = WHOLE_LIMIT if format in _WHOLE else PIXEL_LIMIT
    if max(size) > SIDE_LIMIT:
        raise PictureError(
            f"{name} has {size[0]} x {size[1]} pixels, expected sides of at most {SIDE_LIMIT:,}"
        )
    if size[0] * size[1] > limit:
        raise _too_large(name, limit)


def _line(error: Exception) -> str:
    """A library's message, shortened to a line; bytes of the file can be part of it."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(error).split())[:200])
    return line or type(error).__name__


def _refused(name: str, what: str, advice: str) -> PictureError:
    return PictureError(
        f"{name} is {what}, " + (f"which is not read: {advice}" if advice else "expected a picture")
    )


def _too_large(name: str, limit: int) -> PictureError:
    return PictureError(f"{name} is larger than {limit:,} pixels: reduce it first")


def _check_readable(image: Image.Image, name: str) -> None:
    """Refuse what Pillow opens, and reads wrongly or too slowly."""
    tags = _tags(image)
    if tags.get(_DNG) or tags.get(_PHOTOMETRIC) in (_CFA, _LINEAR_RAW):
        raw = True
    else:  # what comes first in most cameras' raw files is a thumbnail
        raw = tags.get(_SUBFILE, 0) == 1 and _SUB_IFDS in tags
    if raw:
        raise _refused(name, *formats.RAW)
    slow = any(codec in ("ppm", "ppm_plain") for codec, *_ in _tiles(image))  # decoded in Python
    if slow and image.width * image.height > SLOW_LIMIT:
        raise PictureError(
            f"{name} is a PPM in text, or with its own white, of more than {SLOW_LIMIT:,} pixels: "
            "save it as PNG"
        )
    apart = tags.get(_PLANAR) == 2 and max(tags.get(_BITS, (1,))) > 8
    if apart and _tiles(image)[0][0] == "raw":
        raise PictureError(
            f"{name} is a TIFF with channels of {max(tags[_BITS])} bits that are stored apart: "
            "save it with 8 bits a channel, or as PNG"
        )


def _tags(image: Image.Image) -> dict[int, Any]:
    """Those of a TIFF's tags that count here and can be read; none of other pictures."""
    directory = getattr(image, "tag_v2", {})
    found = {}
    for tag in _TAGS:
        try:
            if tag in directory:
                found[tag] = directory[tag]
        except Exception:  # Pillow decodes a value when it is read
            continue
    return found


def _tiles(image: Image.Image) -> list[Any]:
    """What of the file is not decoded yet: (codec, extents, offset, arguments)."""
    tiles: list[Any] = getattr(image, "tile", [])
    return tiles


def _load(image: Image.Image, file: bytes, name: str) -> tuple[Image.Image, int]:
    """Decode. Returns the picture, or what there is of it, and how many of its rows are missing."""
    try:
        image.load()
        return image, 0
    except MemoryError:
        raise
    except Exception as error:  # truncated or damaged pixels raise whatever their decoder stumbled over
        problem = _line(error)
    try:
        if image.width * image.height > WHOLE_LIMIT:  # there will be three of it
            raise ValueError("too large to compare")
        if image.format in _JPEG:
            image, missing = _partial_jpeg(file, name)
        else:
            image, missing = _partial(file, name)
    except MemoryError:
        raise
    except Exception:
        raise PictureError(f"{name} is damaged: {problem}") from None
    if missing > MISSING_ROWS * image.height:
        raise PictureError(
            f"{name} is damaged: {missing} of its {image.height} rows are missing, "
            f"expected at most {MISSING_ROWS:.0%} of them"
        )
    return image, missing


def _partial(file: bytes, name: str) -> tuple[Image.Image, int]:
    """What a decoder that broke off has written: over two fills, only missing rows differ."""
    parts = []
    for fill in (0, 1):
        image = _open(file, name)
        if image.format == "GIF" and "transparency" in image.info:
            raise ValueError("Pillow fills it with its own colour")
        image.im = Image.new(image.mode, image.size, fill).im
        try:
            image.load()
        except MemoryError:
            raise
        except Exception:
            image.tile = []  # type: ignore[attr-defined]
            image.load()
        parts.append(image)
    return parts[0], int(_rows_that_differ(*parts).sum())


def _partial_jpeg(file: bytes, name: str) -> tuple[Image.Image, int]:
    """A JPEG that lacks its end: over several continuations, rows differ from where it ended.

    Rows come in blocks of up to 16. A scan that has not begun would be missing from every row.
    """
    whole = _open(file + _EOI, name)
    whole.load()
    first = 0 if _coarse(file, len(whole.getbands())) else whole.height
    for filler in _FILLERS:
        other = _open(file + filler + _EOI, name)
        other.load()
        rows = _rows_that_differ(whole, other)
        if rows.any():
            row = int(rows.argmax())
            first = min(first, row, (row + 1) // 16 * 16)  # colours reach into the row above a block
    return whole, whole.height - first


def _rows_that_differ(one: Image.Image, other: Image.Image) -> npt.NDArray[np.bool_]:
    """(H,) bool."""
    found = [
        (np.asarray(a) != np.asarray(b)).reshape(a.height, -1).any(1)
        for a, b in zip(_strips(one), _strips(other), strict=True)
    ]
    return np.concatenate(found)


def _scans(file: bytes) -> Iterator[bytes]:
    """The headers of a JPEG's scans: its channels, the coefficients and their bits that each brings."""
    at = 0
    while (marker := _MARKER.search(file, at)) and marker[1] != b"\xd9":
        at = marker.end() + int.from_bytes(file[marker.end() : marker.end() + 2], "big")
        if marker[1] == b"\xda":
            yield file[marker.end() + 2 : at]


def _coarse(file: bytes, channels: int) -> bool:
    """Whether a JPEG ends before the scan has begun that brings the last bits of its coefficients."""
    missing: dict[int, list[int]] = {}  # bits of each channel's 64 coefficients
    for scan in _scans(file):
        ends = 1 + 2 * scan[0]
        first, last, bits = scan[ends : ends + 3]
        for channel in scan[1:ends:2]:
            missing.setdefault(channel, [1] * 64)[first : last + 1] = [bits & 15] * (last + 1 - first)
    return len(missing) < channels or any(map(any, missing.values()))


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """The picture from top to bottom, `_STRIP` pixels at a time."""
    step = max(1, _STRIP // image.width)
    for top in range(0, image.height, step):
        yield image.crop((0, top, image.width, min(top + step, image.height)))


def _bands(image: Image.Image) -> list[tuple[int, int]]:
    """The lowest and the highest value of each channel."""
    found: Any = image.getextrema()
    return [found] if len(image.getbands()) == 1 else list(found)


def _upright_rgb(image: Image.Image, name: str, orientation: int | None = None, wide: bool = False) -> Pixels:
    """A decoded picture, turned and converted strip by strip. `wide`: its colours had 16 bits a channel."""
    orientation = _orientation(image) if orientation is None else orientation
    turn = _UPRIGHT.get(orientation)
    sideways, backwards = orientation in (5, 6, 7, 8), orientation in (3, 4, 6, 7)
    height, width = image.height, image.width
    upright = np.empty((width, height, 3) if sideways else (height, width, 3), np.uint8)
    try:
        to_rgb = _conversion(image, name, wide)
        top = 0
        for strip in _strips(image):
            rgb = to_rgb(strip)
            bottom = top + strip.height
            rows = slice(height - bottom, height - top) if backwards else slice(top, bottom)
            part = upright[:, rows] if sideways else upright[rows]
            part[...] = np.asarray(rgb if turn is None else rgb.transpose(turn))
            top = bottom
    except (MemoryError, PictureError):
        raise
    except Exception as error:  # Pillow meets palettes and transparencies that fit no picture
        raise PictureError(f"{name} is damaged: {_line(error)}") from None
    return upright


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, or XMP's where EXIF has none; 1 where it cannot be read.

    Pillow gives an AVIF's own as if it were EXIF's.
    """
    tags = _tags(image)  # Pillow turns TIFFs, and then removes the tag
    found: int | None = tags.get(_ORIENTATION) if tags else _exif_orientation(_exif(image))
    if found is None and image.format != "AVIF":
        found = _xmp_orientation(image)
    return found if found is not None and found in range(1, 9) else 1


def _exif(image: Image.Image) -> bytes:
    block = image.info.get("exif")
    if block is None and isinstance(text := image.info.get("Raw profile type exif"), str):  # ImageMagick's
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return b""
    return block if isinstance(block, bytes) else b""


def _exif_orientation(block: bytes) -> int | None:
    """Of the first directory, whatever else that has; None where there is none, or it is broken."""
    block = block.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")  # some cameras write it twice
    order = "little" if block[:2] == b"II" else "big"
    for tag, kind, _, at in _entries(block):
        if tag == _ORIENTATION:
            size = {1: 1, 3: 2, 4: 4}.get(kind, 2)
            return int.from_bytes(block[at : at + size], order)  # type: ignore[arg-type]
    return None


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of the first directory of a TIFF file, or of an EXIF block: tag, type, number of values, their place.

    Ends where the directory is broken.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return
    try:
        if struct.unpack_from(order + "H", tiff, 2) == (43,):  # BigTIFF
            (start,) = struct.unpack_from(order + "Q", tiff, 8)
            (number,) = struct.unpack_from(order + "Q", tiff, start)
            first, size, form = start + 8, 20, order + "HHQ"
        else:
            (start,) = struct.unpack_from(order + "I", tiff, 4)
            (number,) = struct.unpack_from(order + "H", tiff, start)
            first, size, form = start + 2, 12, order + "HHI"
        for at in range(first, first + min(number, 65535) * size, size):
            tag, kind, count = struct.unpack_from(form, tiff, at)
            yield tag, kind, count, at + struct.calcsize(form)
    except (struct.error, OverflowError):
        return


def _xmp_orientation(image: Image.Image) -> int | None:
    for key in ("XML:com.adobe.xmp", "xmp"):
        packet = image.info.get(key)
        if isinstance(packet, str):
            packet = packet.encode(errors="replace")
        if isinstance(packet, bytes) and (found := re.search(_XMP_ORIENTATION, packet)):
            return int(found[1])
    return None


def _conversion(image: Image.Image, name: str, wide: bool) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of any part of a picture."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or _sample_format(image) == _SIGNED:
        return _Levels(image, name)
    if image.mode not in (
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
    ):
        raise PictureError(f"{name} has the colour mode {image.mode}, which is not read: convert it to RGB")
    if wide and image.mode in ("RGB", "RGBA"):
        tags = _tags(image)
        black, white = _first(tags.get(_SMIN, 0)), _first(tags.get(_SMAX, 65535))
        if (black, white) != (0, 65535):
            raise PictureError(
                f"{name} has colours of 16 bits that reach from {black:g} to {white:g}, a range that is read "
                "for grey alone: convert it to 8 bits a channel"
            )
        highest = max(high for _, high in _bands(image)[:3])
        if highest < 64:
            raise PictureError(
                f"{name} has samples below {(highest + 1) << 8:,} where 65,535 is white: scale them to that, "
                "or convert the picture to 8 bits a channel"
            )
    if image.has_transparency_data:
        return _over_white
    return lambda part: part.convert("RGB")


def _over_white(part: Image.Image) -> Image.Image:
    part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")


def _sample_format(image: Image.Image) -> int:
    return int(_first(_tags(image).get(_SAMPLE_FORMAT, _UNSIGNED)))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _unknown_range(name: str, found: str, white: str) -> PictureError:
    return PictureError(
        f"{name} has samples {found} where {white} is white: scale them to that, convert the picture to "
        "8 bits a channel, or give the range in TIFF's SMinSampleValue and SMaxSampleValue"
    )


class _Levels:
    """From samples wider than 8 bits, or signed, to grey; the rule is this module's docstring."""

    def __init__(self, image: Image.Image, name: str) -> None:
        """Raises PictureError where the range is unknown."""
        tags = _tags(image)
        self._unsigned = bool(tags) and _sample_format(image) == _UNSIGNED
        self._inverted = bool(tags) and tags.get(_PHOTOMETRIC, 0) == 0
        self._transparent = image.info.get("transparency")
        extremes = [(part.min(), part.max()) for part in map(self._samples, _strips(image))]
        lowest, highest = (
            float(f(ends)) for f, ends in zip((min, max), zip(*extremes, strict=True), strict=True)
        )
        self._float = image.mode == "F"
        if not np.isfinite([lowest, highest]).all():
            raise PictureError(
                f"{name} has samples that are no finite numbers: convert it to 8 bits a channel"
            )
        if _SMAX in tags:
            self._black, self._white = float(_first(tags.get(_SMIN, 0))), float(_first(tags[_SMAX]))
            if not 1e-30 < self._white - self._black < 1e30:
                raise PictureError(
                    f"{name} says that its samples reach from {self._black:g} to {self._white:g}: "
                    "convert it to 8 bits a channel"
                )
            return
        self._black = 0.0
        if self._float:
            self._white = 1.0
        elif self._unsigned:
            self._white = 2.0 ** int(_first(tags.get(_BITS, 1))) - 1
        elif image.mode.startswith("I;16") or image.format == "PPM":
            self._white = 65535.0
        else:
            raise PictureError(
                f"{name} has signed samples, from {lowest:g} to {highest:g}, of an unknown range: convert it "
                "to 8 bits a channel, or give the range in TIFF's SMinSampleValue and SMaxSampleValue"
            )
        if lowest < 0 or highest > self._white or 0 < highest < (self._white + (not self._float)) / 4:
            raise _unknown_range(name, f"from {lowest:g} to {highest:g}", f"{self._white:g}")

    def __call__(self, part: Image.Image) -> Image.Image:
        samples = self._samples(part)
        levels = np.clip(samples.astype(np.float64), self._black, self._white) - self._black
        if self._float:
            grey = np.rint(levels * (255 / (self._white - self._black))).astype(np.uint8)
        else:
            grey = np.floor(levels * 256 / (self._white - self._black + 1)).astype(np.uint8)
        if self._inverted:
            grey = 255 - grey
        if isinstance(self._transparent, int):
            grey = np.where(samples == self._transparent, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")

    def _samples(self, part: Image.Image) -> npt.NDArray[Any]:
        """As the file has them; Pillow holds unsigned 32 bits as signed, and signed 8 bits as unsigned."""
        samples = np.asarray(part)
        if samples.dtype == np.int32 and self._unsigned:
            return samples.view(np.uint32)
        return samples.view(np.int8) if samples.dtype == np.uint8 else samples


def _with_png_transparency(image: Image.Image, file: bytes, name: str) -> Image.Image:
    """A PNG's transparent colour, which Pillow compares with 8 bits whatever the file has.

    It reads grey of 16 bits as 16, where the comparison is right.
    """
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return image
    depth = file[24]
    if image.mode == "L":
        image.info["transparency"] = colour * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and depth == 16:
        low = _open(file, name)
        low.tile = [tile._replace(args="RGB;16L") for tile in _tiles(low)]  # type: ignore[attr-defined]
        low.load()
        del image.info["transparency"]
        alpha = Image.new("L", image.size, 255)
        top = 0
        for high_part, low_part in zip(_strips(image), _strips(low), strict=True):
            same = np.asarray(high_part) == np.array(colour) >> 8
            same &= np.asarray(low_part) == np.array(colour) & 255
            alpha.paste(0, (0, top), Image.fromarray(same.all(-1)))
            top += high_part.height
        image.putalpha(alpha)
    return image


def _wide(image: Image.Image) -> bool:
    """Whether a picture that is not decoded yet has colours of 16 bits, of which Pillow keeps eight."""
    for _, _, _, arguments in _tiles(image):
        first = _first(arguments)
        if isinstance(first, str) and re.match(r"(RGB[AaX]?|LA);16[LBN]", first):
            return True
        if image.format == "PPM" and isinstance(arguments, tuple) and arguments[1] > 255:
            return True
    return False
