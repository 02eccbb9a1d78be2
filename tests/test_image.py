"""Pictures from clients: what is taken, what is refused, and with which words."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actors.image import check_image, decode_image

ACROSS, DOWN = np.meshgrid(np.arange(0, 240, 10), np.arange(0, 160, 10))
GRADIENT = np.stack([ACROSS, DOWN, np.full((16, 24), 90)], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options", "error"), [("JPEG", {"quality": 95}, 6), ("PNG", {}, 0), ("WEBP", {"lossless": True}, 0)]
)
def test_the_three_formats_give_rgb_pixels(kind: str, options: dict[str, object], error: int) -> None:
    pixels = decode_image(encoded(Image.fromarray(GRADIENT), kind, **options))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels.astype(int) - GRADIENT).mean() <= error


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(GRADIENT).convert(mode)
    pixels = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    expected = np.asarray(image.convert("RGB"))
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 12


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    pixels = decode_image(encoded(Image.fromarray(grey), "PNG"))
    assert np.array_equal(pixels[..., 0], grey >> 8)


def test_transparent_parts_are_black() -> None:
    picture = np.dstack([GRADIENT, np.zeros((16, 24), np.uint8)])
    picture[4:8, 4:8, 3] = 255
    pixels = decode_image(encoded(Image.fromarray(picture), "PNG"))
    assert pixels[0, 20].tolist() == [0, 0, 0]
    assert pixels[5, 5].tolist() == GRADIENT[5, 5].tolist()


def test_a_phone_s_rotation_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    pixels = decode_image(encoded(Image.fromarray(GRADIENT), "PNG", exif=exif))
    assert np.array_equal(pixels, np.rot90(GRADIENT, -1))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "no bytes"),
        (b"hello, this is no picture", "25 bytes that begin with b'hello, t'"),
        (encoded(Image.fromarray(GRADIENT), "GIF"), "a GIF"),
        (encoded(Image.fromarray(GRADIENT), "BMP"), "a BMP"),
        (encoded(Image.fromarray(GRADIENT), "TIFF"), "a TIFF"),
        (b"\0\0\0 ftypisom" + bytes(100), "an MP4, HEIC or AVIF file"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, found: str) -> None:
    with pytest.raises(ValueError, match="not an image") as caught:
        decode_image(data)
    assert str(caught.value) == f"not an image: found {found}, expected JPEG, PNG or WebP"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_is_damaged(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match=r"bytes of a damaged picture|bytes that begin with"):
        decode_image(whole[: len(whole) // 2])


def test_a_flipped_byte_inside_a_png_is_noticed() -> None:
    whole = bytearray(encoded(Image.fromarray(GRADIENT), "PNG"))
    whole[whole.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(ValueError, match="bytes of a damaged picture"):
        decode_image(bytes(whole))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_no_frame(kind: str) -> None:
    pictures = [Image.fromarray(np.roll(GRADIENT, shift, axis=1)) for shift in (0, 5, 10)]
    data = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match=f"found {kind} animation of 3 pictures, expected one picture"):
        decode_image(data)


def test_a_picture_above_the_limit_is_refused_by_its_header_alone() -> None:
    with pytest.raises(ValueError, match=r"image too large: found 24x16 pixels, expected at most 100 in all"):
        decode_image(encoded(Image.fromarray(GRADIENT), "PNG"), max_pixels=100)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    """A few hundred bytes that say they hold gigabytes: Pillow warns at the first size and raises at the second."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="image too large: found "):
        decode_image(bomb)


def outcome(data: bytes) -> str:
    try:
        return f"pixels {decode_image(data, max_pixels=1 << 16).shape}"
    except ValueError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_bytes_give_pixels_or_a_value_error_and_nothing_else(data: st.DataObject, kind: str) -> None:
    whole = bytearray(encoded(Image.fromarray(GRADIENT), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(bytes(whole)).startswith(("pixels", "not an image: found ", "image too large: found "))


def with_segments(kind: str, count: int) -> bytes:
    """A picture with that many empty comments, or fill bytes, before it."""
    whole = encoded(Image.fromarray(GRADIENT), "PNG" if kind == "PNG" else "JPEG")
    if kind == "PNG":
        chunk = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
        return whole[:33] + count * chunk + whole[33:]
    return whole[:2] + count * {"comments": b"\xff\xfe\0\2", "fill": b"\xff"}[kind] + whole[2:]


@pytest.mark.parametrize("kind", ["PNG", "comments", "fill"])
def test_a_header_of_very_many_parts_is_refused_unread(kind: str) -> None:
    """Pillow would take seconds over a few megabytes of them."""
    with pytest.raises(ValueError, match="more than 1000 segments before the picture"):
        check_image(with_segments(kind, 100_000))
    if kind != "PNG":  # an empty tEXt is no text to Pillow
        assert decode_image(with_segments(kind, 100)).shape == (16, 24, 3)


def test_text_that_is_inflated_is_bounded() -> None:
    whole = encoded(Image.fromarray(GRADIENT), "PNG")
    body = b"zTXt" + b"k\0\0" + zlib.compress(bytes(900_000))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    check_image(whole[:33] + chunk + whole[33:])
    with pytest.raises(ValueError, match="not an image"):
        check_image(whole[:33] + 2 * chunk + whole[33:])
