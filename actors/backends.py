"""Which engine a configuration asks for."""

from __future__ import annotations

import torch

from actors.batched import BatchedEngine
from actors.dialogue import Template
from actors.engine import Engine, EngineConfig
from actors.model import VideoLLM
from actors.reference import ReferenceEngine


def build_engine(model: VideoLLM, template: Template, config: EngineConfig) -> Engine:
    """The engine for `config.backend`, with its number of threads set for this process."""
    torch.set_num_threads(config.threads)
    if config.backend == "reference":
        return ReferenceEngine(model, template, config)
    return BatchedEngine(model, template, config)
