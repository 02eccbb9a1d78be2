"""Settings: one YAML describes a model for data, training and serving.

Each section's class stands at the top of the module that uses it and derives from `Section`;
the sections that several modules share (`model`, with its `frames`) stand here. Reading a YAML
keeps the sections apart until a program asks for one by class, so that `jobs` and `serve` can
each read their own from the same file, and every key is checked by whoever owns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SECTIONS = (
    "model",
    "encoder",
    "engine",
    "session",
    "bus",
    "serve",
    "limits",
    "sources",
    "annotations",
    "writer",
    "data",
    "store",
    "streams",
    "training",
    "evaluation",
    "report",
    "export",
    "objectives",
)

DEFAULT_SYSTEM_PROMPT = (
    "A multimodal AI assistant is helping users with some activities. Below is their conversation, "
    "interleaved with the list of video frames received by the assistant."
)


class ConfigError(ValueError):
    """A setting is unknown, missing or of the wrong type; the message names where and what."""


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Fit = Literal["pad", "crop"]


class FrameConfig(Section):
    """What one frame becomes: an optional CLS token, a pooled grid (height, width), a separator.

    `live1` is one CLS token and no separator; `live1plus` is CLS + 3x3 and "," between frames. A picture becomes a
    square by `fit`: all of it between black bars (`pad`, as the paper's code does), or its middle (`crop`).
    """

    resolution_px: int = Field(gt=0)
    fit: Fit = "pad"
    cls: bool = True
    pooled: tuple[int, int] | None = None
    separator: str = ""

    @property
    def num_tokens(self) -> int:
        """Frame tokens per frame (N)."""
        height, width = self.pooled or (0, 0)
        return int(self.cls) + height * width

    @model_validator(mode="after")
    def _has_tokens(self) -> FrameConfig:
        if self.pooled is not None and min(self.pooled) < 1:
            raise ValueError(f"frames.pooled is {list(self.pooled)}: both sides must be at least 1")
        if self.num_tokens == 0:
            raise ValueError("frames has no token: set frames.cls to true or give frames.pooled [height, width]")
        return self


class ModelConfig(Section):
    """Which LLM and vision encoder, joined how.

    `llm` and `vision` are a folder, a hub name, or `embedded` for the weights that come in packages.
    """

    llm: str
    vision: str
    frames: FrameConfig
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    checkpoint: str | None = None
    stream_loss_weight: float = Field(default=1.0, ge=0)


SectionT = TypeVar("SectionT", bound=Section)


class Config:
    """The sections of one YAML file with command-line overrides applied, each read on demand."""

    def __init__(self, sections: dict[str, dict[str, object]], source: str = "settings") -> None:
        unknown = sorted(set(sections) - set(SECTIONS))
        if unknown:
            raise ConfigError(f"{source}: unknown section {unknown[0]!r}; known sections are {', '.join(SECTIONS)}")
        for name, body in sections.items():
            if not isinstance(body, dict):
                raise ConfigError(
                    f"{source}: section {name!r} is {type(body).__name__}, expected a mapping of settings"
                )
        self.sections = sections
        self.source = source

    def section(self, name: str, kind: type[SectionT]) -> SectionT:
        """Section `name` as `kind`; its defaults where the file has none. Raises ConfigError."""
        try:
            return kind.model_validate(self.sections.get(name, {}))
        except ValidationError as error:
            raise ConfigError(f"{self.source}: {_explain(name, kind, error)}") from None

    @property
    def model(self) -> ModelConfig:
        return self.section("model", ModelConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of sections; `overrides` are `section.key=value` strings, values in YAML.

    Raises ConfigError naming the file for a missing file, bad YAML, an unknown section or a
    malformed override; unknown keys are refused when their section is read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such settings file (give one of configs/*.yaml)")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds a {type(document).__name__}, expected sections such as 'model:'")
    for override in overrides:
        _apply_override(document, override)
    return Config(document, source=str(path))


def _apply_override(document: dict[str, object], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    node = document
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a group of settings")
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: value is not valid YAML: {error}") from None


def _explain(name: str, kind: type[Section], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join([name, *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}; known keys are {', '.join(kind.model_fields)}")
        elif problem["type"] == "missing":
            lines.append(f"{where!r} is required")
        else:
            lines.append(f"{where!r} is {problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)
