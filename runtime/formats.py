"""What a file is, by its first bytes: a picture that is read here, or something that is named and refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

READ = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")  # Pillow's names; HEIC is HEIF's
NAMES = "JPEG, PNG, WebP, GIF, TIFF, BMP, PPM, AVIF or HEIC"

SAVE = "save it as PNG or JPEG"
RAW = "a camera's raw file", "develop it and save it as JPEG or TIFF"
_VIDEO = "a video", "save one of its frames as PNG or JPEG"
_BRANDS = {  # of ISO media files, whose major brand says little: the compatible ones count too
    b"avif": "AVIF",
    b"avis": "AVIF",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"),
}
# pattern at the start, what it is, what to do if it shows a picture
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript (EPS)", SAVE),
    (rb"%PDF", "a PDF", "save the page as PNG or JPEG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", SAVE),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", SAVE),
    (rb"(II\xbc|WMPHOTO)", "a JPEG XR picture", SAVE),
    (rb"8BPS", "a Photoshop document (PSD)", SAVE),
    (rb"gimp xcf", "a GIMP document (XCF)", SAVE),
    (rb"\0\0[\x01\x02]\0[^\0]\0", "a Windows icon (ICO)", SAVE),
    (rb"icns", "an Apple icon (ICNS)", SAVE),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", SAVE),
    (rb"DDS ", "a DDS texture", SAVE),
    (rb"qoif", "a QOI picture", SAVE),
    (rb"P7\s", "a PAM picture", SAVE),
    (rb"PF\s", "a PFM picture in colour", SAVE),
    (rb"\n[\0\x02-\x05]\x01[\x01\x02\x04\x08]", "a PCX picture", SAVE),
    (rb"\x01\xda[\0\x01][\x01\x02]", "an SGI picture", SAVE),
    (rb"\x76\x2f\x31\x01", "an OpenEXR picture", SAVE),
    (rb"#\?(RADIANCE|RGBE)", "a Radiance HDR picture", SAVE),
    (rb".{128}DICM", "a DICOM file", SAVE),
    (rb"SIMPLE  =", "a FITS file", SAVE),
    (rb"II\*\0.{4}CR|IIU\0|IIR[OS]\x08|MMOR|FUJIFILMCCD-RAW|\0MRM|FOVb", *RAW),
    (rb"\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01\xba|FLV\x01", *_VIDEO),
    (rb"GGUF", "a GGUF model", ""),
    (rb".{4}\0{4}\{", "a safetensors file", ""),
    (rb"PK[\x03\x05][\x04\x06]", "a ZIP archive", "unpack it and give a picture's file"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\0|7z\xbc\xaf\x27\x1c|Rar!|\x28\xb5\x2f\xfd", "an archive", "unpack it first"),
    (rb"\x93NUMPY", "a NumPy file", "load it and give the array"),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (rb"\x7fELF|MZ", "a program", ""),
    (rb"\x80[\x02-\x05]", "a pickle file", ""),
)
_SPACE = rb"(\xef\xbb\xbf)?\s*"
_MARKUP = (
    (rb"(<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*|<!doctype svg[^>]*>\s*)*<svg", "an SVG drawing", SAVE),
    (rb"<!doctype html|<html|<head", "a web page", "download the picture itself"),
    (rb"data:", "a data: URI", "decode it and give the bytes"),
)


def refusal(file: bytes) -> tuple[str, str] | None:
    """What a file is that is not read here, and what to do if it holds a picture; None for anything else."""
    if brands := set(_brands(file)):
        if _BRANDS.keys() & brands:
            return None
        return RAW if b"crx " in brands else _VIDEO
    for pattern, what, advice in _REFUSED:
        if re.match(pattern, file, re.DOTALL):
            return what, advice
    for pattern, what, advice in _MARKUP:
        if re.match(_SPACE + pattern, file[:4096], re.DOTALL | re.IGNORECASE):
            return what, advice
    if _is_text(file[:512]) and not re.match(rb"P[1-6Ff]\s", file):  # PPM begins as text
        return "text", ""
    return None


def is_heif(file: bytes) -> bool:
    """Whether a file is HEIC, as phones write it. AVIF shares its container."""
    found = {_BRANDS[brand] for brand in _brands(file) if brand in _BRANDS}
    return "HEIF" in found and "AVIF" not in found


def _brands(file: bytes) -> Iterator[bytes]:
    """The brands of an ISO media file, the major one first; none of other files."""
    if file[4:8] != b"ftyp":
        return
    size = min(int.from_bytes(file[:4], "big"), 512, len(file))
    yield file[8:12]
    for at in range(16, size - 3, 4):
        yield file[at : at + 4]


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # not a character that the cut split
            return False
        text = start[: error.start].decode("utf-8")
    return len(text) > 3 and all(c.isprintable() or c.isspace() for c in text)
