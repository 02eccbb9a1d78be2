"""From a folder of videos with subtitles to a model that is ready to serve: all offline programs in a row.

Reads videos and, beside each, a .srt, .vtt or .jsonl of the same name (docs/jobs.md has the formats): builds
dialogues, encodes the videos, trains. Started again it goes on where it stopped; videos that are new since
then want another training.name. `make finetune VIDEOS=folder` runs it with configs/finetune.yaml.
"""

from __future__ import annotations

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

TEXTS = (".srt", ".vtt", ".jsonl")


def finetune(config: Config) -> str | None:
    """Dialogues, frame tokens and a trained model of what `annotations.paths` holds; says how to serve it.

    Raises ConfigError where a folder has no video or no text beside one, before anything is computed.
    """
    for path in config.section("annotations", AnnotationsConfig).paths:
        check_videos(Path(path))
    build(config)
    encode(config)
    trained = train(config)
    if trained is not None:
        print(
            f"\ntrained on {', '.join(config.section('annotations', AnnotationsConfig).paths)}: {trained}\n"
            f"serve it:  python -m serve.app {config.source} model.checkpoint={trained} engine.untrained=false\n"
            f"try it:    python -m jobs.narrate {config.source} model.checkpoint={trained} --help"
        )
    return trained


def check_videos(folder: Path) -> None:
    """Raises ConfigError unless a folder has videos with texts beside them."""
    if not folder.is_dir():
        if not folder.exists():
            raise ConfigError(
                f"{folder}: no such folder; give one that holds videos, each with its .srt, .vtt or .jsonl"
            )
        return
    videos = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in VIDEO_SUFFIXES]
    texts = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in TEXTS]
    if not videos:
        raise ConfigError(f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}): nothing to learn from")
    if not texts:
        raise ConfigError(
            f"{folder} holds {len(videos)} videos and no text: put an .srt, .vtt or .jsonl that says what happens when "
            f"beside each, for example {videos[0].with_suffix('.srt')}"
        )


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
    sys.exit(run(finetune, module="jobs.finetune", about=__doc__, sections=SECTIONS, user_errors=errors))
