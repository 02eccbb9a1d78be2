"""Reads tests/golden/data: the samples that the public reference makes of its annotation files."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from golden_files import read_json, template

from actors.config import DEFAULT_SYSTEM_PROMPT
from actors.turns import Assistant, Stream, System, Turn, parse
from jobs.annotations import VideoAnnotation
from jobs.clock import Extent
from jobs.dataset_files import find_video
from jobs.dialogues import DataConfig, Dialogue
from jobs.features import features_extent
from jobs.scenes import Scene
from jobs.tasks import dialogues_of

T = TypeVar("T")

NOTES = {"time", "fps_time"}  # what the reference leaves in the turns of a chat


@dataclass(frozen=True)
class Sample:
    """One sample of the reference: `turns` as built, without what is drawn when it is read; `text` as read."""

    video_id: str
    frames: tuple[int, int]
    turns: tuple[Turn, ...]
    text: str | None
    num_frames: int | None

    @property
    def key(self) -> tuple[str, tuple[int, int]]:
        return self.video_id, self.frames

    @property
    def question(self) -> str:
        """The first thing the user says."""
        return str(self.text).split("User: ", 1)[1].split("\n", 1)[0]


def samples(name: str) -> list[Sample]:
    """The samples of a builder; a `text` of None is one that the reference fails to read."""
    golden = read_json("data/samples.json")[name]
    rows = []
    for anno, sample in zip(golden["annos"], golden["samples"], strict=True):
        ((path, frames),) = anno["load_ranges"].items() or (("", (0, 0)),)
        rows.append(
            Sample(
                video_id=Path(path).stem,
                frames=(frames[0], frames[1]),
                turns=tuple(parse([{key: turn[key] for key in turn.keys() - NOTES} for turn in anno["conversation"]])),
                text=sample.get("text"),
                num_frames=sample.get("num_frames"),
            )
        )
    return rows


def extent(datasets: Path, video_id: str, fps: float = 2) -> Extent:
    """What the features of a video in the fixture say about it."""
    for folder in datasets.glob("**/*_2fps_384_1+3x3_*"):
        if path := find_video(folder, video_id):
            return features_extent(path, fps)
    raise KeyError(video_id)


def dialogues(
    rows: Iterable[VideoAnnotation], datasets: Path, config: DataConfig | None = None, split: str = "train"
) -> list[Dialogue]:
    """The dialogues of those rows whose video has features."""
    config = config or DataConfig(fps=2)
    made: list[Dialogue] = []
    for row in rows:
        try:
            video = extent(datasets, row.video_id, config.fps)
        except KeyError:
            continue
        made += dialogues_of(row, video, config, DEFAULT_SYSTEM_PROMPT, split).dialogues
    return made


def text(dialogue: Dialogue, version: str, prompt: bool = False) -> str:
    """The dialogue as the reference writes it; with `prompt`, up to the answer that is asked for."""
    turns = dialogue.conversation
    if prompt and isinstance(turns[-1], Assistant):
        turns = turns[:-1]
    return template("tiny", version).render(turns, prompt=prompt).text


def scene_text(scene: Scene) -> str:
    """The scene behind the default system prompt, as the reference writes it."""
    return template("tiny", "live1plus").render((System(content=DEFAULT_SYSTEM_PROMPT), *scene.turns)).text


def key(dialogue: Dialogue) -> tuple[str, tuple[int, int]]:
    return dialogue.video_id, dialogue.frames


def turns(dialogue: Dialogue) -> tuple[Turn, ...]:
    """Without the system prompt."""
    return dialogue.conversation[1:]


def learned_frames(turns: Sequence[Turn]) -> int:
    return sum(turn.num_learned for turn in turns if isinstance(turn, Stream))


class Drawing(random.Random):
    """Draws what it was given."""

    def __init__(self, *draws: object) -> None:
        super().__init__(0)
        self.draws = list(draws)

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        return self.draws.pop(0)  # type: ignore[return-value]
