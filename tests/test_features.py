"""Frame tokens as the public reference saves them: reading them, and taking them over into a store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.config import Config, FrameConfig, ModelConfig
from jobs.encode_frames import EncodingError, encode
from jobs.feature_import import take_over
from jobs.features import FeaturesError, FeaturesFolder, read_features
from jobs.frame_store import FrameStore, StoreInfo

FOLDER = "full_scale_2fps_384_1+3x3_google--siglip-large-patch16-384"
MODEL = ModelConfig(
    llm="none",
    vision="google/siglip-large-patch16-384",
    frames=FrameConfig(resolution_px=384, cls=True, pooled=(3, 3), separator=","),
)


def empty_store(folder: Path, fps: float = 2, width: int = 4) -> FrameStore:
    return FrameStore.create(folder, StoreInfo(fingerprint="x", vision="x", fps=fps, num_tokens=10, width=width))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("videos_2fps_384_1+3x3_google--siglip-large-patch16-384", 10), ("full_scale_2fps_384_1_google--siglip", 1)],
)
def test_a_folders_name_tells_what_made_its_features(name: str, tokens: int) -> None:
    folder = FeaturesFolder.parse(Path(name))
    assert folder is not None
    assert (folder.fps, folder.resolution_px, folder.num_tokens) == (2, 384, tokens)
    assert folder.encoder.startswith("google/siglip")
    assert FeaturesFolder.parse(Path("features")) is None


def test_every_frame_is_taken_over_with_its_time(datasets: Path, tmp_path: Path) -> None:
    """A feature in the fixture is [t // 100, t % 100, token, number of the video]."""
    store = empty_store(tmp_path)
    path = datasets / "ego4d" / "v2" / FOLDER / "v_lta.pt"
    with store.locked():
        assert take_over(path, store, MODEL, "v_lta") == 241
    frames = store.frames("v_lta")
    assert (frames[:, 0, 0] * 100 + frames[:, 0, 1]).tolist() == list(range(241))
    assert frames[7, :, 2].tolist() == list(range(10))
    assert store.times("v_lta").tolist() == [frame / 2 for frame in range(241)]


def test_features_made_in_another_way_are_refused(datasets: Path, tmp_path: Path) -> None:
    path = datasets / "ego4d" / "v2" / FOLDER / "v_short.pt"
    other = MODEL.model_copy(update={"vision": "google/siglip-base-patch16-384"})
    with pytest.raises(FeaturesError, match="encoder siglip-large-patch16-384, not siglip-base-patch16-384"):
        take_over(path, empty_store(tmp_path / "a"), other, "v_short")
    with pytest.raises(FeaturesError, match=r"fps 2, not 4\.0"):
        take_over(path, empty_store(tmp_path / "b", fps=4), MODEL, "v_short")
    cropped = MODEL.model_copy(update={"frames": MODEL.frames.model_copy(update={"fit": "crop"})})
    with pytest.raises(FeaturesError, match="fit pad, not crop"):
        take_over(path, empty_store(tmp_path / "d"), cropped, "v_short")
    unnamed = tmp_path / "features" / "a.pt"
    unnamed.parent.mkdir()
    torch.save(torch.zeros(3, 10, 4), unnamed)
    with pytest.raises(FeaturesError, match="does not tell what made its features"):
        take_over(unnamed, empty_store(tmp_path / "c"), MODEL, "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3, 4), r"found torch.float32 \[3, 4\], expected frame tokens"),
        (torch.zeros(3, 10, 4, dtype=torch.int64), "found torch.int64"),
        ({"a": torch.zeros(1)}, "found dict"),
        (torch.zeros(0, 10, 4), r"\[0, 10, 4\]"),
    ],
)
def test_what_are_no_frame_tokens_is_explained(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FeaturesError, match=message):
        read_features(tmp_path / "a.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(Path, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"no tensor")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(FeaturesError, match="not a saved tensor"):
            read_features(tmp_path / name)


def test_a_value_beyond_fp16_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    path = tmp_path / FOLDER / "a.pt"
    path.parent.mkdir()
    torch.save(torch.full((3, 10, 4), 1e5), path)
    store = empty_store(tmp_path / "store")
    with pytest.raises(FeaturesError, match="too large for float16"):
        take_over(path, store, MODEL, "a")
    assert store.video_ids() == []


def test_encode_frames_takes_features_over_and_reports_those_it_cannot(
    tiny_configs: dict[str, ModelConfig], tmp_path: Path
) -> None:
    model = tiny_configs["live1plus"]
    folder = tmp_path / "videos_2fps_32_1+3x3_google--siglip"
    folder.mkdir()
    torch.save(torch.zeros(3, 10, 48, dtype=torch.bfloat16), folder / "good.pt")
    (folder / "bad.pt").write_bytes(b"")
    store = {"folder": str(tmp_path / "store"), "videos": [str(folder)]}
    config = Config({"model": model.model_dump(), "data": {"fps": 2.0}, "store": store})
    with pytest.raises(EncodingError, match=r"1 of 2 videos could not be encoded .*\n  bad: "):
        encode(config)
    assert FrameStore.open(tmp_path / "store").video_ids() == ["good"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FeaturesError, match=r"gone.pt: No such file"):
        read_features(tmp_path / "gone.pt")
