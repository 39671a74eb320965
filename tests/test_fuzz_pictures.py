"""Damaged pictures: no traceback, nothing on stderr but our own warning, no hang, no abort.

`python tests/test_fuzz_pictures.py SEED COUNT` reads COUNT mutations of small pictures of every format. FUZZ
in the environment multiplies how many the test reads.
"""

from __future__ import annotations

import faulthandler
import io
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MUTATIONS = 4000  # of a seed
HANG = 10  # seconds


def originals() -> list[bytes]:
    """Small pictures, their metadata included."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (24, 32, 4), np.uint8)
    smooth = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0
    exif[0x010E] = "a picture"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    wide = smooth.convert("L").convert("I;16").point(lambda level: level * 257)
    pages = {"save_all": True, "append_images": [smooth.convert("RGB")]}

    def save(image: Image.Image, format: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)  # type: ignore[arg-type]
        return file.getvalue()

    rgb, grey, palette = smooth.convert("RGB"), smooth.convert("L"), smooth.convert("RGB").quantize(20)
    found = [
        save(rgb, "JPEG", exif=exif),
        save(rgb, "JPEG", progressive=True, exif=exif),
        save(grey, "JPEG", restart_marker_rows=1),
        save(smooth.convert("CMYK"), "JPEG"),
        save(rgb, "MPO", exif=exif, **pages),
        save(smooth, "PNG", exif=exif),
        save(palette, "PNG", transparency=3),
        save(grey, "PNG", transparency=7),
        save(wide, "PNG", transparency=9),
        save(smooth.convert("1"), "PNG"),
        save(rgb, "GIF", **pages),
        save(palette, "GIF", transparency=2, interlace=1),
        save(smooth, "WEBP", exif=exif),
        save(rgb, "WEBP", lossless=True, **pages),
        save(smooth, "AVIF", exif=exif, speed=10),
        save(rgb, "BMP"),
        save(palette, "BMP"),
        save(rgb, "PPM"),
        save(grey, "PPM"),
        b"P3 3 2 100 " + b"10 " * 18,
        save(grey.convert("F").point(lambda level: level / 255 + 0.0), "PPM"),
    ]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found.append(save(rgb, "TIFF", compression=compression, exif=exif))
    for image in (grey, wide, smooth, palette, smooth.convert("LA"), smooth.convert("CMYK")):
        found.append(save(image, "TIFF", compression="tiff_lzw"))
    found.append(save(smooth.convert("1"), "TIFF", compression="group4"))
    found.append(save(grey.convert("F"), "TIFF", tiffinfo={340: 0.0, 341: 255.0}))
    found.append(save(grey.convert("I"), "TIFF", tiffinfo={340: 0, 341: 255}))
    try:
        from pillow_heif import HeifImageFile, from_pillow  # noqa: F401

        heic = io.BytesIO()
        from_pillow(smooth).save(heic, quality=50)
        found.append(heic.getvalue())
    except ImportError:
        pass
    return found


def mutations(seed: int, count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(seed)
    files = originals()
    for _ in range(count):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(rng.integers(1, 4)):
            size = len(data)
            # headers and metadata are at the start of most formats, and at the end of some
            at = int(size * rng.random() ** rng.choice([1, 4])) if rng.random() < 0.9 else size - 1
            at = min(at, size - 1)
            match rng.integers(7):
                case 0:
                    data[at] ^= 1 << int(rng.integers(8))
                case 1:
                    data[at] = int(rng.choice([0, 1, 127, 128, 255]))
                case 2:
                    data[at : at + 4] = rng.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\1\0\0"])
                case 3:
                    data[at : at + int(rng.integers(1, 64))] = b""
                case 4:
                    data[at:at] = rng.bytes(int(rng.integers(1, 64)))
                case 5:
                    data[at : at + 16] = data[int(rng.integers(size)) :][:16]
                case 6:
                    del data[max(8, at) :]
            if not data:
                break
        yield bytes(data)


def main(seed: int, count: int) -> None:
    """Prints how many were read, read in part, and refused; a hang ends it with a traceback."""
    from dualfocus.runtime import PictureError, PictureWarning, open_picture

    outcomes: Counter[str] = Counter()
    for number, data in enumerate(mutations(seed, count)):
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                array = open_picture(data)
        except PictureError as error:
            if not str(error).isprintable():
                raise AssertionError((seed, number)) from error
            outcomes["refused"] += 1
            continue
        except BaseException:
            print(f"seed {seed}, mutation {number}", file=sys.stderr)
            raise
        assert array.dtype == np.uint8, (seed, number)
        assert array.ndim == 3, (seed, number)
        assert array.shape[2] == 3, (seed, number)
        categories = [warning.category for warning in noted]
        assert categories in ([], [PictureWarning]), (seed, number, *map(str, noted))
        outcomes["in part" if noted else "read"] += 1
    faulthandler.cancel_dump_traceback_later()
    print(dict(outcomes))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_pictures_are_read_or_refused_in_silence(seed: int) -> None:
    count = MUTATIONS * int(os.environ.get("FUZZ", "1"))
    run = subprocess.run(
        [sys.executable, "-W", "always", Path(__file__), str(seed), str(count)],
        capture_output=True,
        text=True,
        timeout=60 + count,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "'refused'" in run.stdout  # most mutations are seen
    assert "'read'" in run.stdout


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
