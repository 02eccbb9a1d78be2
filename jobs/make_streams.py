"""Make up streams to train the embedded default on: frame tokens and dialogues, without a labelled picture.

The embedded encoder knows 1,000 classes. Real photographs in motion are its backgrounds; things are put
into its grid by running its classifier backwards, and what is then in view, which decides what is said
when, is what the classifier sees. Every set in `streams.sets` becomes a folder of streams.folder:

  SET/tokens                        a frame-token store, as jobs.encode_frames writes it
  SET/dialogues/{train,validation}  dialogues over its streams

and `connector` a checkpoint whose connector says to the LLM what the classifier sees: where training
starts (model.checkpoint). Needs the packages of the extra `default-model`.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import sys
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from actors import checkpoint
from actors.cache import whole_folder
from actors.config import DEFAULT_SYSTEM_PROMPT, Config, ConfigError, ModelConfig, Section
from actors.efficientnet import load_embedded
from actors.runtime import limit_threads
from actors.vision import EMBEDDED, vision_fingerprint
from jobs.backgrounds import TEXT, MissingPhotographsError, clip, scenery
from jobs.class_fields import Classifier, Injector
from jobs.connector_start import start_connector
from jobs.dialogue_files import to_line
from jobs.dialogues import Dialogue, split_of
from jobs.drawn_things import MissingDrawingsError, drawn_names, read_drawings, scenes
from jobs.fitted_streams import FittedMaker
from jobs.frame_store import FrameStore, StoreInfo
from jobs.made_streams import SURE, Happenings, Material, StreamMaker
from jobs.object_names import ELUSIVE
from jobs.program import run
from jobs.stream_talk import Talk
from jobs.training_config import TrainingConfig

logger = logging.getLogger(__name__)

FPS = 2.0
THINGS_AT_ONCE = 250
DRAWN_FRAMES = 10
MATERIAL_FILE = "settings.json"
MATERIAL = {"clips", "things", "drawn", "sceneries", "fitted"}  # settings that material depends on, beside drawings


class StreamSet(Section):
    """Streams of one kind."""

    streams: int = Field(ge=1)
    frames: tuple[int, int] = Field(description="shortest and longest, at 2 a second")
    gap: tuple[int, int] = Field(default=(2, 16), description="frames without a thing between two of them")
    stay: tuple[int, int] = Field(default=(4, 20), description="frames for which a thing is there")
    quiet: float = Field(default=0.12, ge=0, le=1, description="share of the streams in which nothing comes")
    still: tuple[int, int] | None = Field(
        default=None, description="shortest and longest of those in which nothing comes; null: as the others"
    )
    haunted: float = Field(
        default=0, ge=0, le=1, description="share of the places that look like a bee, say, and are none"
    )
    waiting: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the streams in which somebody waits for something, sometimes for what only looks like "
        "that which comes; null: three in ten, and never for such",
    )
    few: int | None = Field(
        default=None,
        ge=2,
        description="most things in a stream of those, coming over and over; null: any number. Needs streams.drawings",
    )
    drawn: float = Field(
        default=0.5, ge=0, le=1, description="share of what comes that is drawn, with streams.drawings"
    )
    blended: float = Field(
        default=0, ge=0, le=1, description="share of fitted things of a kind that may be either of two of that kind"
    )
    blends: tuple[int, int] | None = Field(
        default=None,
        description="blended things are like that many classes of the kind instead, at least and at most",
    )
    curious: bool = Field(default=False, description="somebody asks in every stream, most often soon after a change")
    sudden: bool = Field(
        default=False, description="who waits may say so in the midst of the stream, and wait for something else later"
    )
    questions: tuple[int, int] = Field(default=(1, 4), description="of who is curious, at least and at most")
    earlier: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of them that are about what was in view before, where something else is now; by chance few "
        "are, and the last thing that was named is then the answer to most",
    )
    reminded: bool = Field(
        default=False, description="answers about what was in view before name what is there now first"
    )
    narrated: bool = Field(default=False, description="every stream is narrated, and nobody asks anything else")


class StreamsConfig(Section):
    """What to make up, and of how much material."""

    folder: str = Field(default="runs/default", description="holds the material and the sets")
    seed: int = 0
    clips: int = Field(default=260, ge=4, description="backgrounds, of 16 frames")
    things: int = Field(default=14, ge=1, description="of each name")
    drawings: str | None = Field(
        default=None, description="folder of the emoji that come too; see jobs/drawn_things.py"
    )
    drawn: int = Field(default=700, ge=1, description="scenes with one of them, of 10 frames")
    sceneries: int = Field(default=200, ge=0, description="clips of made-up places out of focus, beside the drawings")
    fitted: bool = Field(
        default=False,
        description="things are fitted into their places, so that they look to the classifier as photographs do, and "
        "what it cannot tell goes by its kind. Needs streams.drawings",
    )
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    threads: int = Field(default=1, ge=1)
    sets: dict[str, StreamSet] = Field(
        default={
            "dense": StreamSet(streams=1000, frames=(16, 28), gap=(2, 8), quiet=0.05),
            "long": StreamSet(streams=1600, frames=(30, 90)),
        },
        description="by name; each with streams, frames, and perhaps gap, stay, quiet, still, haunted, waiting, few, "
        "drawn, blended, blends, curious, sudden, questions, earlier, reminded, narrated: see StreamSet in "
        "jobs/make_streams.py",
    )


def make(config: Config) -> None:
    """Make the start checkpoint, the material and all sets; what is there already is kept."""
    settings = config.section("streams", StreamsConfig)
    model = config.model
    if model.vision != EMBEDDED or not model.frames.cls or model.frames.pooled is None:
        raise ConfigError(
            f"made-up streams are of the embedded encoder's classifier: model.vision is {model.vision!r} with frames "
            f"{model.frames}, expected 'embedded' with cls and pooled"
        )
    for name, wanted in settings.sets.items():
        if wanted.few is not None and wanted.waiting is None:
            raise ConfigError(
                f"streams.sets.{name} has `few`, which is for the streams in which somebody waits, and no `waiting`: "
                "set their share"
            )
    if settings.drawings is None and any(wanted.few is not None for wanted in settings.sets.values()):
        raise ConfigError("a set of streams.sets has `few`, which needs drawn things: set streams.drawings")
    if settings.drawings is None and settings.fitted:
        raise ConfigError("streams.fitted is for material with drawn things: set streams.drawings")
    _check_material(settings)
    limit_threads(settings.threads)
    folder = Path(settings.folder)
    classifier = Classifier(load_embedded())
    _make_start(config, classifier, folder / "connector")
    kind_of_maker = FittedMaker if settings.fitted else StreamMaker
    maker = kind_of_maker(material(settings, classifier), classifier, model.frames.pooled)
    info = StoreInfo(
        fingerprint=vision_fingerprint(model),
        vision=EMBEDDED,
        fps=FPS,
        num_tokens=model.frames.num_tokens,
        width=classifier.network.classifier.in_features,
    )
    for number, (name, wanted) in enumerate(settings.sets.items(), start=1):
        if (folder / name).exists():
            logger.info("set=%s is there already: remove %s to make it again", name, folder / name)
            continue
        with whole_folder(folder / name) as part:
            first = settings.seed + number * 1_000_000
            _make_set(maker, classifier, info, name, wanted, first, settings.validation_fraction, part)


def _make_start(config: Config, classifier: Classifier, folder: Path) -> None:
    if folder.exists():
        return
    training = config.section("training", TrainingConfig)
    model = config.model.model_copy(update={"checkpoint": None})
    loaded = checkpoint.untrained(model, training.seed, dtype=torch.float32, adapter=training.adapter)
    embeddings = loaded.model.llm.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    start_connector(loaded.model.connector, classifier, loaded.template.tokenizer, embeddings.weight.detach())
    checkpoint.save(folder, loaded)
    logger.info("start=%s: set model.checkpoint to it", folder)


def _check_material(settings: StreamsConfig) -> None:
    """Raises ConfigError where the material that is there was made with other settings."""
    folder = Path(settings.folder) / "material"
    if not folder.exists():
        return
    record = folder / MATERIAL_FILE
    found = json.loads(record.read_text()) if record.is_file() else {}
    wanted = _material_settings(settings)
    if differing := [
        f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value
    ]:
        raise ConfigError(f"{folder} was made with streams.{'; '.join(differing)}: set another streams.folder")


def _material_settings(settings: StreamsConfig) -> dict[str, object]:
    return settings.model_dump(mode="json", include=MATERIAL) | {"drawings": settings.drawings is not None}


def material(settings: StreamsConfig, classifier: Classifier) -> Material:
    """Clips and things, made once for a folder."""
    folder = Path(settings.folder) / "material"
    if not folder.exists():
        with whole_folder(folder) as part:
            _make_material(settings, classifier, part)
            (part / MATERIAL_FILE).write_text(json.dumps(_material_settings(settings), indent=1))
    parts = load_file(folder / "material.safetensors")
    names = [tuple(line.split("|")) if line else () for line in (folder / "clip_names.txt").read_text().splitlines()]
    drawn = (folder / "drawn_names.txt").read_text().splitlines() if "drawn" in parts else []
    return Material(
        parts["clips"],
        names,
        parts["things"],
        parts["thing_names"],
        parts["natural"],
        parts.get("empty"),
        parts.get("drawn"),
        drawn,
    )


def _make_material(settings: StreamsConfig, classifier: Classifier, folder: Path) -> None:
    numbers = np.random.default_rng(settings.seed)
    fields, names = [], []
    for _ in tqdm(range(settings.clips), desc="clips", disable=not sys.stderr.isatty()):
        frames, right = clip(numbers, 16)
        field = classifier.trunk(torch.from_numpy(frames))
        if (settings.drawings is not None and not right) or not misread(classifier, field, right):
            fields.append(field.half())
            names.append(right)
    drawings = read_drawings(Path(settings.drawings)) if settings.drawings is not None else []
    for _ in tqdm(range(settings.sceneries if drawings else 0), desc="sceneries", disable=not sys.stderr.isatty()):
        # Kept although the classifier may be sure of something: that it is wrong there is to be learnt.
        fields.append(classifier.trunk(torch.from_numpy(scenery(numbers, 16))).half())
        names.append(())
    clips = torch.stack(fields)
    logger.info("clips=%d", len(clips))
    injector = Injector(classifier, clips[:, ::4].flatten(0, 1).float())
    torch_numbers = torch.Generator().manual_seed(settings.seed)
    drawn = [
        (name, classes[int(torch.randint(len(classes), (1,), generator=torch_numbers))])
        for _ in range(settings.things)
        for name, classes in enumerate(classifier.classes)
    ]
    things = []
    for at in tqdm(range(0, len(drawn), THINGS_AT_ONCE), desc="things", disable=not sys.stderr.isatty()):
        classes = torch.tensor([one[1] for one in drawn[at : at + THINGS_AT_ONCE]])
        make_things = injector.modest_things if settings.fitted else injector.things
        things.append(make_things(classes, torch_numbers).half())
    thing_names = torch.tensor([one[0] for one in drawn])
    parts = {
        "clips": clips,
        "things": torch.cat(things),
        "thing_names": thing_names,
        "natural": injector.spread.contiguous(),
    }
    if drawings:
        empty, shown, of = [], [], []
        chosen = itertools.islice(scenes(drawings, numbers, DRAWN_FRAMES), settings.drawn)
        for one in tqdm(chosen, desc="drawn", total=settings.drawn, disable=not sys.stderr.isatty()):
            empty.append(classifier.trunk(torch.from_numpy(one.empty)).half())
            shown.append(classifier.trunk(torch.from_numpy(one.shown)).half())
            of.append(f"{one.name}\n")
        parts["empty"], parts["drawn"] = torch.stack(empty), torch.stack(shown)
        (folder / "drawn_names.txt").write_text("".join(of))
    save_file(parts, folder / "material.safetensors")
    (folder / "clip_names.txt").write_text("".join("|".join(right) + "\n" for right in names))


def misread(classifier: Classifier, fields: torch.Tensor, right: tuple[str, ...]) -> bool:
    """Whether the classifier is sure of a wrong name in any of the fields (F, 49, 320)."""
    sure, place = classifier.named(classifier.features(fields).mean(1))
    seen = {classifier.names[p] for s, p in zip(sure.tolist(), place.tolist(), strict=True) if s >= SURE and p >= 0}
    return not seen <= set(right)


def _make_set(
    maker: StreamMaker,
    classifier: Classifier,
    info: StoreInfo,
    name: str,
    wanted: StreamSet,
    first: int,
    validation_fraction: float,
    folder: Path,
) -> None:
    store = FrameStore.create(folder / "tokens", info)
    (folder / "dialogues").mkdir()
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    nameable = [*classifier.names, TEXT]
    if maker.material.drawn is not None:
        nameable += sorted(set(drawn_names().values()) - set(nameable))
    if wanted.haunted:
        nameable = [name for name in nameable if name not in ELUSIVE]
    with store.locked():
        for seed in tqdm(range(first, first + wanted.streams), desc=name, disable=not sys.stderr.isatty()):
            chance = random.Random(seed)
            waits = None if wanted.waiting is None else chance.random() < wanted.waiting
            few = wanted.few if waits else None
            quiet, frames = wanted.quiet, wanted.frames
            if wanted.still is not None:
                quiet = float(chance.random() < quiet)
                frames = wanted.still if quiet else frames
            what = Happenings(
                quiet,
                wanted.gap,
                wanted.stay,
                wanted.haunted,
                few,
                wanted.drawn,
                wanted.blended,
                wanted.blends,
            )
            made = maker.make(seed, chance.randint(*frames), what)
            video = f"{name}-{seed - first:05d}"
            length = len(made.shown)
            with store.writer(video, "made up") as writer:
                writer.append([frame / FPS for frame in range(length)], made.tokens.contiguous())
                writer.commit()
            talk = Talk(
                chance,
                nameable,
                curious=wanted.curious,
                narrated=wanted.narrated,
                waits=waits,
                sudden=wanted.sudden,
                questions=wanted.questions,
                earlier=wanted.earlier,
                reminded=wanted.reminded,
            )
            turns = talk.conversation(made.shown, DEFAULT_SYSTEM_PROMPT)
            dialogue = Dialogue(
                dialogue_id=video,
                task="made_stream",
                video_id=video,
                video=video,
                fps=FPS,
                frames=(0, length),
                conversation=tuple(turns),
            )
            lines[split_of(video, validation_fraction)].append(to_line(dialogue))
    for split, written in lines.items():
        if written:
            (folder / "dialogues" / f"{split}.jsonl").write_text("".join(written))
    logger.info("set=%s train=%d validation=%d", name, len(lines["train"]), len(lines["validation"]))


SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "streams": StreamsConfig, "training": TrainingConfig}

ERRORS = (MissingPhotographsError, MissingDrawingsError)

if __name__ == "__main__":
    sys.exit(
        run(
            make,
            module="jobs.make_streams",
            about=__doc__,
            example="configs/default_model.yaml",
            sections=SECTIONS,
            user_errors=ERRORS,
        )
    )
