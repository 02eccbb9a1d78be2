"""From a folder of videos with subtitles to a model that is ready to serve: all offline programs in a row.

Reads videos and, beside each, a .srt, .vtt or .jsonl of the same name (docs/jobs.md has the formats): builds
dialogues, encodes the videos, trains. Started again it goes on where it stopped; videos that are new since
then want another training.name. `make finetune VIDEOS=folder` runs it with configs/finetune.yaml.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from actors.config import Config, ConfigError, ModelConfig, Section
from actors.encoder import EncoderConfig
from actors.vision import VisionError
from jobs.annotations import VIDEO_SUFFIXES, AnnotationError, AnnotationsConfig
from jobs.build_dialogues import build
from jobs.dialogues import DataConfig
from jobs.encode_frames import EncodingError, StoreConfig, encode
from jobs.program import run
from jobs.train import USER_ERRORS, train
from jobs.training_config import TrainingConfig
from jobs.writer import WriterConfig

logger = logging.getLogger(__name__)

TEXTS = (".srt", ".vtt", ".jsonl")


def finetune(config: Config) -> str | None:
    """Dialogues, frame tokens and a trained model of what `annotations.paths` holds; says how to serve it.

    Raises ConfigError where a folder has no video or no text beside one, before anything is computed. A video
    that cannot be encoded is left out, unless `store.strict`.
    """
    paths = config.section("annotations", AnnotationsConfig).paths
    for path in paths:
        check_videos(Path(path))
    build(config)
    try:
        encode(config)
    except EncodingError as error:
        if config.section("store", StoreConfig).strict:
            raise
        logger.warning("going on without what failed: %s", error)
    trained = train(config)
    if trained is not None:
        settings = shlex.join([config.source, f"model.checkpoint={trained}"])
        shown = paths[0] if Path(paths[0]).is_dir() else "VIDEO"
        print(f"\ntrained on {', '.join(paths)}: {trained}")
        print(f"serve it:  python -m serve.app {settings}")
        print(f"try it:    python -m jobs.narrate {shlex.quote(shown)} {settings}")
    return trained


def check_videos(folder: Path) -> None:
    """Raises ConfigError unless a folder has videos with texts beside them; names a video without.

    A .jsonl may be about any video, so that where there is one nothing is missed.
    """
    if not folder.is_dir():
        if not folder.exists():
            raise ConfigError(
                f"{folder}: no such folder; give one that holds videos, each with its .srt, .vtt or .jsonl"
            )
        return
    files = sorted(folder.rglob("*"))
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    texts = [file for file in files if file.suffix.lower() in TEXTS]
    if not videos:
        raise ConfigError(f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}): nothing to learn from")
    told = {file.with_suffix("") for file in texts}
    alone = [video for video in videos if video.with_suffix("") not in told]
    if any(file.suffix.lower() == ".jsonl" for file in texts) or not alone:
        return
    example = "put an .srt, .vtt or .jsonl that says what happens when beside each, for example "
    example += str(alone[0].with_suffix(".srt"))
    if len(alone) == len(videos):
        found = f"no text of the name of one, but {texts[0]}" if texts else "no text"
        raise ConfigError(f"{folder} holds {len(videos)} videos and {found}: {example}")
    logger.warning("%d of %d videos have no text and are left out: %s", len(alone), len(videos), example)


SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelConfig,
    "annotations": AnnotationsConfig,
    "writer": WriterConfig,
    "data": DataConfig,
    "encoder": EncoderConfig,
    "store": StoreConfig,
    "training": TrainingConfig,
}

if __name__ == "__main__":
    errors = (*USER_ERRORS, AnnotationError, EncodingError, VisionError)
    sys.exit(
        run(
            finetune,
            module="jobs.finetune",
            about=__doc__,
            example="configs/finetune.yaml 'annotations.paths=[FOLDER]'",
            sections=SECTIONS,
            user_errors=errors,
        )
    )
