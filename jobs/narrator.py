"""One process that narrates videos: its encoder, its engine, and the files it writes.

Frames of a video are read and encoded in a thread of their own while the engine decides about
earlier ones. `jobs.narrate` has one Narrator, or many as actors of a Ray cluster.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Never

import numpy as np
from tqdm import tqdm

from actors.backends import build_engine, load_model
from actors.cache import write_whole
from actors.config import Config, ConfigError
from actors.encoder import EncoderConfig, FrameEncoder
from actors.engine import EngineConfig
from actors.messages import SessionSettings
from actors.runtime import limit_threads
from actors.session import SessionError
from actors.video import VideoError, probe, read_frames
from jobs.lookahead import Lookahead
from jobs.replay import FrameChunk, Question, Recording, Transcript, replay
from jobs.subtitles import burn, cues_of, srt, webvtt

logger = logging.getLogger(__name__)

CHUNKS_AHEAD = 8
MAX_LINE = 1 << 20  # characters
TEXT_SUFFIXES = (".jsonl", ".srt", ".vtt")  # in the order of writing: the first says whose the others are
VIDEO_SUFFIX = ".subtitled.mp4"
UNTRAINED_TOKENS = 8  # an untrained model speaks at nearly every frame, and words without meaning take as long
BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of video in {elapsed}{postfix}"


@dataclass(frozen=True)
class Task:
    """A video, and where its narration goes: `target` and a suffix for each format."""

    video: Path
    target: Path

    def file(self, suffix: str) -> Path:
        return Path(f"{self.target}{suffix}")

    def foreign(self) -> Path | None:
        """A file that writing would replace and that is none of ours, as far as the JSONL tells, if there is one."""
        there = [file for suffix in TEXT_SUFFIXES if (file := self.file(suffix)).exists()]
        rows = self.file(".jsonl")
        if not there or (rows in there and _is_ours(rows)):
            return None
        return rows if rows in there else there[0]

    def done(self, burns: bool) -> bool:
        """Whether all its files are there: the last of the text files, and the video that comes after it."""
        return self.file(VIDEO_SUFFIX if burns else TEXT_SUFFIXES[-1]).exists()


@dataclass(frozen=True)
class Outcome:
    """What became of a video: its length and the time it took in seconds, or what was wrong."""

    video: str
    video_s: float = 0.0
    wall_s: float = 0.0
    utterances: int = 0
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"failed: {self.error if self.video in self.error else f'{self.video}: {self.error}'}"
        return (
            f"{self.video}: {self.utterances} utterances; {self.video_s:.0f} s of video in {self.wall_s:.1f} s: "
            f"{self.video_s / self.wall_s:.1f} x real time"
        )


class Narrator:
    """Narrates one video after another.

    Raises ConfigError, CheckpointError, VisionError or WeightsError for settings that don't hold.
    """

    def __init__(self, config: Config, questions: Sequence[Question], burns: bool = False) -> None:
        self.questions = questions
        self.burns = burns
        self.session = config.section("session", SessionSettings)
        if config.model.checkpoint is None and "max_response_tokens" not in self.session.model_fields_set:
            self.session = self.session.model_copy(update={"max_response_tokens": UNTRAINED_TOKENS})
        self.encoding = config.section("encoder", EncoderConfig)
        engine = config.section("engine", EngineConfig)
        self.threads = engine.threads
        loaded = load_model(config)
        self.session = self.session.with_threshold_of(loaded.threshold)
        self.engine = build_engine(loaded.model, loaded.template, engine)
        self.encoder = FrameEncoder(loaded.config, self.encoding.device)
        if self.encoder.fingerprint != loaded.features:
            raise ConfigError(
                f"frame tokens come from {self.encoder.fingerprint}, the checkpoint expects {loaded.features}: "
                "set model.vision to the encoder it was trained with"
            )

    def attempt(self, task: Task, label: str | None = None, aloud: bool = False) -> Outcome:
        """`narrate`, but a video that fails is an outcome too: it must not end the work on the others.

        Raises SessionError, and OSError where the files cannot be written: the others would fail alike.
        """
        try:
            return self.narrate(task, label, aloud)
        except VideoError as error:
            reason = str(error)
        except (SessionError, OSError):
            raise
        except Exception as error:
            logger.exception("video=%s", task.video)
            reason = f"{type(error).__name__}: {error}"
        return Outcome(str(task.video), error=reason)

    def narrate(self, task: Task, label: str | None = None, aloud: bool = False) -> Outcome:
        """Narrate one video and write its files. Raises VideoError, or SessionError for impossible settings.

        With a `label` a progress bar has that name; `aloud` prints what is said as it is said.
        """
        limit_threads(self.threads)
        started = time.monotonic()
        duration = probe(task.video).duration
        off = True if label is None else None
        with (
            tqdm(total=duration, desc=label, disable=off, file=sys.stderr, bar_format=BAR) as bar,
            Lookahead(self._chunks(task.video), CHUNKS_AHEAD) as chunks,
        ):
            screen = _Screen(bar, aloud)
            recording = Recording(task.video.name, chunks, self.questions, self.session)
            with closing(replay(self.engine, [recording], decided=screen.show)) as transcripts:
                transcript = next(transcripts)
            bar.update(duration - bar.n)
        write(task, transcript)
        if self.burns:
            burn(task.video, task.file(VIDEO_SUFFIX), cues_of(transcript.utterances))
        for reason in transcript.refused:
            logger.warning("video=%s a question was refused: %s", task.video.name, reason)
        return Outcome(str(task.video), duration, time.monotonic() - started, len(transcript.utterances))

    def _chunks(self, video: Path) -> Iterator[FrameChunk]:
        """The encoded frames of a video; runs in a thread of its own, and sets its number of threads."""
        limit_threads(self.encoding.threads)
        wanted = self.encoder.frames
        frames = read_frames(video, self.session.fps, wanted.resolution_px, wanted.fit)
        while batch := list(islice(frames, self.encoding.batch_size)):
            yield FrameChunk([frame.time for frame in batch], self.encoder(np.stack([frame.image for frame in batch])))


class _Screen:
    """The progress bar of a transcript that grows, and its turns above the bar."""

    def __init__(self, bar: tqdm[Never], aloud: bool) -> None:
        self.bar = bar
        self.aloud = aloud
        self.shown = 0
        self.started = time.monotonic()

    def show(self, transcript: Transcript) -> None:
        if transcript.times:
            rate = transcript.times[-1] / (time.monotonic() - self.started)
            self.bar.set_postfix_str(f"{rate:.1f} x real time", refresh=False)
            self.bar.update(transcript.times[-1] - self.bar.n)
        for turn in transcript.turns[self.shown :] if self.aloud else ():
            speaker = "user" if isinstance(turn, Question) else "assistant"
            tqdm.write(f"{turn.time:7.1f}s  {speaker}: {' '.join(turn.text.split())}", file=sys.stdout)
        self.shown = len(transcript.turns)


def write(task: Task, transcript: Transcript) -> None:
    """The three text files of a narration, each whole or not at all, the JSONL first."""
    task.target.parent.mkdir(parents=True, exist_ok=True)
    cues = cues_of(transcript.utterances)
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(task.video.name, transcript))
    for suffix, text in zip(TEXT_SUFFIXES, (rows, srt(cues), webvtt(cues)), strict=True):
        write_whole(task.file(suffix), [text])


def _is_ours(file: Path) -> bool:
    """Whether the first line of a JSONL is one that `_rows` makes; a video about which nothing was said has none."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        line = lines.readline(MAX_LINE)
    try:
        row = json.loads(line or '{"video": "", "time": 0, "role": "", "text": ""}')
    except ValueError:
        return False
    return isinstance(row, dict) and {"video", "time", "role", "text"} <= row.keys()


def _rows(video: str, transcript: Transcript) -> Iterator[dict[str, object]]:
    for turn in transcript.turns:
        row: dict[str, object] = {"video": video, "time": turn.time}
        if isinstance(turn, Question):
            yield row | {"role": "user", "text": turn.text}
        else:
            yield row | {"role": "assistant", "text": turn.text, "question": turn.question, "complete": turn.complete}
