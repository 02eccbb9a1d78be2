"""Narrate videos: what the model says and when, as JSONL and as SRT and WebVTT subtitles.

    python -m jobs.narrate video.mp4
    python -m jobs.narrate videos/ --question "Tell me when the door opens." --question "Who came?@60"
    python -m jobs.narrate videos/ configs/embedded.yaml engine.threads=2 --workers 8 --burn

Frames are encoded while the model decides about earlier ones, by the encoder, the session and the
engine that serve. For `video.mp4` the folder `--output` gets `video.jsonl` (a line for every question
and utterance), `video.srt`, `video.vtt` and, with `--burn`, `video.subtitled.mp4`; videos of a folder
keep their place below it. With `--workers`, or inside `ray job submit`, actors of a Ray cluster share
the videos; the paths must then be the same on all its machines.

A video that cannot be read is reported and the others go on; with `--keep` those that are done already are
left alone. Exit code 0: done. 1: failed, for some
videos or for all. 130: stopped by Ctrl-C; what was narrated until then is there.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from tqdm import tqdm

from actors.config import Config, ConfigError, ModelConfig, Section, load_config
from actors.encoder import EncoderConfig
from actors.engine import EngineConfig, EngineError
from actors.messages import SessionSettings
from actors.parts import CheckpointError
from actors.session import SessionError
from actors.video import VideoError, probe
from actors.vision import VisionError
from actors.weights import WeightsError
from jobs.annotations import VIDEO_SUFFIXES
from jobs.cluster import connect, cpus_of_one, is_local
from jobs.narrator import VIDEO_SUFFIX, Narrator, Outcome, Task
from jobs.program import describe, root_cause
from jobs.replay import Question

logger = logging.getLogger(__name__)

SETTINGS = Path(__file__).parents[1] / "configs" / "embedded.yaml"
INSTRUCTION = "Please narrate the video in real time."
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")
SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "session": SessionSettings,
    "engine": EngineConfig,
    "encoder": EncoderConfig,
}
USER_ERRORS = (ConfigError, CheckpointError, EngineError, OSError, SessionError, VisionError, WeightsError)


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `workers` is how many actors share the videos, 0 for none but this process."""

    config: Config
    tasks: list[Task]
    questions: list[Question]
    workers: int
    burns: bool


def narrate(request: Request) -> list[Outcome]:
    """Narrate all videos and print a line about the whole. Raises what USER_ERRORS lists."""
    if not request.tasks:
        print("every video is narrated already")
    started = time.monotonic()
    outcomes = list(_on_cluster(request) if request.workers and request.tasks else _in_this_process(request))
    done = [outcome for outcome in outcomes if not outcome.error]
    if done:
        # The process's own loading counts where several processes share the work.
        wall_s = time.monotonic() - started if request.workers else sum(outcome.wall_s for outcome in done)
        video_s = sum(outcome.video_s for outcome in done)
        print(
            f"{len(done)} of {len(outcomes)} videos, {sum(outcome.utterances for outcome in done)} utterances; "
            f"{video_s:.0f} s of video in {wall_s:.1f} s: {video_s / wall_s:.1f} x real time"
        )
    return outcomes


def _in_this_process(request: Request) -> Iterator[Outcome]:
    readable, alone = [], len(request.tasks) == 1
    for task in request.tasks:  # before the model is loaded, which takes longer
        try:
            probe(task.video)
            readable.append(task)
        except VideoError as error:
            yield _told(Outcome(str(task.video), error=str(error)), alone)
    if not readable:
        return
    started = time.monotonic()
    narrator = Narrator(request.config, request.questions, request.burns)
    print(f"loaded the model in {time.monotonic() - started:.0f} s", flush=True)
    for number, task in enumerate(readable, start=1):
        label = task.video.name if len(readable) == 1 else f"{number}/{len(readable)} {task.video.name}"
        yield _told(narrator.attempt(task, label, aloud=len(readable) == 1), alone)


def _on_cluster(request: Request) -> Iterator[Outcome]:
    import ray.data

    settings = request.config.section("engine", EngineConfig), request.config.section("encoder", EncoderConfig)
    cpus = sum(section.threads for section in settings)
    gpus = float(any(section.device.startswith("cuda") for section in settings))
    connect(max(os.cpu_count() or 1, request.workers * cpus + 1))
    ray.data.DataContext.get_current().enable_progress_bars = False  # one of our own counts videos
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"video": str(task.video), "target": str(task.target)} for task in request.tasks]
    outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(request.config, request.questions, request.burns),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(request.workers, len(rows))),
        num_cpus=cpus_of_one(cpus, gpus),
        num_gpus=gpus or None,
    )
    with tqdm(total=len(rows), unit="video", disable=None, file=sys.stderr) as bar:
        for batch in outcomes.iter_batches(batch_size=1, prefetch_batches=0):
            outcome = Outcome(**{name: column.tolist()[0] for name, column in batch.items()})
            bar.update()
            yield _told(outcome, len(rows) == 1)


class _Actor:
    """A Narrator as Ray Data calls it: a batch of one video to a row about it."""

    def __init__(self, config: Config, questions: Sequence[Question], burns: bool) -> None:
        self.narrator = Narrator(config, questions, burns)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        task = Task(Path(str(batch["video"][0])), Path(str(batch["target"][0])))
        outcome = self.narrator.attempt(task)
        return {name: np.array([value]) for name, value in asdict(outcome).items()}


def _told(outcome: Outcome, alone: bool) -> Outcome:
    """The same outcome, after saying what became of the video; the one that is `alone` is in the last line anyway."""
    if outcome.error or not alone:
        tqdm.write(str(outcome), file=sys.stderr if outcome.error else sys.stdout)
    return outcome


def find_tasks(sources: Sequence[Path], output: Path) -> list[Task]:
    """A task for every video file and every video in the folders among `sources`.

    Raises ConfigError for a source that is not there or holds no video, two videos of one name, and
    files in `output` that would be lost.
    """
    tasks: dict[Path, Task] = {}
    for source in sources:
        found = _videos_in(source) if source.is_dir() else [Path(source.name)]
        folder = source if source.is_dir() else source.parent
        for name in found:
            task = Task((folder / name).absolute(), (output / name.parent / name.stem).absolute())
            other = tasks.setdefault(task.target, task)
            if other.video != task.video:
                raise ConfigError(
                    f"{other.video} and {task.video} would both be narrated in {task.target}.*: "
                    "rename one of them, or narrate them into two folders"
                )
            if (file := task.foreign()) is not None:
                raise ConfigError(f"{file} is no narration of ours: choose another --output, or move it away")
    return list(tasks.values())


def _videos_in(folder: Path) -> list[Path]:
    # A link that leads nowhere is a video that cannot be read, and is said to be one.
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() or not path.exists()]
    videos = [name for name in names if name.suffix.lower() in VIDEO_SUFFIXES and not name.name.endswith(VIDEO_SUFFIX)]
    if not videos:
        raise ConfigError(f"{folder} holds no video ({', '.join(VIDEO_SUFFIXES)})")
    return videos


def question_of(text: str) -> Question:
    """`TEXT@SECONDS`, or TEXT alone for what is said before the first frame."""
    asked, at, seconds = text.rpartition("@")
    try:
        time_s = float(seconds) if at else 0.0
    except ValueError:
        return Question(text, opening=True)
    if not (math.isfinite(time_s) and time_s >= 0):
        raise ConfigError(f"--question {text!r}: the time is {seconds}, expected seconds from 0 on")
    return Question(asked, time_s) if at else Question(text, opening=True)


def read_request(arguments: Sequence[str] | None) -> Request:
    """The command line. Raises ConfigError; ends the program after `--help` and for unknown options."""
    options = _parser().parse_intermixed_args(arguments)
    overrides = [word for word in options.sources if OVERRIDE.match(word) and not Path(word).exists()]
    files = [word for word in options.sources if word not in overrides and Path(word).suffix in (".yaml", ".yml")]
    sources = [Path(word) for word in options.sources if word not in overrides and word not in files]
    if len(files) > 1:
        raise ConfigError(f"{' and '.join(files)}: expected one settings file")
    if not sources:
        raise ConfigError("no video is given: name video files or folders of videos")
    if (options.workers or 0) < 0:
        raise ConfigError(f"--workers is {options.workers}, expected 0 or more")
    for source in sources:
        if not source.exists():
            raise ConfigError(f"{source}: no such file or folder")
    if "working_dir_files" in Path.cwd().parts and not options.output.is_absolute():
        raise ConfigError(
            f"this job runs in Ray's copy of a folder ({Path.cwd()}), which does not outlive it: "
            "give --output an absolute path"
        )
    config = load_config(files[0] if files else SETTINGS, overrides)
    for name, kind in SECTIONS.items():
        config.section(name, kind)
    tasks = find_tasks(sources, options.output)
    _check_writable(options.output)
    if options.keep:
        tasks = [task for task in tasks if not task.done(options.burn)]
    questions = [question_of(text) for text in options.question] or [Question(INSTRUCTION, opening=True)]
    workers = options.workers if options.workers is not None else (0 if is_local() else len(tasks))
    return Request(config, tasks, questions, workers, options.burn)


def _check_writable(output: Path) -> None:
    """Raises ConfigError before any work where its results would be lost."""
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"--output {output}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {output}: {there} cannot be written to: choose another folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.narrate",
        description=__doc__,
        epilog="\n".join(describe(SECTIONS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="video | folder | settings.yaml | section.key=value",
        help="what is narrated, and with which settings (default: configs/embedded.yaml)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/narration"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT[@SECONDS]",
        help="what the user asks, and when (default: before the first frame); may be given again; "
        f"without any, {INSTRUCTION!r}",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave videos alone whose narration is there: a stopped run goes on"
    )
    parser.add_argument("--burn", action="store_true", help="also write MP4 files with the subtitles in the pictures")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="actors of a Ray cluster that share the videos (0: this process alone)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)  # a stopped `ray job` ends as with Ctrl-C
    try:
        request = read_request(arguments)
        if request.config.model.checkpoint is None:
            print("no trained checkpoint is set (model.checkpoint): what is said means nothing", flush=True)
        outcomes = narrate(request)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, USER_ERRORS):
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 1
    failed = any(outcome.error for outcome in outcomes)
    for task in request.tasks if len(request.tasks) == 1 and not failed else ():
        print(f"{task.target}.jsonl .srt .vtt{' ' + VIDEO_SUFFIX if request.burns else ''}")
    return int(failed)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
