"""Every settings file that trains: its sections are read by those who use them, and its plan fits together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from actors.config import Config, load_config
from actors.encoder import EncoderConfig
from actors.engine import EngineConfig
from jobs.annotations import AnnotationsConfig
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.estimate import dimensions, dry_run, language_model, memory
from jobs.plan import Measured, Plan
from jobs.public import READERS
from jobs.training_config import TrainingConfig

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(
    path
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*.yaml")]
    if "training" in yaml.safe_load(path.read_text())
)
GIB = 2**30
# Learning rate, epochs and datasets of the public reference's recipes.
REFERENCE = {
    "narration": (2e-4, 2, {"ego4d_narration"}),
    "combined": (2e-4, 2, {"chat", "ego4d_refined_narration", "robustness"}),
    "coin": (1e-4, 5, {"coin_step", "coin_next", "coin_task", "coin_procedure", "coin_taskprocedure"}),
    "lta": (2e-4, 6, {"lta"}),
}


def training(config: Config) -> TrainingConfig:
    return config.section("training", TrainingConfig)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_settings_file_fits_together(file: Path) -> None:
    config = load_config(file)
    settings, data, frames = training(config), config.section("data", DataConfig), config.model.frames
    settings.check()
    assert config.section("encoder", EncoderConfig).device == config.section("engine", EngineConfig).device
    config.section("store", StoreConfig)
    for dataset in config.section("annotations", AnnotationsConfig).datasets.values():
        assert dataset.format in READERS
    a_frame = frames.num_tokens + bool(frames.separator)
    longest = data.max_frames * a_frame
    assert longest < (settings.max_tokens or 8192)
    assert settings.batch_size % settings.workers == 0
    rows = [Measured(tokens=n * longest // 8, frames=n, text=9, silent=1, speaking=1) for n in (1, 2, 3, 7, 8)]
    plan = Plan(rows, settings)
    assert plan.num_steps == (settings.max_steps or -(-5 * settings.epochs // settings.batch_size))
    shares = [one for rank in range(settings.workers) for one in plan.share(0, rank, settings.workers)]
    assert sorted(shares, key=lambda one: one.number) == plan.packs(0)


@pytest.mark.parametrize("version", ["live1", "live1plus"])
@pytest.mark.parametrize("recipe", REFERENCE)
def test_a_recipe_has_the_references_numbers(recipe: str, version: str) -> None:
    config = load_config(CONFIGS / "recipes" / f"{recipe}_{version}.yaml")
    settings, (rate, epochs, datasets) = training(config), REFERENCE[recipe]
    assert (settings.learning_rate, settings.epochs, settings.warmup, settings.batch_size) == (rate, epochs, 0.05, 64)
    assert (settings.adapter.rank, settings.adapter.alpha, settings.adapter.dropout) == (128, 256, 0.05)
    assert settings.objective == "streaming"
    assert {d.format for d in config.section("annotations", AnnotationsConfig).datasets.values()} == datasets
    assert config.section("data", DataConfig).max_frames == {"live1": 7200, "live1plus": 1200}[version]
    assert config.model.frames.num_tokens == {"live1": 1, "live1plus": 10}[version]
    assert (config.section("data", DataConfig).mistakes > 0) == (recipe == "combined")


@pytest.mark.parametrize(
    ("name", "gpu_gib"), [("llama3_1b_live1plus", 24), *((f"recipes/{r}_live1plus", 80) for r in REFERENCE)]
)
def test_the_longest_dialogues_are_estimated_to_fit(name: str, gpu_gib: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    settings, sizes = training(config), language_model(config.model.llm)[0]
    numbers = dimensions(sizes, settings.adapter, 1024)
    tokens = max(settings.pack_tokens, config.section("data", DataConfig).max_frames * 11)
    assert sum(memory(numbers, config.model, settings, tokens, tokens // 2, element=2).values()) < 0.8 * gpu_gib * GIB


def test_a_dry_run_without_data_says_what_is_missing_and_what_a_pack_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = dry_run(load_config(CONFIGS / "recipes" / "narration_live1plus.yaml"))
    assert "model meta-llama/Meta-Llama-3-8B-Instruct: 8,030 M parameters" in told
    assert "LoRA of rank 128, 352.5 M parameters" in told
    assert "no plan, for want of data: runs/ego4d_live1plus/tokens is no frame-token store" in told
    assert "memory of a worker, in a pack of 16,384 positions" in told
