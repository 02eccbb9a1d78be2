"""Grade the shipped default on what nobody trained on, and say it in numbers with their intervals.

  samples   the sample videos, against events written by hand
  photos    streams of cut-out photographs over scenes: known things, unknown ones, "tell me when", "before"
  quiet     hours of noise, still and slowly drifting scenes: false alarms an hour

Each is graded by the session and engine that serve. Controls stand beside the model: one that says the
classifier's name whenever the picture changes, one with a stock sentence; and, for what comes, what the classifier
names when it is told the moment, which is about as much as can be known. The results are
`report.folder`/report.json and report.md. What it needs: docs/default-model.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from actors.backends import build_engine, load_model
from actors.calibration import Calibration, write_calibration
from actors.checkpoint import checkpoint_folder
from actors.config import Config, ConfigError, ModelConfig, Section
from actors.efficientnet import load_embedded
from actors.encoder import FrameEncoder
from actors.engine import Engine, EngineConfig
from actors.messages import SessionSettings
from actors.runtime import limit_threads
from actors.video import read_frames
from jobs.backgrounds import SIDE, clip, filmed
from jobs.class_fields import Classifier
from jobs.controls import SENTENCE, frame_changes
from jobs.event_metrics import (
    NOTHING,
    WINDOW,
    Event,
    EventScores,
    Said,
    event_scores,
    interval,
    pieces,
    poisson_interval,
    read_events,
    share_interval,
)
from jobs.made_streams import StreamMaker
from jobs.make_streams import StreamsConfig, material, misread
from jobs.object_names import with_article
from jobs.photo_streams import GONE, PhotoFilm, PhotosError, PhotoStream, read_labels
from jobs.program import run
from jobs.replay import FrameChunk, Question, Recording, Transcript, replay

logger = logging.getLogger(__name__)

FPS = 2.0
ENCODED_AT_ONCE = 32
CHANGES = (0.3, 0.5, 0.7, 0.9)  # candidates for the change detector's threshold, chosen on the dev streams
QUIET_SEED = 900_000_000
DEV_QUIET_SEED = 910_000_000
LOOKED = 3  # frames that the classifier is told to look at
PIECE = 10.0  # seconds of a sample video, at least, that are drawn together for the interval


Part = Literal["samples", "photos", "questions", "quiet"]


class ReportConfig(Section):
    """What the default is graded on."""

    folder: str = Field(default="runs/default/report", description="holds report.json and report.md")
    samples: str = Field(default="tests/samples", description="videos with VIDEO.events.json beside them")
    cutouts: str | None = Field(default=None, description="folder of the cut-out photographs; null leaves them out")
    scenes: str | None = Field(default=None, description="folder of photographs of scenes, for behind them")
    labels: str = "configs/photo_labels.json"
    dev_streams: int = Field(
        default=30, ge=1, description="of photographs, to choose the thresholds of the model and the change detector"
    )
    test_streams: int = Field(default=30, ge=1)
    unknown_streams: int = Field(default=6, ge=1, description="of photographs of things without a name")
    quiet_hours: float = Field(default=10, ge=0)
    quiet_clips: int = Field(default=60, ge=1, description="scenes that the quiet hours are of")
    parts: tuple[Part, ...] = Field(
        default=get_args(Part), min_length=1, description="what to grade; all takes an hour"
    )
    threshold: float | None = Field(default=None, description="null is the checkpoint's own")
    thresholds: tuple[float, ...] = Field(
        default=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8), min_length=1, description="to calibrate with"
    )
    calibrate: bool = Field(
        default=False,
        description="store in the checkpoint the one that does best on the photographs' dev half, unasked and for "
        "somebody who waits, of those that are quiet enough where nothing comes",
    )
    most_alarms: float = Field(
        default=2, ge=0, description="false alarms an hour of the quiet that a calibrated threshold may raise"
    )
    dev_quiet_hours: float = Field(default=2, gt=0, description="of other views, to calibrate with")
    at_once: int = Field(default=4, ge=1, description="streams in one step of the engine")


class Asked(NamedTuple):
    """How many answers were right."""

    right: int
    asked: int

    def counting(self, right: bool) -> Asked:
        return Asked(self.right + right, self.asked + 1)

    def line(self) -> str:
        low, high = share_interval(*self)
        share = self.right / self.asked if self.asked else 0.0
        return f"{self.right} of {self.asked} ({share:.0%}, {low:.0%} to {high:.0%})"


class Reporter:
    """The model under test with its encoder."""

    def __init__(self, config: Config) -> None:
        self.settings = config.section("report", ReportConfig)
        engine = config.section("engine", EngineConfig)
        limit_threads(engine.threads)
        if config.model.frames.pooled is None:
            raise ConfigError("model.frames.pooled is null, expected the grid that the default was trained with")
        self.pooled = config.model.frames.pooled
        self.fit = config.model.frames.fit
        self.encoder = FrameEncoder(config.model, threads=engine.threads)
        self.classifier = Classifier(load_embedded())
        loaded = load_model(config)
        self.engine: Engine = build_engine(loaded.model, loaded.template, engine)
        self.fingerprint = loaded.fingerprint
        threshold = self.settings.threshold if self.settings.threshold is not None else loaded.threshold
        if threshold is None and self.settings.calibrate:
            threshold = self.settings.thresholds[0]
        if threshold is None:
            raise ConfigError(
                f"model.checkpoint {config.model.checkpoint} has no threshold: run jobs.evaluate, which chooses one, "
                "or set report.threshold"
            )
        self.threshold = threshold
        self.session = config.section("session", SessionSettings)

    def play(self, tokens: Sequence[Tensor], asked: Sequence[Sequence[Question]] = ()) -> list[Transcript]:
        """What is said about streams of frame tokens (F, N, D), in their order."""
        settings = self.session.model_copy(update={"threshold": self.threshold})
        recordings = [
            Recording(
                str(number),
                [FrameChunk([frame / FPS for frame in range(len(one))], one)],
                asked[number] if asked else (),
                settings,
            )
            for number, one in enumerate(tokens)
        ]
        heard = {int(one.name): one for one in replay(self.engine, recordings, self.settings.at_once)}
        return [heard[number] for number in range(len(tokens))]

    def encode(self, frames: Iterable[np.ndarray]) -> Tensor:
        """Frame tokens (F, N, D) of frames uint8."""
        waiting, parts = list[np.ndarray](), list[Tensor]()
        for frame in frames:
            waiting.append(frame)
            if len(waiting) == ENCODED_AT_ONCE:
                parts.append(self.encoder(np.stack(waiting)))
                waiting = []
        if waiting:
            parts.append(self.encoder(np.stack(waiting)))
        return torch.cat(parts)

    def classifier_control(self, tokens: Tensor, change: float) -> list[Said]:
        """The classifier's name, in the narrator's words, whenever the picture changed by more than `change`."""
        moments = [0, *(f for f, far in enumerate(frame_changes(tokens)) if far > change)]
        _, places = self.classifier.named(tokens[moments, 0].float())
        names = ["something" if p < 0 else with_article(self.classifier.names[p]) for p in places.tolist()]
        return [Said(f / FPS, f"{name} comes into view.") for f, name in zip(moments, names, strict=True)]


def classifier_told(classifier: Classifier, tokens: Tensor, times: Sequence[float]) -> list[Said]:
    """Its likeliest names when it is told at which `times` (s) to look: the best that can be known of the tokens.

    Of all tokens of the `LOOKED` frames after each time, out of `tokens` (F, N, D), the mean chances count.
    """
    said = list[Said]()
    for time in times:
        first = math.ceil(time * FPS) + 1
        chances = classifier.chances(tokens[first : first + LOOKED].float()).mean((0, 1))[:-1]
        said.append(Said(time, f"{with_article(classifier.names[int(chances.argmax())])} comes into view."))
    return said


def narration(transcript: Transcript) -> list[Said]:
    """What was said of the model's own accord."""
    return [Said(one.time, one.text) for one in transcript.utterances if one.question is None]


def report(config: Config) -> None:
    """Grade and write the report."""
    reporter = Reporter(config)
    settings = reporter.settings
    streams = config.section("streams", StreamsConfig)
    films = _films(settings)
    results: dict[str, object] = {}
    change = CHANGES[1]
    controlled = "samples" in settings.parts or "photos" in settings.parts
    if films is not None and (settings.calibrate or controlled):
        seeds = tqdm(range(settings.dev_streams), desc="dev photographs", disable=not sys.stderr.isatty())
        dev = [films.dev.stream(seed) for seed in seeds]
        tokens = [reporter.encode(stream.frames) for stream in dev]
        change = _best_change(reporter, tokens, [_events(stream) for stream in dev])
        if settings.calibrate:
            quiet = QuietHours(reporter, streams, settings.dev_quiet_hours, films.dev.scenes, DEV_QUIET_SEED)
            results["calibration"] = _calibrate(reporter, dev, tokens, quiet, str(config.model.checkpoint))
    elif settings.calibrate:
        raise PhotosError("report.calibrate needs report.cutouts and report.scenes: see docs/default-model.md")
    results["threshold"] = reporter.threshold
    if controlled:
        results["change_detector"] = change
    if "samples" in settings.parts:
        results["samples"] = _samples(reporter, Path(settings.samples), change)
    if films is not None and "photos" in settings.parts:
        results["photos"] = _photos(reporter, films.test, settings.test_streams, change)
        results["unknown"] = _photos(reporter, films.unknown, settings.unknown_streams, change)
    if films is not None and "questions" in settings.parts:
        results["questions"] = _questions(reporter, films.test, settings.test_streams)
    if settings.quiet_hours and "quiet" in settings.parts:
        scenes = films.test.scenes if films is not None else ()
        results["quiet"] = _quiet(reporter, QuietHours(reporter, streams, settings.quiet_hours, scenes, QUIET_SEED))
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(page(results))
    logger.info("report=%s", folder / "report.md")


class Films(NamedTuple):
    """Known things to choose settings with and to grade with, and unknown things."""

    dev: PhotoFilm
    test: PhotoFilm
    unknown: PhotoFilm


def _films(settings: ReportConfig) -> Films | None:
    """None where the photographs are left out, which is said."""
    if settings.cutouts is None:
        logger.warning("report.cutouts is not set: the photographs are left out, see docs/default-model.md")
        return None
    if settings.scenes is None:
        raise PhotosError("report.cutouts needs report.scenes, photographs of scenes: see docs/default-model.md")
    labels = read_labels(Path(settings.labels))
    scenes = [Path(settings.scenes) / name for name in labels.scenes]
    cutouts = Path(settings.cutouts)
    return Films(
        PhotoFilm(cutouts, scenes, labels.known, "dev"),
        PhotoFilm(cutouts, scenes, labels.known, "test"),
        PhotoFilm(cutouts, scenes, labels.unknown, None),
    )


def _scored(
    said: Sequence[Sequence[Said]], events: Sequence[Sequence[Event]], piece: float = math.inf
) -> dict[str, object]:
    """Scores over streams as the report has them, with intervals over pieces of `piece` seconds at least."""
    cut = [part for one, happened in zip(said, events, strict=True) for part in pieces(one, happened, piece)]
    parts = [event_scores(*part) for part in cut]
    total = sum(parts, NOTHING)
    named = Asked(total.right, total.timed)
    texts = [one.text for stream in said for one in stream]
    repeated = sum(a.text == b.text for stream in said for a, b in itertools.pairwise(stream))
    return {
        "events": total.events,
        "responses": total.responses,
        "f1": round(total.f1, 3),
        "f1_interval": [round(edge, 3) for edge in interval(parts)],
        "timing_f1": round(total.timing_f1, 3),
        "right_words": named.line(),
        "duplicates": round(repeated / len(texts), 3) if texts else 0.0,
    }


def _total(said: Sequence[Sequence[Said]], events: Sequence[Sequence[Event]]) -> EventScores:
    """The scores of all streams together."""
    return sum((event_scores(*both) for both in zip(said, events, strict=True)), NOTHING)


def _best_change(reporter: Reporter, tokens: Sequence[Tensor], events: Sequence[Sequence[Event]]) -> float:
    """The change detector's threshold that does best on the dev streams: the control at its strongest."""

    def reached(change: float) -> float:
        said = [reporter.classifier_control(one, change) for one in tokens]
        return _total(said, events).f1

    return max(CHANGES, key=reached)


def alarms(p_silent: Sequence[float], spoke: Sequence[int], threshold: float) -> int:
    """How often the threshold would raise a false alarm in a stream that was played in silence, about.

    Frames below it that follow each other are one alarm: after it, the model has said what it saw. At the frames
    `spoke` silence was not the likeliest, so that it speaks there at any threshold.
    """
    below = [p < threshold or frame in spoke for frame, p in enumerate(p_silent)]
    return sum(now and not before for before, now in itertools.pairwise((False, *below)))


def best_quiet(curve: Mapping[float, float], an_hour: Mapping[float, float], most: float) -> float:
    """The threshold that is best by `curve` of those with at most `most` false alarms an hour; of equals the lowest.

    Raises PhotosError where all have more, or none names anything.
    """
    quiet = {threshold: value for threshold, value in curve.items() if an_hour[threshold] <= most}
    if not quiet:
        found = ", ".join(f"{an_hour[threshold]:.1f} at {threshold:g}" for threshold in sorted(an_hour))
        raise PhotosError(
            f"report.calibrate: false alarms an hour are {found}, expected at most {most:g} at one of "
            "report.thresholds: give lower ones, or raise report.most_alarms"
        )
    if not max(quiet.values()):
        raise PhotosError("report.calibrate: the model named nothing right at any of report.thresholds, none is stored")
    return max(sorted(quiet), key=lambda threshold: quiet[threshold])


def _calibrate(
    reporter: Reporter, streams: Sequence[PhotoStream], tokens: Sequence[Tensor], quiet: QuietHours, name: str
) -> dict[str, object]:
    """Choose the threshold on the dev streams, use it, and store it in the checkpoint.

    What counts is the mean of two F1: of what is said unasked, and of what somebody is told who waits for the last
    thing that comes. Streams in which things come hardly count what is said where nothing does; that is what `quiet`
    is for, in which the model is kept silent, so that one pass serves all thresholds.
    """
    events = [_events(stream) for stream in streams]
    unasked, waited, both = dict[float, float](), dict[float, float](), dict[float, float]()
    reporter.threshold = 0
    silent = list(quiet.transcripts())
    raised = {
        threshold: sum(alarms(one.p_silent, one.spoke, threshold) for one in silent) / quiet.hours
        for threshold in reporter.settings.thresholds
    }
    for threshold in reporter.settings.thresholds:
        reporter.threshold = threshold
        said = [narration(one) for one in reporter.play(tokens)]
        unasked[threshold] = _total(said, events).f1
        waited[threshold] = _waited(reporter, streams, tokens).f1
        both[threshold] = (unasked[threshold] + waited[threshold]) / 2
        logger.info(
            "threshold=%g f1=%.3f waited_f1=%.3f false_alarms_an_hour=%.1f",
            threshold,
            unasked[threshold],
            waited[threshold],
            raised[threshold],
        )
    chosen = reporter.threshold = best_quiet(both, raised, reporter.settings.most_alarms)
    digest = hashlib.sha256(b"".join(one.numpy().tobytes() for one in tokens)).hexdigest()
    calibration = Calibration(
        format_version=1,
        fingerprint=reporter.fingerprint,
        threshold=chosen,
        metric="event F1",
        value=round(unasked[chosen], 4),
        before_s=WINDOW,
        after_s=WINDOW,
        data=f"dev half of {reporter.settings.labels}",
        data_digest=digest[:16],
        num_dialogues=len(tokens),
        fps=FPS,
    )
    write_calibration(checkpoint_folder(name), calibration)
    return {
        f"at {threshold:g}": f"F1 {f1:.3f} unasked, {waited[threshold]:.3f} for who waits, "
        f"{raised[threshold]:.1f} false alarms an hour"
        for threshold, f1 in unasked.items()
    }


def _events(stream: PhotoStream) -> list[Event]:
    return [one.event for one in stream.events]


def _coming(stream: PhotoStream) -> list[Event]:
    return [one.event for one in stream.events if one.kind == "comes"]


def _waited(reporter: Reporter, streams: Sequence[PhotoStream], tokens: Sequence[Tensor]) -> EventScores:
    """What somebody is told who waits from the beginning for the last thing that comes."""
    targets = [_coming(stream)[-1] for stream in streams]
    asked = [[Question(f"Tell me when {with_article(target.words[0])} appears.", 0.5)] for target in targets]
    said = [narration(one) for one in reporter.play(tokens, asked)]
    return _total(said, [[target] for target in targets])


def _with_controls(
    reporter: Reporter,
    said: list[list[Said]],
    tokens: list[Tensor],
    events: list[list[Event]],
    change: float,
    piece: float = math.inf,
) -> dict[str, object]:
    controls = [reporter.classifier_control(one, change) for one in tokens]
    stock = [[Said(one.time, SENTENCE) for one in stream] for stream in controls]
    steady = [[Said(float(second), SENTENCE) for second in range(0, int(len(one) / FPS), 4)] for one in tokens]
    return {
        "model": _scored(said, events, piece),
        "classifier's name at every change": _scored(controls, events, piece),
        "stock sentence at every change": _scored(stock, events, piece),
        "stock sentence every 4 s": _scored(steady, events, piece),
        "always silent": _scored([[] for _ in tokens], events, piece),
    }


def _samples(reporter: Reporter, folder: Path, change: float) -> dict[str, object]:
    """The sample videos, each cut into pieces for the interval, and what was said."""
    said, tokens, events, heard = list[list[Said]](), list[Tensor](), list[list[Event]](), dict[str, object]()
    for file in sorted(folder.glob("*.events.json")):
        video = file.with_name(file.name.removesuffix(".events.json") + ".mp4")
        one = reporter.encode(frame for _, _, frame in read_frames(video, FPS, SIDE, reporter.fit))
        spoken = narration(reporter.play([one])[0])
        heard[video.name] = [f"{s.time:.1f} {s.text}" for s in spoken]
        said.append(spoken)
        tokens.append(one)
        events.append(read_events(file))
    results = _with_controls(reporter, said, tokens, events, change, PIECE)
    return {**results, "said": heard}


def _photos(reporter: Reporter, film: PhotoFilm, count: int, change: float) -> dict[str, object]:
    """Streams of cut-outs: all events, and those in which something comes."""
    streams = [film.stream(seed) for seed in tqdm(range(count), desc="photographs", disable=not sys.stderr.isatty())]
    tokens = [reporter.encode(stream.frames) for stream in streams]
    said = [narration(one) for one in reporter.play(tokens)]
    events = [_events(stream) for stream in streams]
    comes = [_coming(stream) for stream in streams]
    come_said = [[one for one in spoken if GONE not in one.text] for spoken in said]
    told = [
        classifier_told(reporter.classifier, one, [event.time for event in coming])
        for one, coming in zip(tokens, comes, strict=True)
    ]
    return {
        **_with_controls(reporter, said, tokens, events, change),
        "model, what comes": _scored(come_said, comes),
        "classifier told when, what comes": _scored(told, comes),
    }


def _questions(reporter: Reporter, film: PhotoFilm, count: int) -> dict[str, object]:
    """Timed questions: to be told when something comes, of what was there before, and of what is there now."""
    streams = [film.stream(1000 + seed) for seed in range(count)]
    tokens = [reporter.encode(stream.frames) for stream in streams]
    told = _waited(reporter, streams, tokens)
    before, now = Asked(0, 0), Asked(0, 0)
    asked = list[list[Question]]()
    for stream in streams:
        coming = _coming(stream)
        questions = [Question("What do you see now?", coming[0].time + 3)]
        if len(coming) > 1:
            questions.append(Question("What did you see before?", coming[1].time + 3))
        asked.append(questions)
    for stream, transcript in zip(streams, reporter.play(tokens, asked), strict=True):
        coming = _coming(stream)
        answers = [one.text for one in transcript.utterances if one.question is not None]
        now = now.counting(coming[0].named_by(answers[0]))
        if len(coming) > 1 and len(answers) > 1:
            before = before.counting(coming[0].named_by(answers[1]))
    return {
        "tell me when": Asked(told.right, told.events).line(),
        "told of something else": told.responses - told.right,
        "before": before.line(),
        "now": now.line(),
    }


class QuietHours:
    """Hours of scenes in which the classifier is sure of nothing, at most ten minutes a stream.

    With `scenes`, photographs that nothing was trained on; else other views of those that were backgrounds.
    """

    def __init__(
        self, reporter: Reporter, streams: StreamsConfig, hours: float, scenes: Sequence[Image.Image], seed: int
    ) -> None:
        self.reporter = reporter
        made = material(streams, reporter.classifier)
        numbers = np.random.default_rng(seed)
        clips = list[Tensor]()
        while len(clips) < reporter.settings.quiet_clips:
            frames, right = clip(numbers, 16)
            if scenes:
                frames = filmed(scenes[int(numbers.integers(len(scenes)))], numbers, 16)
            elif right:
                continue
            field = reporter.classifier.trunk(torch.from_numpy(frames))
            if not misread(reporter.classifier, field, ()):
                clips.append(field.half())
        still = replace(made, clips=torch.stack(clips), clip_names=[()] * len(clips))
        self._maker = StreamMaker(still, reporter.classifier, reporter.pooled)
        self._length = int(min(600, hours * 3600) * FPS)
        self._seeds = range(seed, seed + max(1, round(hours * 6)))

    @property
    def hours(self) -> float:
        return len(self._seeds) * self._length / FPS / 3600

    def transcripts(self) -> Iterator[Transcript]:
        """What the model says at the reporter's threshold, stream by stream."""
        at_once = self.reporter.settings.at_once
        for first in tqdm(range(0, len(self._seeds), at_once), desc="quiet", disable=not sys.stderr.isatty()):
            seeds = self._seeds[first : first + at_once]
            yield from self.reporter.play([self._maker.quiet(seed, self._length) for seed in seeds])


def _quiet(reporter: Reporter, quiet: QuietHours) -> dict[str, object]:
    """False alarms."""
    raised = [one.text for transcript in quiet.transcripts() for one in narration(transcript)]
    low, high = (edge / quiet.hours for edge in poisson_interval(len(raised)))
    return {
        "hours": round(quiet.hours, 2),
        "false alarms": len(raised),
        "an hour": f"{len(raised) / quiet.hours:.2f} ({low:.2f} to {high:.2f})",
        "such as": "; ".join(raised[:5]) or "none",
    }


def page(results: dict[str, object]) -> str:
    """The report as Markdown."""
    lines = ["# The shipped default, graded", ""]
    for name, part in results.items():
        lines += [f"## {name}", ""]
        if not isinstance(part, dict):
            lines += [str(part), ""]
            continue
        rows = {key: value for key, value in part.items() if isinstance(value, dict) and "f1" in value}
        if rows:
            columns = list(next(iter(rows.values())))
            lines += ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
            lines += [f"| {key} | " + " | ".join(str(value[c]) for c in columns) + " |" for key, value in rows.items()]
            lines.append("")
        for key, value in part.items():
            if key in rows:
                continue
            if isinstance(value, dict):
                for video, said in value.items():
                    lines += [f"{video}:", "", *(f"    {one}" for one in said), ""]
            else:
                lines += [f"- {key}: {value}"]
        lines.append("")
    return "\n".join(lines) + "\n"


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "engine": EngineConfig,
    "session": SessionSettings,
    "streams": StreamsConfig,
    "report": ReportConfig,
}

if __name__ == "__main__":
    sys.exit(
        run(
            report,
            module="jobs.default_report",
            about=__doc__,
            example="configs/embedded.yaml report.cutouts=FOLDER report.scenes=FOLDER",
            sections=SECTIONS,
            user_errors=(PhotosError,),
        )
    )
