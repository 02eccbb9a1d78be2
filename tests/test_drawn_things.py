"""Emoji as things in front of a place."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.backgrounds import SIDE
from jobs.drawn_things import MissingDrawingsError, drawn_names, read_drawings, scenes


def disc(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGBA", (60, 40), (*colour, 255))


def test_every_sign_is_one_and_has_a_plain_name() -> None:
    names = drawn_names()
    assert len(names) > 600
    assert all(len(sign) == 1 for sign in names)
    assert all(name == name.strip() and name for name in names.values())
    assert names["\N{DOG FACE}"] == "dog"


def test_a_folder_without_the_pictures_is_refused_with_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(MissingDrawingsError, match=r"npm package @lobehub/fluent-emoji-3d.*npm pack"):
        read_drawings(tmp_path)


def test_cut_outs_lose_their_empty_border(tmp_path: Path) -> None:
    for sign in drawn_names():
        framed = Image.new("RGBA", (20, 20))
        framed.paste((255, 0, 0, 255), (5, 6, 15, 14))
        framed.save(tmp_path / f"{ord(sign):04x}.webp", lossless=True)
    (tmp_path / "270b-1f3fb.webp").write_bytes((tmp_path / "270b.webp").read_bytes())
    drawings = read_drawings(tmp_path)
    assert {picture.size for _, picture in drawings} == {(10, 8)}
    assert len(drawings) == len(drawn_names()) + 1


def test_every_name_comes_before_one_comes_again() -> None:
    drawings = [("box", disc((200, 0, 0))), ("box", disc((0, 200, 0))), ("ball", disc((0, 0, 200)))]
    made = list(itertools.islice(scenes(drawings, np.random.default_rng(0), 3), 6))
    assert all({one.name for one in pair} == {"box", "ball"} for pair in zip(made[::2], made[1::2], strict=True))
    for one in made:
        assert one.empty.shape == one.shown.shape == (3, SIDE, SIDE, 3)
        assert one.shown.dtype == np.uint8
        assert all((one.empty[frame] != one.shown[frame]).any() for frame in range(3))
