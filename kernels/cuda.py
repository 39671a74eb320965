"""The crop kernel on an NVIDIA GPU: `crop_resize` into memory there, the bits those of the one in C.

The picture may lie in host memory, of which the box alone is uploaded, or on the GPU; it may be RGB or, as
cameras deliver it, NV12. `upload` keeps a picture on the GPU for several crops.

The library (crop.cu) is made when dualfocus is built, if nvcc is there, and is loaded at the first call;
`unavailable` says why it cannot be used. All happens on the device that the calling thread uses, the first
unless another was chosen. Its scratch memory there, as large as the largest crop so far needed, stays.
"""

import ctypes
import functools
import math
import operator
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, get_args

import numpy as np
import numpy.typing as npt

from dualfocus.kernels import Fit, _crop, _normalisation, _triple

__all__ = ["DeviceArray", "Nv12", "available", "crop_resize", "unavailable", "upload"]

FOLDER = Path(__file__).parent

Matrix = Literal["bt601", "bt709"]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)  # crop.cu has them in this order


@dataclass(frozen=True)
class Nv12:
    """A picture of H x W pixels as cameras and decoders deliver it, in limited range.

    y_plane: (H, W) uint8. uv_plane: (ceil(H / 2), ceil(W / 2), 2) uint8, a pair for each square of two by two
    pixels. Both in host memory or both on the GPU, their rows packed and any distance apart. matrix: "bt601"
    or "bt709", the standard the colours were coded by. `reference.nv12_to_rgb` is the rule.
    """

    y_plane: Any
    uv_plane: Any
    matrix: Matrix


class DeviceArray:
    """A packed array in the GPU's memory, which is freed when the last reference goes."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Not initialised. Raises RuntimeError where there is no GPU, or not enough memory on it."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        gpu = _gpu()
        memory = ctypes.c_void_p()
        gpu.call("allocate", ctypes.byref(memory), math.prod(shape) * self.dtype.itemsize)
        self.pointer = memory.value or 0
        weakref.finalize(self, gpu.call, "free", self.pointer)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }

    def numpy(self) -> npt.NDArray[Any]:
        """A copy in host memory, once all that the default stream has to do is done."""
        copy = np.empty(self.shape, self.dtype)
        _gpu().call("copy", copy.ctypes.data, self.pointer, copy.nbytes)
        return copy


def available() -> bool:
    """Whether there is a GPU here, and the library for it."""
    return unavailable() is None


def unavailable() -> str | None:
    """Why crops cannot be made on a GPU here, in a sentence; None where they can."""
    try:
        _gpu()
    except RuntimeError as reason:
        return str(reason)
    return None


def upload(array: npt.NDArray[Any]) -> DeviceArray:
    """A packed copy on the GPU: of a picture, or of a plane of one, for many crops.

    Raises ValueError for what is no numpy array, RuntimeError where there is no GPU or no room on it.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError(f"array must be a numpy array, got {type(array)}")
    packed = np.ascontiguousarray(array)
    copy = DeviceArray(packed.shape, packed.dtype)
    _gpu().call("copy", copy.pointer, packed.ctypes.data, packed.nbytes)
    return copy


def crop_resize(
    source: Any,
    box: Sequence[SupportsIndex],
    size: int,
    *,
    fit: Fit,
    mean: Sequence[float],
    std: Sequence[float],
    out: Any,
    stream: int = 0,
) -> None:
    """`dualfocus.kernels.crop_resize` into memory on the GPU, the same bits.

    source: (H, W, 3) uint8, the rows packed and any distance apart: a numpy array, whatever has
    ``__cuda_array_interface__`` or ``__dlpack__``; or an `Nv12` of such planes. box, size, fit, mean, std: as
    there. out: a packed (3, size, size) or (1, 3, size, size), float32 or float16, with
    ``__cuda_array_interface__`` or ``__dlpack__`` on the GPU; or (pointer, dtype). stream: a CUDA stream's
    handle.

    A crop out of host memory is done on return. One out of the GPU's may still be under way in the stream:
    its source and out must stay until the stream has passed it.

    Raises ValueError for anything else, saying what was found and what was expected; RuntimeError where there
    is no GPU, or it fails.
    """
    stream = _stream(stream)
    planes, matrix = _planes(source, stream)
    height, width = planes[0].shape[:2]
    request = _crop.request(height, width, box, size, fit)
    pointer, dtype, _owner = _output(out, operator.index(size), stream)
    table = _normalisation(_triple("mean", mean), _triple("std", std), dtype)
    place = _Source(
        (ctypes.c_void_p * 2)(*(plane.pointer for plane in planes)),
        (ctypes.c_ssize_t * 2)(*(plane.strides[0] for plane in planes)),
        -1 if matrix is None else MATRICES.index(matrix),
        planes[0].on_host,
    )
    _gpu().crop(request, place, table, pointer, stream)


class _Source(ctypes.Structure):
    """crop.cu's crop_cuda_source."""

    _fields_ = (
        ("planes", ctypes.c_void_p * 2),
        ("strides", ctypes.c_ssize_t * 2),
        ("matrix", ctypes.c_int32),
        ("on_host", ctypes.c_int32),
    )


class _Gpu:
    """The loaded library. Raises RuntimeError where it is missing or finds no GPU."""

    def __init__(self) -> None:
        path = next(FOLDER.glob("_crop_cuda.*so"), None)  # setuptools names the ABI between
        if path is None:
            raise RuntimeError("dualfocus was built without its CUDA kernel: that takes nvcc")
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"the CUDA kernel cannot be loaded: {error}") from None
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, arguments in {
            "driver": [pointer],
            "device": [pointer],
            "allocate": [pointer, size],
            "free": [pointer],
            "copy": [pointer, pointer, size],
            "synchronize": [pointer],
            "workspace": [pointer],
            "crop": [pointer, ctypes.c_char_p, pointer, pointer, size, pointer, pointer],
        }.items():
            getattr(self.library, f"dualfocus_cuda_{name}").argtypes = arguments
        self.library.dualfocus_cuda_error.restype = ctypes.c_char_p
        self.lock = threading.Lock()
        self.workspaces: dict[int, ctypes.c_void_p] = {}  # by device

        driver = ctypes.c_int()
        self.call("driver", ctypes.byref(driver))
        if driver.value == 0:
            raise RuntimeError("there is no CUDA driver on this machine")
        self.device()

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, f"dualfocus_cuda_{name}")(*arguments)
        if code != 0:
            text = self.library.dualfocus_cuda_error(code).decode()
            raise RuntimeError(f"CUDA failed to {DOING[name]}: {text} (error {code})")

    def device(self) -> int:
        found = ctypes.c_int()
        self.call("device", ctypes.byref(found))
        return found.value

    def crop(self, request: bytes, source: _Source, table: npt.NDArray[Any], out: int, stream: int) -> None:
        with self.lock:
            device = self.device()
            if device not in self.workspaces:
                made = ctypes.c_void_p()
                self.call("workspace", ctypes.byref(made))
                self.workspaces[device] = made
            self.call(
                "crop",
                self.workspaces[device],
                request,
                ctypes.byref(source),
                table.ctypes.data,
                table.itemsize,
                out,
                stream,
            )


DOING = {
    "driver": "tell the driver's version",
    "device": "find a GPU",
    "allocate": "allocate memory",
    "free": "free memory",
    "copy": "copy between the host and the GPU",
    "synchronize": "wait for a stream",
    "workspace": "prepare for crops",
    "crop": "crop",
}


@functools.cache
def _gpu() -> _Gpu:
    return _Gpu()


class _View(NamedTuple):
    """An array, wherever it lies."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: np.dtype[Any]
    on_host: bool
    read_only: bool
    owner: object  # keeps the memory


class _DlTensor(ctypes.Structure):
    """The beginning of DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in items; NULL: packed
        ("byte_offset", ctypes.c_uint64),
    )


DL_CUDA, DL_CUDA_MANAGED = 2, 13
DL_KINDS = "iuf"  # signed, unsigned, floating point


def _view(name: str, value: Any, stream: int) -> _View | None:
    """The array that `value` shows, ready for use in the stream; None if it shows none."""
    if isinstance(value, np.ndarray):
        return _View(
            value.ctypes.data, value.shape, value.strides, value.dtype, True, not value.flags.writeable, value
        )
    if hasattr(value, "__cuda_array_interface__"):
        shown = value.__cuda_array_interface__
        pointer, read_only = shown["data"]
        shape, dtype = tuple(shown["shape"]), np.dtype(shown["typestr"])
        strides = shown.get("strides") or _packed(shape, dtype.itemsize)
        if shown.get("stream") not in (None, stream):
            _gpu().call("synchronize", shown["stream"])
        return _View(pointer, shape, tuple(strides), dtype, False, read_only, value)
    if not hasattr(value, "__dlpack__"):
        return None
    if value.__dlpack_device__()[0] not in (DL_CUDA, DL_CUDA_MANAGED):
        return _view(name, np.from_dlpack(value), stream)
    capsule = value.__dlpack__(stream=stream or 1)  # which is the default stream's name there
    tensor = _DlTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    if tensor.type_code >= len(DL_KINDS) or tensor.type_lanes != 1:
        raise ValueError(
            f"{name} must hold whole numbers or floats, its DLPack type has the code {tensor.type_code}"
        )
    dtype = np.dtype(f"{DL_KINDS[tensor.type_code]}{tensor.type_bits // 8}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = _packed(shape, dtype.itemsize)
    if tensor.strides:
        strides = tuple(items * dtype.itemsize for items in tensor.strides[: tensor.ndim])
    # The capsule is not renamed, so that it still owns the tensor, and frees it when it goes.
    return _View((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, False, False, capsule)


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes, _capsule_pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def _packed(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _stream(stream: int) -> int:
    try:
        handle = operator.index(stream)
    except TypeError:
        handle = -1
    if handle < 0:
        raise ValueError(f"stream must be a CUDA stream's handle, a whole number from 0 on, got {stream!r}")
    return handle


def _planes(source: Any, stream: int) -> tuple[tuple[_View, ...], Matrix | None]:
    """The planes of a picture, RGB in one, and the matrix of NV12."""
    if not isinstance(source, Nv12):
        return (_pixels("source", source, "(height, width, 3)", 3, stream),), None
    if source.matrix not in MATRICES:
        raise ValueError(f"matrix must be 'bt601' or 'bt709', got {source.matrix!r}")
    luma = _pixels("y_plane", source.y_plane, "(height, width)", 1, stream)
    chroma = _pixels("uv_plane", source.uv_plane, "(height / 2, width / 2, 2)", 2, stream)
    height, width = luma.shape
    if chroma.shape != ((height + 1) // 2, (width + 1) // 2, 2):
        raise ValueError(
            f"uv_plane must have the shape ({(height + 1) // 2}, {(width + 1) // 2}, 2), half of y_plane's, "
            f"it has {chroma.shape}"
        )
    if luma.on_host != chroma.on_host:
        raise ValueError("y_plane and uv_plane must lie both in host memory or both on the GPU")
    return (luma, chroma), source.matrix


def _pixels(name: str, value: Any, wanted: str, depth: int, stream: int) -> _View:
    """A plane of `depth` bytes a pixel, checked."""
    view = _view(name, value, stream)
    if view is None:
        raise ValueError(
            f"{name} must be a uint8 array {wanted}, a numpy one or with __cuda_array_interface__ or "
            f"__dlpack__, got {type(value)}"
        )
    if view.dtype != np.uint8:
        raise ValueError(f"{name} must hold uint8, it holds {view.dtype}")
    inner = () if depth == 1 else (depth,)
    if len(view.shape) != 2 + len(inner) or view.shape[2:] != inner or 0 in view.shape:
        raise ValueError(f"{name} must have the shape {wanted}, it has {view.shape}")
    if view.strides[2:] not in ((), (1,)) or (view.strides[1] != depth and view.shape[1] > 1):
        steps = "(any, 1)" if depth == 1 else f"(any, {depth}, 1)"
        raise ValueError(f"{name} must have the strides {steps}, packed rows; it has {view.strides}")
    return view


def _output(out: Any, size: int, stream: int) -> tuple[int, np.dtype[Any], object]:
    """Where the result goes: a pointer, the type, and what keeps the memory."""
    if isinstance(out, tuple):
        pointer, dtype = _pointer_and_type(out)
        owner: object = None
    else:
        view = _view("out", out, stream)
        if view is None or view.on_host:
            raise ValueError(
                "out must lie on the GPU, with __cuda_array_interface__ or __dlpack__, or be "
                f"(pointer, dtype), got {type(out)}"
            )
        packed = (3, size, size)
        if view.shape not in (packed, (1, *packed)):
            raise ValueError(f"out must have the shape {packed}, or 1 before that, it has {view.shape}")
        steps = zip(view.shape, view.strides, _packed(view.shape, view.dtype.itemsize), strict=True)
        if any(side > 1 and found != wanted for side, found, wanted in steps):
            raise ValueError(f"out must be packed, its strides are {view.strides}")
        if view.read_only:
            raise ValueError("out must be writable, it is read-only")
        pointer, dtype, owner = view.pointer, view.dtype, view.owner
    if dtype not in (np.float32, np.float16):
        raise ValueError(f"out must hold float32 or float16, it holds {dtype}")
    if pointer <= 0 or pointer % dtype.itemsize != 0:
        raise ValueError(f"out must lie at a multiple of {dtype.itemsize} bytes, it lies at {pointer:#x}")
    return pointer, dtype, owner


def _pointer_and_type(out: tuple[Any, ...]) -> tuple[int, np.dtype[Any]]:
    try:
        pointer, dtype = out
        return operator.index(pointer), np.dtype(dtype)
    except (TypeError, ValueError):
        raise ValueError(f"out must be (pointer, dtype), a whole number and a type, got {out!r}") from None
