"""Streams of real photographs nobody trained on: cut-outs that come and go over scenes of nature.

For grading the shipped default. The photographs are cut out (PNG with transparency), labelled by hand
in configs/photo_labels.json; where they come from, and how to get them, docs/default-model.md says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict

from jobs.backgrounds import SIDE
from jobs.event_metrics import Event

FPS = 2.0
GONE = "gone"


class PhotosError(FileNotFoundError):
    """Photographs to grade with are missing; says which and how to get them."""


class PhotoLabels(BaseModel):
    """Acceptable words for each file: of things that the encoder knows, and of others; files of empty scenes."""

    model_config = ConfigDict(extra="forbid")

    source: str
    scenes: tuple[str, ...]
    known: Mapping[str, tuple[str, ...]]
    unknown: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class PhotoEvent:
    """A cut-out comes, or is gone; `file` is which."""

    event: Event
    file: str
    kind: Literal["comes", "gone"]


@dataclass(frozen=True)
class PhotoStream:
    """Frames (F, 224, 224, 3) uint8 at 2 a second, and what happens in them."""

    frames: np.ndarray
    events: tuple[PhotoEvent, ...]


class PhotoFilm:
    """Makes streams of the cut-outs of one half (None for all): `dev` to choose with, `test` to grade with."""

    def __init__(
        self, cutouts: Path, scenes: Sequence[Path], words: Mapping[str, tuple[str, ...]], half: str | None
    ) -> None:
        self.cutouts = cutouts
        self.words = {file: right for file, right in words.items() if half in (None, half_of(file))}
        missing = [file for file in (*scenes, *(cutouts / file for file in self.words)) if not file.is_file()]
        if missing:
            raise PhotosError(
                f"{len(missing)} photographs are not there, the first is {missing[0]}: "
                "docs/default-model.md says how to get them"
            )
        self.scenes = [Image.open(scene).convert("RGB") for scene in scenes]
        for scene in self.scenes:
            scene.thumbnail((900, 900))
        self.half = half

    def stream(self, seed: int, length: int = 120) -> PhotoStream:
        """Scenes out of focus, in and over which cut-outs come for 4 to 9 seconds and go."""
        random = Random(f"{self.half} {seed}")
        noise = np.random.default_rng(random.randrange(2**31))
        files = sorted(self.words)
        random.shuffle(files)
        frames: list[Image.Image] = []
        events: list[PhotoEvent] = []
        while len(frames) < length:
            quiet = list(self._scene(random, random.randint(6, 20)))
            if events:
                events.append(PhotoEvent(Event(time=len(frames) / FPS, words=(GONE,)), events[-1].file, "gone"))
            frames += quiet
            file = files.pop()
            stay = random.randint(8, 18)
            behind = [quiet[-1]] * stay if random.random() < 0.5 else list(self._scene(random, stay))
            events.append(PhotoEvent(Event(time=len(frames) / FPS, words=self.words[file]), file, "comes"))
            frames += _placed(Image.open(self.cutouts / file).convert("RGBA"), behind, random)
        pixels = np.stack([np.asarray(frame, np.float32) for frame in frames[:length]])
        pixels += noise.normal(0, 2, pixels.shape)
        late = length / FPS - 2  # too late to be told
        kept = tuple(event for event in events if event.event.time < late)
        return PhotoStream(pixels.clip(0, 255).astype(np.uint8), kept)

    def _scene(self, random: Random, length: int) -> Iterator[Image.Image]:
        """Views of a scene out of focus, from a camera that stands still or pans slowly."""
        scene = random.choice(self.scenes).filter(ImageFilter.GaussianBlur(random.uniform(5, 12)))
        size = min(scene.size) * random.uniform(0.5, 0.9)
        start, stop = (random.random(), random.random()), (random.random(), random.random())
        moving = 0.3 * (random.random() < 0.5)
        for frame in range(length):
            part = moving * frame / max(1, length - 1)
            left, top = (
                (a + (b - a) * part) * (side - size) for a, b, side in zip(start, stop, scene.size, strict=True)
            )
            yield scene.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + size, top + size))


def half_of(file: str) -> Literal["dev", "test"]:
    """By a hash of its name, for good."""
    return "dev" if hashlib.sha256(file.removesuffix(".png").encode()).digest()[0] < 128 else "test"


def read_labels(path: Path) -> PhotoLabels:
    """The labels of configs/photo_labels.json."""
    return PhotoLabels.model_validate(json.loads(path.read_text()))


def _placed(cutout: Image.Image, behind: Sequence[Image.Image], random: Random) -> Iterator[Image.Image]:
    """The cut-out over each frame behind it, large, drifting a little and coming nearer."""
    size = random.uniform(0.75, 0.98) * SIDE
    x, y, drift = random.uniform(0.45, 0.55), random.uniform(0.45, 0.55), random.uniform(-0.06, 0.06)
    for number, frame in enumerate(behind):
        part = number / len(behind)
        scale = size * (1 + 0.03 * part) / max(cutout.size)
        shape = [max(1, round(side * scale)) for side in cutout.size]
        sized = cutout.resize((shape[0], shape[1]), Image.Resampling.LANCZOS)
        corner = (round((x + drift * part) * SIDE - shape[0] / 2), round(y * SIDE - shape[1] / 2))
        placed = frame.copy()
        placed.paste(sized, corner, sized)
        yield placed
