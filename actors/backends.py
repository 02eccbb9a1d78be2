"""Which model and which engine a configuration asks for."""

from __future__ import annotations

import torch

from actors.batched import BatchedEngine
from actors.checkpoint import Loaded, load_or_untrained
from actors.config import Config, ConfigError
from actors.dialogue import Template
from actors.engine import Engine, EngineConfig
from actors.model import VideoLLM
from actors.reference import ReferenceEngine


def load_model(config: Config) -> Loaded:
    """The checkpoint that a settings file describes; takes a while.

    Raises ConfigError where there is none and `engine.untrained` does not allow that.
    """
    settings = config.section("engine", EngineConfig)
    if config.model.checkpoint is None and not settings.untrained:
        raise ConfigError(
            f"{config.source}: model.checkpoint is not set: give a checkpoint folder (jobs.train makes one), "
            "or set engine.untrained to true to see everything run on a model that talks nonsense"
        )
    return load_or_untrained(config.model, settings.device)


def build_engine(model: VideoLLM, template: Template, config: EngineConfig) -> Engine:
    """The engine for `config.backend`, with its number of threads set for this process."""
    torch.set_num_threads(config.threads)
    if config.backend == "reference":
        return ReferenceEngine(model, template, config)
    return BatchedEngine(model, template, config)
