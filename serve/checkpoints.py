"""`--checkpoint`: the settings under which a checkpoint is served, from what it says of itself.

A checkpoint of ours carries its model's settings. The public reference's form does not say what its frames
are: the settings file given with it does, or one of configs/ whose language model and name it has. From that one
come also the sections that say how it is run: those of the default are for a small model on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

from actors.checkpoint import SETTINGS_FILE, read_settings
from actors.config import Config, load_config
from actors.parts import CheckpointError
from actors.published import CONFIG_FILE
from actors.weights import weights_folder

PUBLISHED = {"v1plus": "llama3_8b_live1plus.yaml", "v1": "llama3_8b_live1.yaml"}
CONFIGS = Path(__file__).parents[1] / "configs"
RUN = ("model", "encoder", "engine", "session", "serve")  # the sections that depend on the model served


def serving(config: Config, checkpoint: str, chosen: bool) -> Config:
    """`config` for this checkpoint, a folder, a URL or a hub name; `chosen` says that its file was asked for.

    Of one that was not, a published adapter takes nothing that depends on the model: that comes from the file in
    configs/ that it was trained with. `source` of what is returned says so.
    Raises CheckpointError and WeightsError saying what was found and what is expected.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        folder = weights_folder(checkpoint)
    if (folder / SETTINGS_FILE).exists():
        own = read_settings(folder).model.model_dump(mode="json")
        model = {**own, **(config.sections.get("model", {}) if chosen else {})}
    elif (folder / CONFIG_FILE).exists():
        if not chosen:
            config = _run_as(config, _published(folder, checkpoint))
        model = dict(config.sections["model"])
    else:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} is no checkpoint: found {names}; expected {SETTINGS_FILE} (ours) or {CONFIG_FILE} "
            "(the public reference's)"
        )
    return Config({**config.sections, "model": {**model, "checkpoint": str(folder)}}, f"{config.source} for {folder}")


def _run_as(config: Config, published: Config) -> Config:
    """`config` with the sections of `published` that depend on the model, and none of its own."""
    others = {name: body for name, body in config.sections.items() if name not in RUN}
    taken = {name: published.sections[name] for name in RUN if name in published.sections}
    return Config({**others, **taken}, f"{config.source}, with {', '.join(taken)} of {published.source},")


def _published(folder: Path, name: str) -> Config:
    """The settings in configs/ that a published adapter was trained with."""
    try:
        base = json.loads((folder / CONFIG_FILE).read_text()).get("base_model_name_or_path", "")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
    for ending, file in PUBLISHED.items():
        config = load_config(CONFIGS / file)
        if name.rstrip("/").endswith(ending) and config.model.llm == base:
            return config
    raise CheckpointError(
        f"{name} has the public reference's form, which does not say what its frames are: give the settings file "
        f"it was trained with, such as CONFIG=configs/{PUBLISHED['v1plus']} (its language model: {base or 'not named'})"
    )
