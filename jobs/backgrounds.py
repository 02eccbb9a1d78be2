"""What the camera of a made-up stream sees where nothing is to be named: pictures with their motion.

Photographs out of the wheels of scikit-image and scikit-learn (public domain, CC0 and CC BY, see the
model card), seen by a camera that stands still, shakes, pans or zooms; plain and blurred patterns;
noise; title cards. A clip is a run of frames (F, 224, 224, 3) uint8.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 224

# The photographs, with the names that are right for what is in them.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "skimage/data/astronaut.png": (),
    "skimage/data/camera.png": ("tripod", "camera"),
    "skimage/data/chelsea.png": ("cat",),
    "skimage/data/coffee.png": ("cup of coffee",),
    "skimage/data/rocket.jpg": ("rocket", "space shuttle"),
    "skimage/data/hubble_deep_field.jpg": (),
    "skimage/data/moon.png": (),
    "skimage/data/brick.png": ("stone wall",),
    "skimage/data/grass.png": (),
    "skimage/data/gravel.png": (),
    "skimage/data/coins.png": (),
    "skimage/data/clock_motion.png": ("clock",),
    "sklearn/datasets/images/china.jpg": ("temple", "palace", "roof"),
    "sklearn/datasets/images/flower.jpg": ("daisy",),
}
# Colours of places, from dark to light: leaves, grass, earth, sand, sky, water, stone, wood, night, snow, rooms.
SCENERY = (
    ((18, 32, 12), (60, 96, 36), (140, 170, 80), (220, 225, 170)),
    ((40, 70, 20), (96, 140, 50), (160, 190, 90)),
    ((40, 28, 18), (110, 80, 52), (176, 140, 100)),
    ((150, 120, 84), (206, 176, 130), (236, 216, 180)),
    ((70, 120, 190), (140, 180, 225), (235, 240, 248)),
    ((10, 40, 60), (40, 100, 120), (120, 180, 190)),
    ((50, 50, 54), (120, 120, 122), (196, 194, 190)),
    ((60, 32, 16), (130, 80, 44), (190, 140, 90)),
    ((4, 5, 12), (30, 32, 56), (120, 90, 60)),
    ((170, 180, 196), (226, 232, 240), (252, 252, 252)),
    ((90, 70, 60), (170, 150, 130), (226, 214, 196)),
    ((120, 50, 90), (200, 110, 140), (240, 190, 200)),
)
BLOTCHES = 320
TEXT = "text"  # what a title card shows: no class of the encoder's, so it is in view by decree
ASPECTS = (1.0, 4 / 3, 16 / 9, 16 / 9)  # of the camera: the encoder pads to a square with black
WORDS = """
    the end of a long day begins here now presents story by directed music film with and for light house night river
    winter summer road home world first part two chapter new episode live today thank you coming soon
"""


class MissingPhotographsError(FileNotFoundError):
    """A package with training photographs is not installed; says which, and how to install it."""


@cache
def photograph(name: str) -> Image.Image:
    """The photograph `PACKAGE/path` out of an installed package. Raises MissingPhotographsError."""
    package, _, path = name.partition("/")
    spec = importlib.util.find_spec(package)
    file = Path(spec.submodule_search_locations[0]) / path if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        raise MissingPhotographsError(
            f"the photograph {name} is not there: run `pip install -c constraints.txt '.[default-model]'`"
        )
    return Image.open(file).convert("RGB")


def clip(random: np.random.Generator, length: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Frames (length, 224, 224, 3) of one scene, and the names that are right for it."""
    kind = random.random()
    if kind < 0.65:
        name = list(PHOTOGRAPHS)[random.integers(len(PHOTOGRAPHS))]
        return _barred(filmed(_varied(photograph(name), random), random, length), random), PHOTOGRAPHS[name]
    if kind < 0.85:
        return _barred(filmed(_pattern(random), random, length), random), ()
    return _barred(_noisy(np.repeat(title_card(random)[None], length, axis=0), random), random), (TEXT,)


def scenery(random: np.random.Generator, length: int) -> np.ndarray:
    """Frames (length, 224, 224, 3) of a place out of focus: ground and sky, leaves, lights, made of noise."""
    lower, upper = (_blotches(random, SCENERY[random.integers(len(SCENERY))]) for _ in range(2))
    rows = np.arange(BLOTCHES)[:, None, None] / BLOTCHES
    horizon = random.uniform(-0.3, 1.3)
    soft = random.uniform(0.02, 0.3)
    part = 1 / (1 + np.exp(np.clip((horizon - rows) / soft, -50, 50)))
    picture = Image.fromarray((upper * (1 - part) + lower * part).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(random.choice((0, 0, 4, 12)))):
        x, y, radius = *random.uniform(0, BLOTCHES, 2), random.uniform(4, 26)
        light = tuple(int(value) for value in random.integers(120, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=light)
    picture = picture.filter(ImageFilter.GaussianBlur(float(random.uniform(1, 14))))
    return _barred(filmed(_varied(picture, random), random, length), random)


def _blotches(random: np.random.Generator, colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Noise of several coarsenesses (320, 320, 3) between colours."""
    level = np.zeros((BLOTCHES, BLOTCHES))
    for cells in (3, 7, 18, 50, 140):
        grid = random.random((cells, max(2, int(cells * random.choice((0.3, 1, 3)))))).astype(np.float32)
        sized = Image.fromarray(grid).resize((BLOTCHES, BLOTCHES), Image.Resampling.BICUBIC)
        level += np.asarray(sized) * random.uniform(0.1, 1)
    level = (level - level.min()) / (np.ptp(level) or 1) * (len(colours) - 1)
    ends = np.array(colours, np.float32) + random.normal(0, 18, (len(colours), 3))
    low = np.minimum(level.astype(int), len(colours) - 2)
    part = (level - low)[..., None]
    mixed: np.ndarray = ends[low] * (1 - part) + ends[low + 1] * part
    return mixed


def title_card(random: np.random.Generator) -> np.ndarray:
    """A few words on a plain ground (224, 224, 3)."""
    dark = random.random() < 0.7
    ground, ink = sorted(random.integers((0, 170), (70, 256)))[:: 1 if dark else -1]
    card = Image.new("RGB", (SIDE, SIDE), (int(ground),) * 3)
    draw = ImageDraw.Draw(card)
    for line in range(random.integers(1, 4)):
        text = " ".join(random.choice(WORDS.split(), random.integers(1, 4)))
        font = ImageFont.load_default(size=float(random.uniform(14, 34)))
        draw.text((SIDE / 2, 60 + 50 * line), text.capitalize(), fill=(int(ink),) * 3, font=font, anchor="mm")
    return np.asarray(card)


def _varied(photo: Image.Image, random: np.random.Generator) -> Image.Image:
    """The photograph in another light, perhaps mirrored or out of focus."""
    if random.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.35:
        photo = photo.filter(ImageFilter.GaussianBlur(random.uniform(1, 12)))
    pixels = np.asarray(photo, np.float32) * random.uniform(0.7, 1.3, 3) + random.uniform(-25, 25)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _pattern(random: np.random.Generator) -> Image.Image:
    """A plain ground, a gradient, or soft noise of some coarseness."""
    cells = int(random.choice((1, 2, 4, 8, 16, 48)))
    ground = random.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return Image.fromarray(ground).resize((320, 320), Image.Resampling.BICUBIC)


def filmed(picture: Image.Image, random: np.random.Generator, length: int) -> np.ndarray:
    """Views (length, 224, 224, 3) of the picture: from one crop to another, with a hand's shake and noise."""
    short = min(picture.size)
    moving = random.random() < 0.5
    sizes = short * random.uniform(0.35, 0.95, 2)
    centres = random.uniform(0, 1, (2, 2))
    if not moving:
        sizes[1], centres[1] = sizes[0], centres[0]
    shake = random.choice((0, 0.002, 0.006)) * short
    views = []
    for part in np.linspace(0, 1, length):
        size = sizes[0] + (sizes[1] - sizes[0]) * part
        room = np.array(picture.size) - size
        corner = (centres[0] + (centres[1] - centres[0]) * part) * room + random.normal(0, 1, 2) * shake
        left, top = np.clip(corner, 0, room)
        box = (left, top, left + size, top + size)
        views.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)))
    return _noisy(np.stack(views), random)


def _barred(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The square frames as a wider camera would have them: less high, between black bars."""
    aspect = ASPECTS[random.integers(len(ASPECTS))]
    if aspect == 1:
        return frames
    height = round(SIDE / aspect)
    top = (SIDE - height) // 2
    barred = np.zeros_like(frames)
    for number, frame in enumerate(frames):
        barred[number, top : top + height] = np.asarray(Image.fromarray(frame).resize((SIDE, height)))
    return barred


def _noisy(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """With the noise of a camera and a light that flickers a little."""
    level = random.choice((0, 2, 5))
    light = 1 + random.normal(0, random.choice((0, 0.01, 0.03)), (len(frames), 1, 1, 1))
    noisy = frames * light + random.normal(0, 1, frames.shape) * level
    return noisy.clip(0, 255).astype(np.uint8)
