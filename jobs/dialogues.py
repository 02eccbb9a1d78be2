"""Annotations as streaming dialogues: what was said when becomes which frame is followed by what.

This is the second contribution of VideoLLM-online (section 3.3), here for narration: the user asks
for it at the first frame, and every text follows the first frame at or after its time. Frames are
integers on the grid 0, 1/fps, 2/fps, ...; times become frames once, in exact arithmetic.

A `Dialogue` as JSON (jobs/dialogue_files.py keeps them in files):

    {"dialogue_id": "kitchen-narration-0", "task": "narration", "video_id": "kitchen", "video": "/videos/kitchen.mp4",
     "fps": 2.0, "frames": [5, 11], "conversation": [{"role": "system", ...}, {"role": "stream", ...}, ...]}

`frames` is the range [first, last + 1) of the video that the stream turns show one after another.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import Field, model_validator

from actors.config import DEFAULT_SYSTEM_PROMPT, Section
from actors.turns import Assistant, Stream, System, Turn, User
from jobs.annotations import VideoAnnotation
from jobs.clock import frame_at

SPLITS = ("train", "validation")

# What the published checkpoints were asked; Ego4D's narrations speak of "C", the camera wearer.
EGO4D_INSTRUCTION = (
    "Please concisely narrate the video in real time. Use the tag 'C' to denote the camera wearer, and other "
    "letter tags, such as 'X', to denote other individuals in the scene."
)


class DataConfig(Section):
    """Streaming dialogues: where they are, and how they are made from annotations."""

    folder: str = Field(
        default="runs/dialogues", description="holds the splits train and validation, and coverage.json"
    )
    fps: float = Field(default=2.0, gt=0, le=60, description="frames a second; the frame store must have the same")
    max_frames: int = Field(default=1200, ge=1, description="most frames of one dialogue")
    longer: Literal["clip", "split"] = Field(
        default="clip",
        description="a longer narration keeps its beginning (clip), or goes on in further dialogues (split)",
    )
    instructions: tuple[str, ...] = Field(
        default=(
            "Please narrate the video in real time.",
            "Tell me what happens in the video as it happens.",
            "Describe what you see while the video plays.",
            "Keep me informed about what is going on in this video.",
        ),
        min_length=1,
        description="what the user asks for at the first frame; one is drawn for each dialogue",
    )
    validation_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the videos kept out of training, chosen by a hash of the video id",
    )
    seed: int = Field(default=0, description="of all draws: instructions, waiting frames, mistakes")
    mistakes: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of training dialogues with a reply that is late, missing or wrong, to go on after",
    )


class Dialogue(Section):
    """A conversation over the frames [first, last + 1) of one video, on the grid of `fps`.

    `labels` are what an answer is graded against, for tasks that have such names. A dialogue without
    frames names no video file.
    """

    dialogue_id: str = Field(min_length=1)
    task: str
    video_id: str = Field(min_length=1)
    video: str
    fps: float = Field(gt=0)
    frames: tuple[int, int]
    conversation: tuple[Turn, ...]
    labels: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        return self.frames[1] - self.frames[0]

    @model_validator(mode="after")
    def _frames_agree(self) -> Self:
        shown = sum(turn.num_frames for turn in self.conversation if isinstance(turn, Stream))
        if self.frames[0] < 0 or self.num_frames != shown:
            raise ValueError(f"frames is {list(self.frames)}, but the stream turns have {shown} frames")
        return self


@dataclass
class Narration:
    """The dialogues of one video, and how many of its moments were left out for which reason."""

    dialogues: list[Dialogue] = field(default_factory=list)
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def split_of(video_id: str, validation_fraction: float) -> str:
    """`validation` for about that share of all videos: the same at any time, on any machine."""
    digest = hashlib.sha256(video_id.encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") < validation_fraction * 2**64]


def narrate(
    annotation: VideoAnnotation,
    num_frames: int,
    duration: float,
    config: DataConfig,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> Narration:
    """The moments of a video of `num_frames` frames as dialogues in which the assistant narrates.

    A dialogue starts at the frame of its first text, where the user asks, and ends with its last. Of
    two texts at one frame the later is said; a text the same as the one before is said once; a text
    between the last frame and the end of the video is said at the last frame. Of Ego4D's narrations,
    whose times are coarse, the first that reaches the last frame is said there, however late it is.
    """
    narration = Narration()
    said = _said(annotation, num_frames, duration, config.fps, narration.dropped)
    pieces = _pieces(said, config.max_frames)
    if config.longer == "clip":
        narration.dropped["beyond max_frames"] += sum(map(len, pieces[1:]))
        pieces = pieces[:1]
    for number, piece in enumerate(pieces):
        dialogue_id = "-".join(filter(None, [annotation.video_id, annotation.kind, annotation.part, str(number)]))
        choices = (EGO4D_INSTRUCTION,) if annotation.kind == "ego4d_narration" else config.instructions
        instruction = random.Random(f"{config.seed} {dialogue_id}").choice(choices)
        narration.dialogues.append(
            Dialogue(
                dialogue_id=dialogue_id,
                task=annotation.kind,
                video_id=annotation.video_id,
                video=annotation.video,
                fps=config.fps,
                frames=(min(piece), max(piece) + 1),
                conversation=tuple(_conversation(piece, system_prompt, instruction)),
            )
        )
        narration.used += len(piece)
    narration.dropped += Counter()  # drops the reasons that never happened
    return narration


def _said(
    annotation: VideoAnnotation, num_frames: int, duration: float, fps: float, dropped: Counter[str]
) -> dict[int, str]:
    """What is said after which frame, in order."""
    said: dict[int, str] = {}
    last, coarse = num_frames - 1, annotation.kind != "narration"
    for moment in annotation.moments:
        text = " ".join(moment.text.split())
        if not text:
            dropped["no text"] += 1
        elif coarse and last in said:
            dropped["after another at the last frame"] += 1
        elif moment.time > duration and not coarse:
            dropped["after the end of the video"] += 1
        else:
            frame = min(frame_at(moment.time, fps), last)
            if said and next(reversed(said.values())) == text:
                dropped["same text as before"] += 1
                continue
            if frame in said:
                dropped["a later text at the same frame"] += 1
            said[frame] = text
    return said


def _pieces(said: dict[int, str], max_frames: int) -> list[dict[int, str]]:
    """`said` cut into runs that span at most `max_frames` frames each."""
    pieces: list[dict[int, str]] = []
    for frame, text in said.items():
        if not pieces or frame - min(pieces[-1]) + 1 > max_frames:
            pieces.append({})
        pieces[-1][frame] = text
    return pieces


def _conversation(said: dict[int, str], system_prompt: str, instruction: str) -> Iterator[Turn]:
    yield System(content=system_prompt)
    last: int | None = None
    for frame, text in said.items():
        if last is None:
            # Nothing to decide at the first frame: the question is the user's doing.
            yield Stream(num_frames=1, learn=False)
            yield User(content=instruction)
        else:
            yield Stream(num_frames=frame - last, learn=True)
        yield Assistant(content=text, learn=True)
        last = frame
