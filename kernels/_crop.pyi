from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

def resize(
    picture: npt.NDArray[np.uint8],
    box: Sequence[SupportsIndex],
    size: SupportsIndex,
    fit: Sequence[SupportsIndex] | Literal["crop", "stretch"],
    table: npt.NDArray[Any] | None,
    isa: str,
) -> bytearray: ...
def request(
    height: int,
    width: int,
    box: Sequence[SupportsIndex],
    size: SupportsIndex,
    fit: Sequence[SupportsIndex] | Literal["crop", "stretch"],
) -> bytes: ...
def available() -> tuple[str, ...]: ...
def stream_sum(words: npt.NDArray[np.uint64]) -> int: ...
