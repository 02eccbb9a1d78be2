"""Dialogues about no video, noise or black frames: the assistant says so instead of making something up.

The two videos are written here and encoded like any other, so that their frame tokens are what a
model meets when a camera fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from actors.turns import Assistant, Stream, Turn, User
from jobs.annotations import Moment, VideoAnnotation
from jobs.clock import Extent, exact
from jobs.scenes import Scene

NO_VIDEO = (
    (
        "Please help me to narrate the video in real time.",
        "Sure! Please provide me the video stream, and I will help you.",
    ),
    ("Concisely output what you have seen.", "Sure! Please provide me the video inputs."),
    ("...", "Hi! How can I help you?"),
)
NOISE = ("What is happening now?", "Sorry, it seems the input video frames are noise. Could you have a check?")
BLACK = ("What is the next step?", "Sorry, I cannot see anything in the input video frame. Could you check it?")

NOISE_FRAMES, BLACK_FRAMES = 10, 1
SIZE_PX = 224


def write_videos(folder: Path, fps: float) -> None:
    """The videos of `read_robustness` at the rate dialogues have; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    # One frame more than is shown: the last of a video is not counted on.
    noise = np.random.default_rng(0).integers(0, 256, (NOISE_FRAMES + 1, SIZE_PX, SIZE_PX, 3), np.uint8)
    black = np.zeros((BLACK_FRAMES + 1, SIZE_PX, SIZE_PX, 3), np.uint8)
    for path, frames in zip(_videos(folder), (noise, black), strict=True):
        if not path.exists():
            _write(path, frames, fps)


def read_robustness(folder: Path) -> Iterator[VideoAnnotation]:
    """A row an exchange; those without a video name none."""
    noise, black = map(str, _videos(folder))
    exchanges = [*((*exchange, "") for exchange in NO_VIDEO), (*NOISE, noise), (*BLACK, black)]
    for number, (question, answer, video) in enumerate(exchanges):
        yield VideoAnnotation(
            video_id=Path(video).stem or f"no_video_{number}",
            video=video,
            moments=(Moment(time=0, text=question, role="user"), Moment(time=0, text=answer)),
            source="jobs/robustness.py",
            kind="robustness",
            split="train",
        )


def scenes(row: VideoAnnotation, video: Extent) -> Iterator[Scene]:
    """All of the video, if there is any, then the exchange."""
    question, answer = row.moments
    turns: list[Turn] = [User(content=question.text), Assistant(content=answer.text, learn=True)]
    if video.num_frames:
        turns.insert(0, Stream(num_frames=video.num_frames))
    yield Scene(0, tuple(turns))


def _videos(folder: Path) -> tuple[Path, Path]:
    return folder / "robustness_noise.mkv", folder / "robustness_black.mkv"


def _write(path: Path, frames: np.ndarray, fps: float) -> None:
    """Frames (F, H, W, 3) uint8 RGB as a lossless video."""
    temporary = path.with_name(f".{path.name}")
    with av.open(str(temporary), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=exact(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)
