"""Pictures from outside, as upright (H, W, 3) uint8 RGB arrays.

EXIF orientation is applied; grey, palette, CMYK and 16-bit pictures are converted; alpha is laid over
white. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dualfocus.kernels import crop_resize, cuda
from dualfocus.runtime.devices import Device
from dualfocus.runtime.engines import Array
from dualfocus.runtime.errors import PictureError
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.manifest import ImageSpec

Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB
FILE_LIMIT = 1 << 30  # bytes; uncompressed, the largest picture that is accepted has half of that

PictureSource = str | os.PathLike[str] | bytes | Image.Image | Picture


def whole(picture: Picture) -> Crop:
    """The crop that is all of it."""
    height, width = picture.shape[:2]
    return 0, 0, width, height


def view(picture: Picture, crop: Crop, image: ImageSpec) -> npt.NDArray[np.float32]:
    """What the vision tower sees of a crop, taken from the full-resolution pixels: (1, 3, S, S)."""
    fit = image.pad_colour if image.fit == "pad" else image.fit
    pixels = crop_resize(picture, crop, image.size, fit=fit, mean=image.mean, std=image.std)
    seen: npt.NDArray[np.float32] = pixels[None]
    return seen


def view_on_device(
    seen: Sequence[tuple[Picture, Crop]], image: ImageSpec, device: Device, stream: Any
) -> Array:
    """`view` of several crops, (N, 3, S, S) float16 on a GPU: only a crop's own pixels are uploaded.

    What `stream`, CuPy's, is given next finds them there.
    """
    fit = image.pad_colour if image.fit == "pad" else image.fit
    with stream:
        views = device.memory.empty((len(seen), 3, image.size, image.size), np.float16)
        for out, (picture, crop) in zip(views, seen, strict=True):
            cuda.crop_resize(
                picture, crop, image.size, fit=fit, mean=image.mean, std=image.std, out=out, stream=stream.ptr
            )
    return views


def open_picture(source: PictureSource, name: str = "the picture") -> Picture:
    """Read a picture from a path, an encoded file's bytes, a Pillow image or an (H, W, 3) uint8 array.

    `name` is what errors call a source that is no path. Raises PictureError when there is no usable
    picture, one of more pixels than twice Pillow's `Image.MAX_IMAGE_PIXELS` (about 179 million), which
    would be a decompression bomb, or a file of more than `FILE_LIMIT` bytes.
    """
    if isinstance(source, np.ndarray):
        return _check_array(source)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, name)
    if isinstance(source, bytes):
        file = source
    else:
        name, file = os.fspath(source), _read(Path(source))
    if not file:
        raise PictureError(f"{name} is empty")
    if len(file) > FILE_LIMIT:
        raise PictureError(f"{name} is larger than {FILE_LIMIT:,} bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the size that it refuses; one limit is enough
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(file))
    except Image.DecompressionBombError:
        raise PictureError(f"{name} is larger than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except MemoryError:
        raise
    except Exception:  # a damaged header raises whatever its decoder stumbled over
        raise PictureError(f"{name} is not a picture that can be read") from None
    return _upright_rgb(image, name)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FILE_LIMIT + 1)  # a device or a sparse file may never end
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise PictureError(f"{path} is a folder, expected a picture") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}") from None


def _check_array(array: npt.NDArray[np.generic]) -> Picture:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise PictureError(f"the array is {array.dtype} of shape {array.shape}, expected uint8 (H, W, 3)")
    return np.ascontiguousarray(array, np.uint8)


def _upright_rgb(image: Image.Image, name: str) -> Picture:
    if not (image.width and image.height):
        raise PictureError(f"{name} has no pixels: {image.width} x {image.height}")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, in Pillow's 16- or 32-bit integers
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.ascontiguousarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # truncated or damaged pixel data raises whatever its decoder stumbled over
        raise PictureError(f"{name} is damaged: {error}") from None
