"""Text generation: one small interface, and what is written is kept.

A `Request` asks for a text: `prompt` is for a language model, `by_rule` is what the annotations alone
say, in the form in which a model should answer. Two backends answer it: `template` takes the rule's
words, so that anybody can build dialogues offline, `transformers` (jobs/transformers_writer.py) runs any
causal language model. Whoever asked reads the words and judges them.

A model's texts are kept in `writer.folder` under the digest of writer and prompt: a run that was stopped
and started again, or changed elsewhere, generates nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from actors.cache import write_whole
from actors.config import Section

logger = logging.getLogger(__name__)


class WriterConfig(Section):
    """Who writes chats and rewrites narrations."""

    backend: Literal["template", "transformers"] = Field(
        default="template", description="template: by rule, from the annotations alone; transformers: a language model"
    )
    model: str = Field(default="embedded", description="its folder, hub name, or embedded for the LLM in a package")
    folder: str = Field(default="runs/texts", description="keeps what a language model wrote, for reruns")
    batch_size: int = Field(default=8, ge=1, description="texts generated at once")
    max_new_tokens: int = Field(default=1024, ge=1, description="a longer text counts as unfinished")
    temperature: float = Field(default=0, ge=0, description="of sampling; 0: always the most likely token")
    seed: int = Field(default=0, description="of sampling")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    workers: int = Field(default=1, ge=1, description="processes that generate")
    cpus: float = Field(default=1, ge=0, description="CPUs reserved for each of them")
    gpus: float | None = Field(default=None, ge=0, description="GPUs for each of them; default: 1 if there are any")


@dataclass(frozen=True)
class Request:
    """A text that is wanted."""

    prompt: str
    by_rule: str


@dataclass(frozen=True)
class Text:
    """What was written; `problem` says why it cannot be what was asked for, whatever it says."""

    words: str
    problem: str = ""


class UnusableText(ValueError):
    """What was written is not what was asked for; the message is the reason, in the same words for the same reason."""


class Writer(Protocol):
    """Answers requests. `name` tells apart writers that would write something else."""

    name: str
    batch_size: int

    def write(self, requests: Sequence[Request]) -> list[Text]:
        """A text for each request, in their order."""


class TemplateWriter:
    """Says what the annotations say."""

    name = "template"
    batch_size = 1 << 30

    def write(self, requests: Sequence[Request]) -> list[Text]:
        return [Text(request.by_rule) for request in requests]


class KeptTexts:
    """A writer that writes down what another one writes, and asks it only for what it has not."""

    def __init__(self, writer: Writer, folder: str | Path) -> None:
        self.writer = writer
        self.name = writer.name
        self.batch_size = writer.batch_size
        self.folder = Path(folder)

    def write(self, requests: Sequence[Request]) -> list[Text]:
        """Texts of a batch are on disk before the next batch is begun."""
        missing = {request.prompt: request for request in requests if not self._file(request).is_file()}
        for batch in _batches(list(missing.values()), self.batch_size):
            for request, text in zip(batch, self.writer.write(batch), strict=True):
                self._keep(request, text)
        if missing:
            logger.info("texts=%d written=%d writer=%s", len(requests), len(missing), self.name)
        return [self._kept(request) for request in requests]

    def _file(self, request: Request) -> Path:
        digest = hashlib.sha256(f"{self.name}\0{request.prompt}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def _keep(self, request: Request, text: Text) -> None:
        file = self._file(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"writer": self.name, "prompt": request.prompt} | asdict(text)
        write_whole(file, [json.dumps(kept, ensure_ascii=False, indent=1), "\n"])

    def _kept(self, request: Request) -> Text:
        kept = json.loads(self._file(request).read_text(encoding="utf-8"))
        return Text(kept["words"], kept["problem"])


def open_writer(config: WriterConfig) -> Writer:
    """The writer that the settings ask for; loads a model. Raises WeightsError, EmbeddedModelError."""
    if config.backend == "template":
        return TemplateWriter()
    from jobs.transformers_writer import TransformersWriter  # transformers, which only this needs

    return KeptTexts(TransformersWriter(config), config.folder)


def _batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Requests of about one length together, so that little is padded."""
    requests = sorted(requests, key=lambda request: len(request.prompt))
    for first in range(0, len(requests), size):
        yield requests[first : first + size]
