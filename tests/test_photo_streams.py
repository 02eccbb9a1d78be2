"""Streams of cut-out photographs, with cut-outs made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.backgrounds import SIDE
from jobs.photo_streams import FPS, GONE, PhotoFilm, PhotosError, half_of, read_labels

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def film(tmp_path: Path) -> PhotoFilm:
    random = np.random.default_rng(0)
    words = {f"things/{number}.png": (f"thing{number}",) for number in range(24)}
    (tmp_path / "things").mkdir()
    for file in words:
        pixels = random.integers(0, 256, (40, 30, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        Image.fromarray(pixels).save(tmp_path / file)
    Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "scene.jpg")
    return PhotoFilm(tmp_path, [tmp_path / "scene.jpg"], words, "test")


def test_a_stream_is_of_one_half_and_the_same_each_time(film: PhotoFilm) -> None:
    stream, again = film.stream(3, 60), film.stream(3, 60)
    assert stream.frames.shape == (60, SIDE, SIDE, 3)
    assert np.array_equal(stream.frames, again.frames)
    assert stream.events == again.events
    assert all(half_of(event.file) == "test" for event in stream.events)


def test_what_comes_goes_before_the_next_comes(film: PhotoFilm) -> None:
    events = film.stream(1).events
    assert [event.kind for event in events] == ["comes", "gone"] * (len(events) // 2) + ["comes"] * (len(events) % 2)
    assert [event.event.time for event in events] == sorted(event.event.time for event in events)
    assert all(event.event.words == (GONE,) for event in events if event.kind == "gone")
    assert events[-1].event.time < 120 / FPS - 2


def test_pictures_change_where_something_comes(film: PhotoFilm) -> None:
    stream = film.stream(1)
    moved = np.abs(np.diff(stream.frames.astype(float), axis=0)).mean((1, 2, 3))
    comes = [int(event.event.time * FPS) for event in stream.events if event.kind == "comes"]
    assert min(moved[frame - 1] for frame in comes) > np.median(moved)


def test_a_missing_photograph_is_named(tmp_path: Path) -> None:
    with pytest.raises(PhotosError, match=r"a\.png: docs/default-model\.md"):
        PhotoFilm(tmp_path, [], {"a.png": ("a",)}, None)


def test_the_labels_split_into_halves_of_some_size() -> None:
    labels = read_labels(REPOSITORY / "configs" / "photo_labels.json")
    halves = [half_of(file) for file in labels.known]
    assert min(halves.count("dev"), halves.count("test")) > 70
    assert not set(labels.known) & set(labels.unknown)
    assert labels.scenes
