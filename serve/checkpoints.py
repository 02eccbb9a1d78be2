"""`--checkpoint`: the settings under which a checkpoint is served, from what it says of itself.

A checkpoint of ours carries its model's settings. The public reference's form does not say what its frames
are: the settings file given with it does, or one of configs/ whose language model and name it has; that one
then says how it is served as well, on which device and with how much memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from actors.checkpoint import SETTINGS_FILE, read_settings
from actors.config import Config, load_config
from actors.parts import CheckpointError
from actors.published import CONFIG_FILE
from actors.weights import weights_folder

PUBLISHED = {"v1plus": "llama3_8b_live1plus.yaml", "v1": "llama3_8b_live1.yaml"}
CONFIGS = Path(__file__).parents[1] / "configs"


def serving(config: Config, checkpoint: str, chosen: bool, overrides: Sequence[str] = ()) -> Config:
    """`config` for this checkpoint, a folder, a URL or a hub name; `chosen` says that its file was asked for.

    `overrides`, which `config` has in it, hold in another file as well. Raises CheckpointError and WeightsError
    saying what was found and what is expected.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        folder = weights_folder(checkpoint)
    if (folder / SETTINGS_FILE).exists():
        own = read_settings(folder).model.model_dump(mode="json")
        model = {**own, **(config.sections.get("model", {}) if chosen else {})}
    elif (folder / CONFIG_FILE).exists():
        config = config if chosen else _published(folder, checkpoint, overrides)
        model = dict(config.sections["model"])
    else:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} is no checkpoint: found {names}; expected {SETTINGS_FILE} (ours) or {CONFIG_FILE} "
            "(the public reference's)"
        )
    return Config({**config.sections, "model": {**model, "checkpoint": str(folder)}}, f"{config.source} for {folder}")


def _published(folder: Path, name: str, overrides: Sequence[str]) -> Config:
    """The settings in configs/ that a published adapter was trained with."""
    try:
        base = json.loads((folder / CONFIG_FILE).read_text()).get("base_model_name_or_path", "")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
    for ending, file in PUBLISHED.items():
        if name.rstrip("/").endswith(ending) and load_config(CONFIGS / file).model.llm == base:
            return load_config(CONFIGS / file, overrides)
    raise CheckpointError(
        f"{name} has the public reference's form, which does not say what its frames are: give the settings file "
        f"it was trained with, such as CONFIG=configs/{PUBLISHED['v1plus']} (its language model: {base or 'not named'})"
    )
