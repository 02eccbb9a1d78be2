"""Encoded pictures from clients: bytes to RGB pixels, with bounds and without surprises."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_SEGMENTS = 1000  # before the picture itself: Pillow reads them one by one, in Python
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 20  # text that is inflated while a header is looked at; nobody reads it here
MAX_PIXELS = 4096 * 4096
WEBP_HEADER = 30
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
START_OF_SCAN = 0xDA
ALONE = (0x00, 0x01, *range(0xD0, 0xD9))  # markers of a JPEG without a length behind them

_OTHER_STARTS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<!DO": "HTML",
    b"<htm": "HTML",
    b"\x1aE\xdf\xa3": "a WebM video",
}


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in `data` as uint8 (H, W, 3) RGB, upright, transparency on black.

    Raises ValueError for anything but one whole JPEG, PNG or WebP picture of at most `max_pixels`.
    """
    with _opened(data, max_pixels) as image:
        return np.asarray(_rgb(ImageOps.exif_transpose(image)))


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Look at the header alone. Raises ValueError for what `decode_image` would refuse because of it."""
    with _opened(data, max_pixels):
        pass


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """A picture whose header has been checked; what fails with it in the block is a ValueError, too."""
    try:
        _check_webp(data, max_pixels)
        _check_segments(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, max_pixels)
            yield image
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_too_large("more", max_pixels)) from None
    except Exception as error:  # Pillow's decoders raise many unrelated types on damaged data
        raise ValueError(f"not an image: found {_describe(data, error)}, expected JPEG, PNG or WebP") from None


class _Refused(Exception):
    """A picture that could be read, but is not taken."""


def _check(image: Image.Image, max_pixels: int) -> None:
    """Before its pixels are decoded: the header alone says how much memory that takes."""
    if image.width * image.height > max_pixels:
        raise _Refused(_too_large(f"{image.width}x{image.height}", max_pixels))
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1:
        raise _Refused(f"not an image: found {image.format} animation of {pictures} pictures, expected one picture")


def _check_segments(data: bytes) -> None:
    """A few megabytes of empty segments would take Pillow seconds."""
    for count, _ in enumerate(_segments(data)):
        if count == MOST_SEGMENTS:
            raise _Refused(f"not taken: more than {MOST_SEGMENTS} segments before the picture itself")


def _segments(data: bytes) -> Iterator[int]:
    """Where the parts of a JPEG or PNG begin that stand before its picture, as far as they can be followed."""
    if data.startswith(PNG):
        at = len(PNG)
        while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
            yield at
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(JPEG):
        at = len(JPEG)
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != START_OF_SCAN:
            yield at
            marker = data[at + 1]
            if marker == 0xFF:  # fill
                at += 1
            else:
                at += 2 if marker in ALONE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _check_webp(data: bytes, max_pixels: int) -> None:
    """Pillow's WebP reader makes room for the whole picture when it opens one: that would be too late."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < WEBP_HEADER:
        return
    width, height = 0, 0
    match data[12:16]:
        case b"VP8X":
            width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    if width * height > max_pixels:
        raise _Refused(_too_large(f"{width}x{height}", max_pixels))


def _too_large(found: str, max_pixels: int) -> str:
    return (
        f"image too large: found {found} pixels, expected at most {max_pixels:,} in all: scale it down before sending"
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip to white instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
    return image.convert("RGB")


def _describe(data: bytes, error: Exception) -> str:
    if not data:
        return "no bytes"
    if not isinstance(error, UnidentifiedImageError):
        return f"{len(data)} bytes of a damaged picture ({error})"
    if data[4:8] == b"ftyp":
        return "an MP4, HEIC or AVIF file"
    for start, name in _OTHER_STARTS.items():
        if data.startswith(start):
            return name
    return f"{len(data)} bytes that begin with {data[:8]!r}"
