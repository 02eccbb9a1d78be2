"""Settings for a checkpoint that is given by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from actors.config import Config, ModelConfig, load_config
from actors.encoder import EncoderConfig
from actors.engine import EngineConfig
from actors.messages import SessionSettings
from actors.parts import CheckpointError
from actors.weights import WeightsError
from serve.app import main
from serve.checkpoints import CONFIGS, serving
from serve.gateway import ServeConfig

DEFAULT = Config({"model": {"llm": "embedded", "vision": "embedded", "frames": {"resolution_px": 224}}})


def test_a_checkpoint_of_ours_brings_its_model(tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig]) -> None:
    model = serving(DEFAULT, str(tiny_checkpoint), chosen=False).model
    assert model == tiny_configs["live1plus"].model_copy(update={"checkpoint": str(tiny_checkpoint)})


def test_a_published_adapter_takes_the_frames_of_the_settings_file(
    tiny_models: Path, tiny_configs: dict[str, ModelConfig]
) -> None:
    wanted = tiny_configs["live1plus"]
    given = Config({"model": wanted.model_copy(update={"checkpoint": None}).model_dump(mode="json")})
    assert serving(given, str(tiny_models / "adapter_live1plus"), chosen=True).model == wanted


@pytest.fixture
def published(tiny_models: Path, tmp_path: Path) -> Path:
    """A small adapter under the name of the published one, and with its language model."""
    folder = shutil.copytree(tiny_models / "adapter_live1plus", tmp_path / "videollm-online-8b-v1plus")
    path = folder / "adapter_config.json"
    base = {"base_model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct"}
    path.write_text(json.dumps(json.loads(path.read_text()) | base))
    return folder


def test_the_published_adapter_is_known_by_its_name(published: Path) -> None:
    model = serving(DEFAULT, str(published), chosen=False).model
    assert model.llm == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (model.frames.num_tokens, model.checkpoint) == (10, str(published))


def test_the_published_adapter_is_run_as_its_file_says_and_not_as_the_default(published: Path) -> None:
    default = load_config(CONFIGS / "embedded.yaml")
    theirs = load_config(CONFIGS / "llama3_8b_live1plus.yaml")
    config = serving(default, str(published), chosen=False)
    for name, kind in {"engine": EngineConfig, "encoder": EncoderConfig, "serve": ServeConfig}.items():
        assert config.section(name, kind) == theirs.section(name, kind) != default.section(name, kind)
    assert (
        config.section("session", SessionSettings) == SessionSettings() != default.section("session", SessionSettings)
    )
    assert "llama3_8b_live1plus.yaml for " in config.source


def test_what_is_overridden_holds_for_a_published_adapter_as_well(published: Path) -> None:
    overrides = ["model.llm=/models/llama", "engine.max_positions=700", "serve.port=8123"]
    config = serving(load_config(CONFIGS / "embedded.yaml", overrides), str(published), False, overrides)
    assert (config.model.llm, config.model.frames.num_tokens) == ("/models/llama", 10)
    engine = config.section("engine", EngineConfig)
    assert (engine.device, engine.kv_memory_share, engine.max_positions) == ("cuda", 0.8, 700)
    assert config.section("serve", ServeConfig).port == 8123


def test_a_settings_file_that_was_asked_for_is_taken_as_it_is(published: Path) -> None:
    given = load_config(CONFIGS / "llama3_8b_live1plus.yaml", ["engine.token_budget=512", "session.fps=4"])
    config = serving(given, str(published), chosen=True)
    assert config.section("engine", EngineConfig).token_budget == 512
    assert config.section("session", SessionSettings).fps == 4


def test_a_published_adapter_of_another_name_asks_for_its_settings(tiny_models: Path) -> None:
    with pytest.raises(CheckpointError, match="CONFIG="):
        serving(DEFAULT, str(tiny_models / "adapter_live1"), chosen=False)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(CheckpointError, match=r"found notes\.txt; expected settings\.json"):
        serving(DEFAULT, str(tmp_path), chosen=False)
    with pytest.raises(WeightsError, match="nowhere"):
        serving(DEFAULT, "./nowhere", chosen=False)


def test_a_bad_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.json").write_text("{")
    assert main(["--checkpoint", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "settings.json" in said
