"""Pictures from outside, as upright (H, W, 3) uint8 RGB arrays, and what a model sees of them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dualfocus.kernels import crop_resize, cuda
from dualfocus.runtime import decode, files
from dualfocus.runtime.devices import Device
from dualfocus.runtime.engines import Array
from dualfocus.runtime.errors import PictureError
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.manifest import ImageSpec

Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB
FILE_LIMIT = 1 << 30  # bytes; uncompressed, the largest picture that is accepted has half of that
_NAME_SHOWN = 200  # characters

# and a tensor of PyTorch, which this package does not import
PictureSource = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | Picture


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
    """Read a picture: (H, W, 3) uint8 RGB, upright, at most `decode.PIXEL_LIMIT` pixels.

    `source` is a file name, an encoded file's bytes, a binary file object (read from its beginning), a Pillow
    image, an (H, W, 3) uint8 array, or a uint8 tensor of PyTorch, (H, W, 3) or (3, H, W). `name` is what
    messages call a source without a file name. `decode` says which files are read, and how.

    Raises PictureError when there is no usable picture. Warns with PictureWarning when rows of it are
    missing, a tenth at most.
    """
    if isinstance(source, np.ndarray):
        return _check_array(source, "array")
    if isinstance(source, Image.Image):
        return decode.convert(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        file = bytes(source)
    elif isinstance(source, str | os.PathLike):
        name = _shown(os.fsdecode(source))
        file = _read(os.fsdecode(source))
    elif callable(getattr(source, "read", None)):
        own = getattr(source, "name", None)  # of what `open` opened; a number where that was a descriptor
        name = _shown(own) if isinstance(own, str) else name
        file = _read_object(source, name)
    elif (torch := sys.modules.get("torch")) is not None and isinstance(source, torch.Tensor):
        return _check_tensor(source)
    else:
        raise PictureError(
            f"{name} is of type {type(source).__name__}, expected a file name, bytes, a binary file object, "
            "a Pillow image or an array"
        )
    if not file:
        raise PictureError(f"{name} is empty, expected a picture")
    if len(file) > FILE_LIMIT:
        raise PictureError(f"{name} has more than {FILE_LIMIT:,} bytes")
    return decode.decode(file, name)


def _read(path: str) -> bytes:
    if not path:
        raise PictureError("the picture's file name is empty")
    if path[:5].lower() == "data:":
        raise PictureError(
            "a data: URI was given as a picture, expected a file name: decode it and give the bytes"
        )
    if files.URL.match(path) and not os.path.exists(path):
        raise PictureError(f"{_shown(path)} is a URL, expected a file name: download the picture first")
    if os.path.isdir(path):
        bundle = os.path.exists(os.path.join(path, "manifest.json"))
        what = (
            "a bundle, expected a picture: give it as the model" if bundle else "a folder, expected a picture"
        )
        raise PictureError(f"{_shown(path)} is {what}")
    if len(path) > _NAME_SHOWN and not os.path.exists(path):
        raise PictureError(f"{_shown(path)} does not exist")
    return files.read_bytes(Path(path), PictureError, limit=FILE_LIMIT)


def _read_object(source: Any, name: str) -> bytes:
    """The bytes of a file object."""
    try:
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        if isinstance(source, io.RawIOBase):  # one call of an unbuffered one may read a part
            buffered = io.BufferedReader(source)
            file = buffered.read(FILE_LIMIT + 1)
            buffered.detach()
        else:
            file = source.read(FILE_LIMIT + 1)
    except MemoryError:
        raise
    except Exception as error:  # ValueError of a closed one, or whatever one that decompresses raises
        raise PictureError(f"{name} cannot be read: {error}") from None
    if file is None:
        raise PictureError(f"{name} cannot be read: it does not wait for its content")
    if not isinstance(file, bytes | bytearray | memoryview):
        raise PictureError(f"{name} is a file opened as text, expected a binary one: open it with mode 'rb'")
    return bytes(file)


def _shown(path: str) -> str:
    """A file name as messages have it: what is longer was hardly meant as one."""
    return path if len(path) <= _NAME_SHOWN else path[:40] + "…"


def _check_tensor(tensor: Any) -> Picture:
    """A copy of PyTorch's tensor, with the channels last."""
    shape = tuple(tensor.shape)
    first, last = (len(shape) == 3 and shape[at] == 3 for at in (0, 2))
    if str(tensor.dtype) != "torch.uint8" or first == last:
        both = ", which can be read in both ways" if first and last else ""
        raise PictureError(
            f"the tensor is {str(tensor.dtype).removeprefix('torch.')} of shape {shape}{both}, "
            "expected uint8 (H, W, 3) or (3, H, W)"
        )
    try:
        array = tensor.detach().cpu().numpy()
    except (RuntimeError, TypeError) as error:  # a sparse one, or one without memory
        raise PictureError(f"the tensor cannot be read: {error}") from None
    return _check_array(np.array(array if last else array.transpose(1, 2, 0), order="C"), "tensor")


def _check_array(array: npt.NDArray[np.generic], kind: str) -> Picture:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise PictureError(f"the {kind} is {array.dtype} of shape {array.shape}, expected uint8 (H, W, 3)")
    if max(array.shape) > decode.SIDE_LIMIT:
        raise PictureError(
            f"the {kind} has the shape {array.shape}, expected sides of at most {decode.SIDE_LIMIT:,}"
        )
    return np.ascontiguousarray(array, np.uint8)
