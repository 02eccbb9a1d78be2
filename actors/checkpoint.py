"""A checkpoint: a folder with everything that training added to a language model, ready to be served.

    settings.json                  Settings: the ModelConfig it was trained with, fingerprints, video ids
    connector.safetensors          the two linear layers
    adapter_model.safetensors      LoRA matrices as PEFT writes them, with adapter_config.json beside them
    head.safetensors               only where the checkpoint came with a head of its own
    tokenizer.json, ...            the tokenizer
    calibration.json               the threshold that validation data chose, if any did (calibration.py)

The language model's weights stay where `model.llm` says. Folders of the public reference load too
(`published.py`). A run without a checkpoint has to ask for `untrained` by name. Fingerprints let a
replica take only sessions, and a trainer only frame tokens, that were made for the same weights.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from actors.adapter import AdapterConfig, attach, read_adapter_config
from actors.cache import whole_folder
from actors.calibration import Calibration, read_calibration
from actors.causal_lm import causal_lm_folder, load_causal_lm, load_tokenizer
from actors.config import ModelConfig, Section
from actors.dialogue import Template
from actors.model import VideoLLM
from actors.parts import CheckpointError, Parts, assemble, collect, read_tensors
from actors.published import CONFIG_FILE, WEIGHTS_FILE, read_published, write_published
from actors.runtime import native_dtype
from actors.vision import vision_fingerprint, vision_width
from actors.weights import combine, digest, weights_folder

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
SETTINGS_FILE = "settings.json"
CONNECTOR_FILE = "connector.safetensors"
HEAD_FILE = "head.safetensors"
EMBEDDED = "embedded"  # in place of a folder: the trained default that comes with this package
EMBEDDED_FOLDER = "embedded_model"


class Settings(Section):
    """What `settings.json` holds.

    `llm`, `features` and `parts` say which weights belong together: the digests of the language model and
    of our own files, and the feature fingerprint of the frame tokens. `fingerprint` is that of `Loaded`.
    """

    format_version: Literal[1]
    model: ModelConfig
    llm: str
    features: str
    parts: str
    fingerprint: str
    trained_videos: list[str]


@dataclass
class Loaded:
    """A model with all that belongs to it.

    `fingerprint` covers everything that decides what the model says (language model, parts, frames,
    vision encoder, system prompt); `features` is the part of it that frame tokens must match, `llm` the
    digest of the language model; `calibration` tells when it should speak. The rest is what `save` needs.
    """

    model: VideoLLM
    template: Template
    config: ModelConfig
    llm: str
    features: str
    fingerprint: str
    trained_videos: list[str]
    adapter: AdapterConfig | None
    head: torch.Tensor | None = None
    calibration: Calibration | None = None

    @property
    def threshold(self) -> float | None:
        """What sessions use that were given none; None where no data has chosen one."""
        return self.calibration.threshold if self.calibration else None


def load(
    source: ModelConfig | str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    merged: bool = True,
) -> Loaded:
    """The checkpoint of a ModelConfig, or the one in a folder of ours (or under a hub name), in eval mode.

    `merged` folds the adapter into the language model and freezes all, for serving; otherwise adapter and
    connector stay trainable, in fp32 whatever the language model's dtype. That is the config's by default,
    or float32 on a CPU that only imitates bfloat16.
    Raises CheckpointError or WeightsError saying what was found and what is expected.
    """
    folder, given = _asked(source)
    settings = read_settings(folder) if (folder / SETTINGS_FILE).exists() else None
    config = _published_config(folder, given) if settings is None else _agreed_config(folder, settings, given)
    llm_folder = causal_lm_folder(config.llm)
    llm_digest = digest(llm_folder)
    if settings is not None and settings.llm != llm_digest:
        raise CheckpointError(
            f"{folder} was trained on {settings.model.llm} with digest {settings.llm}, but {config.llm} has "
            f"{llm_digest}: set model.llm to the LLM it was trained on"
        )
    llm = load_causal_lm(llm_folder, dtype or native_dtype(getattr(torch, config.dtype), device), device)
    parts = read_published(folder, llm) if settings is None else _read_parts(folder, settings)
    model = assemble(llm, config, parts, trainable=not merged)
    if merged:
        model.merge()
    log.info("checkpoint=%s llm=%s merged=%s", folder, config.llm, merged)
    loaded = _loaded(
        model.eval(),
        config,
        parts,
        tokenizer_folder=llm_folder if settings is None else folder,
        llm_digest=llm_digest,
        features=vision_fingerprint(config) if settings is None else settings.features,
        trained_videos=[] if settings is None else settings.trained_videos,
    )
    return replace(loaded, calibration=read_calibration(folder, loaded.fingerprint))


def untrained(
    config: ModelConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: AdapterConfig | None = None,
) -> Loaded:
    """The bare language model with a random connector, the same for every process with the same seed.

    With `adapter` it is where training starts: adapter and connector trainable and in fp32. Without, what
    it says about a video is nonsense, which is why `load` never falls back to it.
    """
    llm_folder = causal_lm_folder(config.llm)
    llm = load_causal_lm(llm_folder, dtype or native_dtype(getattr(torch, config.dtype), device), device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLLM(llm, config, vision_width(config.vision))
        if adapter is None:
            model.requires_grad_(False)
        else:
            model.llm = attach(llm, adapter)
            model.connector.float()
    return _loaded(
        model.eval(),
        config,
        collect(model, adapter),
        tokenizer_folder=llm_folder,
        llm_digest=digest(llm_folder),
        features=vision_fingerprint(config),
        trained_videos=[],
    )


def load_or_untrained(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> Loaded:
    """For programs that can show their paths without training: `untrained` where no checkpoint is set.

    A checkpoint that is set but cannot be loaded is an error here too.
    """
    if config.checkpoint is not None:
        return load(config, device)
    log.warning("model.checkpoint is not set: connector is random (seed %d), what the model says means nothing", seed)
    return untrained(config, seed, device)


def save(
    folder: str | Path, loaded: Loaded, trained_videos: Iterable[str] = (), dtype: torch.dtype | None = None
) -> None:
    """Write what `load` reads, whole or not at all; videos add to those of the checkpoint it came from.

    With `dtype` adapter and connector are rounded to it. The calibration is not kept: other weights speak
    at other thresholds.
    Raises CheckpointError if the adapter was merged, which cannot be undone.
    """
    parts = collect(loaded.model, loaded.adapter, loaded.head)
    if dtype is not None:
        parts = parts.rounded(dtype)
    settings = Settings(
        format_version=FORMAT_VERSION,
        model=loaded.config.model_copy(update={"checkpoint": None}),
        llm=loaded.llm,
        features=loaded.features,
        parts=parts.digest,
        fingerprint=_fingerprint(loaded.config, loaded.llm, parts, loaded.features),
        trained_videos=sorted({*loaded.trained_videos, *trained_videos}),
    )
    with whole_folder(Path(folder)) as part:
        save_file(parts.connector, part / CONNECTOR_FILE, {"format": "pt"})
        if parts.adapter is not None:
            save_file(parts.lora, part / WEIGHTS_FILE, {"format": "pt"})
            parts.adapter.lora(loaded.config.llm).save_pretrained(str(part))
        if parts.head is not None:
            save_file({"head": parts.head}, part / HEAD_FILE, {"format": "pt"})
        loaded.template.tokenizer.save_pretrained(str(part))
        (part / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2))


@torch.no_grad()
def average(loaded: Loaded, other: Loaded, share: float) -> None:
    """Set the trained weights of `loaded` to `share` of themselves and the rest of those of `other`, in place.

    Both come from `load` with merged=False. Between a model and what it was fine-tuned to lie models that know what
    both know (Wortsman et al. 2022, arXiv:2109.01903). Raises CheckpointError where the two do not fit.
    """
    ours, theirs = (
        {"llm": one.llm, "features": one.features, "frames": one.config.frames, "adapter": one.adapter}
        for one in (loaded, other)
    )
    differing = [f"{part} {found} and {theirs[part]}" for part, found in ours.items() if found != theirs[part]]
    if differing:
        raise CheckpointError(f"checkpoints of {'; '.join(differing)} have no average: these must be equal")
    others = dict(other.model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            parameter.lerp_(others[name].to(parameter), 1 - share)


def export_published(folder: str | Path, loaded: Loaded) -> None:
    """Write a checkpoint (loaded with merged=False) in the public reference's form. Raises CheckpointError."""
    own_head = loaded.model.base_llm.get_output_embeddings().weight
    assert isinstance(own_head, torch.Tensor)
    write_published(Path(folder), collect(loaded.model, loaded.adapter, loaded.head), own_head, loaded.config.llm)


def read_settings(folder: str | Path) -> Settings:
    """A checkpoint's settings, without its weights. Raises CheckpointError."""
    path = Path(folder) / SETTINGS_FILE
    try:
        fields = json.loads(path.read_text())
        found = fields["format_version"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of ours: expected JSON with format_version"
        ) from None
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {found!r}, expected {FORMAT_VERSION}: use the program it was saved with"
        )
    try:
        return Settings.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise CheckpointError(f"{path} is damaged: {problems}") from None


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint named by folder, URL or hub name, or of the one that comes with this package.

    Raises WeightsError where there is none.
    """
    if name == EMBEDDED:
        spec = importlib.util.find_spec("configs")
        places = (spec.submodule_search_locations if spec else None) or ["configs"]
        return Path(next(iter(places))) / EMBEDDED_FOLDER
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else weights_folder(name)


def _asked(source: ModelConfig | str | Path) -> tuple[Path, ModelConfig | None]:
    given = source if isinstance(source, ModelConfig) else None
    name = source.checkpoint if isinstance(source, ModelConfig) else source
    if name is None:
        raise CheckpointError(
            "model.checkpoint is not set: give a checkpoint folder (jobs.train makes one), "
            "or ask for an untrained model by name"
        )
    return checkpoint_folder(str(name)), given


def _published_config(folder: Path, given: ModelConfig | None) -> ModelConfig:
    if not (folder / CONFIG_FILE).exists():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"{folder} is no checkpoint: found {names}; expected {SETTINGS_FILE} (ours) or {CONFIG_FILE} "
            "(the public reference's)"
        )
    if given is None:
        raise CheckpointError(
            f"{folder} has the public reference's form, which does not say what its frames are: load it through "
            "a ModelConfig with llm, vision and frames (configs/llama3_8b_live1plus.yaml has the published one's)"
        )
    return given


def _agreed_config(folder: Path, settings: Settings, given: ModelConfig | None) -> ModelConfig:
    """What the checkpoint was trained with, except for what is set explicitly now and may differ."""
    trained = settings.model.model_copy(update={"checkpoint": str(folder)})
    if given is None:
        return trained
    if given.frames != trained.frames:
        raise CheckpointError(
            f"{folder} was trained on frames of {trained.frames}, the settings say {given.frames}: make them equal"
        )
    if given.vision != trained.vision and (features := vision_fingerprint(given)) != settings.features:
        raise CheckpointError(
            f"{folder} was trained on frame tokens of {settings.features}, model.vision {given.vision} makes "
            f"{features}: set model.vision to the encoder it was trained with"
        )
    return trained.model_copy(update={key: getattr(given, key) for key in given.model_fields_set})


def _read_parts(folder: Path, settings: Settings) -> Parts:
    adapter, lora = None, {}
    if (folder / CONFIG_FILE).exists():
        try:
            adapter = read_adapter_config(folder / CONFIG_FILE)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        lora = read_tensors(folder / WEIGHTS_FILE)
    head = read_tensors(folder / HEAD_FILE).get("head") if (folder / HEAD_FILE).exists() else None
    parts = Parts(read_tensors(folder / CONNECTOR_FILE), lora, adapter, head)
    if (found := parts.digest) != settings.parts:
        raise CheckpointError(
            f"the weights in {folder} have digest {found}, {SETTINGS_FILE} expects {settings.parts}: "
            "files were lost, changed or mixed after it was saved; copy it again"
        )
    return parts


def _loaded(
    model: VideoLLM,
    config: ModelConfig,
    parts: Parts,
    *,
    tokenizer_folder: Path,
    llm_digest: str,
    features: str,
    trained_videos: list[str],
) -> Loaded:
    return Loaded(
        model=model,
        template=Template(load_tokenizer(tokenizer_folder), config.frames, vocab_size=model.frame_id),
        config=config,
        llm=llm_digest,
        features=features,
        fingerprint=_fingerprint(config, llm_digest, parts, features),
        trained_videos=trained_videos,
        adapter=parts.adapter,
        head=parts.head,
    )


def _fingerprint(config: ModelConfig, llm_digest: str, parts: Parts, features: str) -> str:
    frames = config.frames.model_dump_json(exclude={"fit"})  # which `features` says
    covered = [llm_digest, parts.digest, features, frames, config.system_prompt]
    return f"{Path(config.llm).name}/{combine(covered)}"
