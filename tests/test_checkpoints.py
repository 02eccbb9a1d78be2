"""Settings for a checkpoint that is given by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from actors.config import Config, ModelConfig
from actors.engine import EngineConfig
from actors.parts import CheckpointError
from actors.weights import WeightsError
from serve.app import main
from serve.checkpoints import serving

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


def test_the_published_adapter_is_known_by_its_name(tiny_models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models / "adapter_live1plus", tmp_path / "videollm-online-8b-v1plus")
    path = folder / "adapter_config.json"
    base = {"base_model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct"}
    path.write_text(json.dumps(json.loads(path.read_text()) | base))
    found = serving(DEFAULT, str(folder), False, ["model.llm=/models/llama", "engine.max_positions=700"])
    model, engine = found.model, found.section("engine", EngineConfig)
    assert (model.llm, model.frames.num_tokens, model.checkpoint) == ("/models/llama", 10, str(folder))
    assert (engine.device, engine.kv_memory_share, engine.max_positions) == ("cuda", 0.8, 700)
    assert "llama3_8b_live1plus.yaml" in found.source


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
