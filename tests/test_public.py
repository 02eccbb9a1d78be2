"""Public datasets from the settings to dialogue files, mixed by name and weight."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from golden_files import template

from actors.config import Config, ConfigError, FrameConfig, ModelConfig
from jobs.annotations import AnnotationError, AnnotationsConfig, DatasetConfig, VideoAnnotation
from jobs.build_dialogues import build
from jobs.clock import Extent
from jobs.dataset import TrainingSet
from jobs.dialogue_files import read_dialogues
from jobs.dialogues import DataConfig
from jobs.feature_import import take_over
from jobs.features import features_extent
from jobs.frame_store import FrameStore, StoreInfo
from jobs.public import READERS, read_dataset
from jobs.tasks import NARRATIONS, SCENES, copies, dialogues_of
from jobs.video_files import find_videos

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

FEATURES = "2fps_384_1+3x3_google--siglip-large-patch16-384"


def dataset(datasets: Path, form: str, **settings: object) -> dict[str, object]:
    folder, videos = (datasets / "ego4d" / "v2" / "annotations", datasets / "ego4d" / "v2" / f"full_scale_{FEATURES}")
    if form.startswith("coin"):
        folder, videos = datasets / "coin", datasets / "coin" / f"videos_{FEATURES}"
    return {"format": form, "path": str(folder), "videos": str(videos)} | settings


def settings(out: Path, public: dict[str, dict[str, object]], **data: object) -> Config:
    model = {"llm": "embedded", "vision": "embedded", "frames": {"resolution_px": 32}}
    annotations = {"paths": [], "datasets": public}
    return Config({"model": model, "annotations": annotations, "data": {"folder": str(out), **data}})


def test_every_format_of_the_settings_has_a_reader_and_every_row_a_task(datasets: Path) -> None:
    formats = get_args(DatasetConfig.model_fields["format"].annotation)
    assert set(formats) == set(READERS)
    for form in set(formats) - {"captions", "ego4d_narration_stream", "generated_chat"}:
        config = DatasetConfig.model_validate(dataset(datasets, form))
        rows = list(read_dataset("name", config))
        assert rows
        assert all(row.kind in {*NARRATIONS, *SCENES} and row.dataset == "name" for row in rows)


@pytest.mark.alone
@pytest.mark.usefixtures("ray_cluster")
def test_datasets_are_mixed_into_the_splits_they_name(datasets: Path, tmp_path: Path) -> None:
    public = {
        "narration": dataset(datasets, "ego4d_narration"),
        "twice": dataset(datasets, "coin_step", weight=2),
        "camera": {"format": "robustness"},
    }
    coverage = build(settings(tmp_path, public, fps=2, mistakes=1))
    train, validation = (read_dialogues(tmp_path / split) for split in ("train", "validation"))
    tasks = Counter(dialogue.task for dialogue in train)
    assert tasks == {"ego4d_narration": 12, "coin_step": 2 * 12, "robustness": 5}
    assert Counter(dialogue.task for dialogue in validation) == {"ego4d_narration": 4, "coin_step": 11}
    assert len({dialogue.dialogue_id for dialogue in train}) == len(train)
    assert coverage.datasets == {"narration": 16, "twice": 2 * 12 + 11, "camera": 5}
    assert list(coverage.left_out) == ["coin_missing_features"]
    missing = str(datasets / "coin" / f"videos_{FEATURES}" / "coin_missing_features.mp4")
    assert missing in coverage.left_out["coin_missing_features"]
    written = json.loads((tmp_path / "coverage.json").read_text())
    assert written["dialogues_of_datasets"] == dict(coverage.datasets)
    assert len(written["made_from"]["sha256"][str(datasets / "coin" / "coin.json")]) == 64
    assert written["made_from"]["data"]["mistakes"] == 1
    videos = find_videos((), tmp_path)
    assert {"robustness_noise", "robustness_black", "v_lta"} <= videos.keys()
    assert not any(name.startswith("no_video") for name in videos)


@pytest.mark.parametrize("form", ["ego4d_narration", "chat", "nlq", "lta", "coin_procedure"])
def test_the_frames_of_a_dialogue_are_those_it_counts(datasets: Path, tmp_path: Path, form: str) -> None:
    """A feature in the fixture is [t // 100, t % 100, token, number of the video]."""
    config = DatasetConfig.model_validate(dataset(datasets, form))
    frames = FrameConfig(resolution_px=384, cls=True, pooled=(3, 3), separator=",")
    model = ModelConfig(llm="none", vision="google/siglip-large-patch16-384", frames=frames)
    store = FrameStore.create(tmp_path, StoreInfo(fingerprint="x", vision="x", fps=2, num_tokens=10, width=4))
    for path in Path(config.videos).glob("*.pt"):
        take_over(path, store, model, path.stem)
    made = []
    for row in read_dataset("name", config):
        if row.video.endswith(".pt"):
            extent = features_extent(Path(row.video), fps=2)
            made += dialogues_of(row, extent, DataConfig(fps=2, mistakes=1), "Be brief.").dialogues
    data = TrainingSet(made, store, template("tiny", "live1plus"))
    assert len(data) == len(made) > 0
    for dialogue, sample in zip(made, data, strict=True):
        shown = sample.frames[:, 0, 0] * 100 + sample.frames[:, 0, 1]
        assert shown.tolist() == list(range(*dialogue.frames))
        assert sample.rendered.num_frames == len(sample.frames)
        assert sample.num_labels > 0


def test_generated_chats_are_judged_and_those_of_no_use_counted(tmp_path: Path) -> None:
    def write(name: str, seconds: float, answer: str) -> None:
        messages = [("user", 2, "What now?"), ("assistant", 2, answer), ("assistant", 2 + seconds, "Done.")]
        conversation = [{"role": role, "time": time, "content": text} for role, time, text in messages]
        (tmp_path / f"{name}.json").write_text(json.dumps({"video_uid": "v", "conversation": conversation}))

    write("good", 70, "Cut the onion.")
    write("short", 10, "Cut the onion.")
    write("timed", 70, "Cut it until 12.5s.")
    config = DatasetConfig(format="generated_chat", path=str(tmp_path), videos=str(tmp_path))
    made = {
        row.part: dialogues_of(row, Extent(400, 2, 199.5), DataConfig(), "Be brief.")
        for row in read_dataset("chats", config)
    }
    assert [len(made[part].dialogues) for part in ("good", "short", "timed")] == [1, 0, 0]
    assert [dict(made[part].dropped) for part in ("short", "timed")] == [
        {"chat lasts less than 60 s": 1},
        {"chat tells a time": 1},
    ]


def test_missing_files_and_folders_are_named_with_the_setting(datasets: Path, tmp_path: Path) -> None:
    config = DatasetConfig.model_validate(dataset(datasets, "nlq", path=str(tmp_path)))
    with pytest.raises(AnnotationError, match=r"annotations.datasets.q: .*nlq_train.json is missing: sign Ego4D's"):
        list(read_dataset("q", config))
    config = DatasetConfig.model_validate(dataset(datasets, "nlq", videos=str(tmp_path / "no")))
    with pytest.raises(AnnotationError, match=r"annotations.datasets.q.videos: .*/no is no folder: put the dataset's"):
        list(read_dataset("q", config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "coin"}, "format"),
        ({"format": "coin_step", "path": "x"}, "format coin_step needs videos"),
        ({"format": "robustness", "weigth": 2}, "unknown key 'annotations.datasets.a.weigth'"),
        ({"format": "robustness", "weight": 0}, "weight"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config({"annotations": {"datasets": {"a": settings}}}).section("annotations", AnnotationsConfig)


def test_a_weight_is_how_often_a_part_is_used_on_average() -> None:
    rows = [
        VideoAnnotation(video_id=f"v{number}", video="", moments=(), source="s", dataset="d") for number in range(400)
    ]
    for weight in (0.25, 1, 1.5, 3):
        counts = [copies(row, weight, seed=0) for row in rows]
        assert set(counts) <= {int(weight), int(weight) + 1}
        assert sum(counts) / len(rows) == pytest.approx(weight, abs=0.1)


def test_mistakes_are_for_training_only(datasets: Path) -> None:
    config = DatasetConfig.model_validate(dataset(datasets, "ego4d_narration"))
    (row,) = (row for row in read_dataset("n", config) if row.video_id == "v_train_a")
    made = {
        (split, mistakes): dialogues_of(row, Extent(121, 2, 60), DataConfig(mistakes=mistakes), "Be brief.", split)
        for split in ("train", "validation")
        for mistakes in (0.0, 1.0)
    }
    assert made["validation", 1.0] == made["validation", 0.0] == made["train", 0.0]
    assert made["train", 1.0] != made["train", 0.0]
