"""jobs.encode_frames: which videos, in which order, and what a run leaves behind."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from actors.config import Config, ModelConfig
from actors.encoder import EncoderConfig, FrameEncoder
from actors.video import VideoFrame, read_frames
from actors.vision import vision_fingerprint, vision_width
from jobs import encode_frames, frame_chunks
from jobs.encode_frames import EncodingError, OpenVideo, encode
from jobs.frame_chunks import ChunkEncoder, Row, decoded_chunks
from jobs.frame_store import FrameStore, StoreError, StoreInfo

# Ray warns about its own settings when it copies them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


def write_clip(path: Path, frames: int, rate: int = 4) -> Path:
    """A video whose frames differ."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = 64, 48
        for index in range(frames):
            pixels = np.full((48, 64, 3), 8 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def settings_of(tiny_configs: dict[str, ModelConfig], tmp_path: Path):
    """Settings for the tiny SigLIP and the videos in `tmp_path/videos`; keywords are of the section `store`."""

    def settings(**store: object) -> Config:
        return Config(
            {
                "model": tiny_configs["live1plus"].model_dump(),
                "data": {"fps": 2.0},
                "store": {
                    "folder": str(tmp_path / "store"),
                    "videos": [str(tmp_path / "videos")],
                    "batch_size": 4,
                    "encoders": 1,
                }
                | {"encoder_cpus": 0.5, "decoder_cpus": 0.25}
                | store,
            }
        )

    return settings


def chunks_of(path: Path, size: int = 4, name: str = "clip") -> list[Row]:
    batch = {"video_id": np.array([name]), "path": np.array([str(path)])}
    return list(decoded_chunks(batch, fps=2.0, resolution_px=32, fit="pad", size=size))


def test_a_video_becomes_chunks_of_one_size_the_last_of_which_says_so(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=20)  # 5 s: 10 frames at 2 a second
    chunks = chunks_of(path)
    assert [(int(c["first"][0]), int(c["count"][0]), bool(c["last"][0])) for c in chunks] == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
    ]
    assert {c["frames"].shape for c in chunks} == {(1, 4, 32, 32, 3)}
    decoded = [frame.image for frame in read_frames(path, 2.0, 32, "pad")]
    assert np.array_equal(np.concatenate([c["frames"][0, : int(c["count"][0])] for c in chunks]), np.stack(decoded))
    assert chunks[1]["times"][0].tolist() == [2.0, 2.5, 3.0, 3.5]


def test_a_video_that_fills_its_last_chunk_has_no_empty_one(tmp_path: Path) -> None:
    chunks = chunks_of(write_clip(tmp_path / "clip.mp4", frames=16))
    assert [(int(c["count"][0]), bool(c["last"][0])) for c in chunks] == [(4, False), (4, True)]


def test_a_broken_video_becomes_one_chunk_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video")
    [chunk] = chunks_of(path)
    assert (int(chunk["count"][0]), bool(chunk["last"][0])) == (0, True)
    assert "not a readable video" in str(chunk["error"][0])


def test_whatever_a_decoder_raises_is_that_videos_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=40)
    shown = list(read_frames(path, 2.0, 32, "pad"))

    def strange(*_: object, **__: object) -> Iterator[VideoFrame]:
        yield from shown[:5]
        raise ValueError("no such pixels")

    monkeypatch.setattr(frame_chunks, "read_frames", strange)
    chunks = chunks_of(path)
    assert [bool(c["last"][0]) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert str(chunks[-1]["error"][0]) == f"{path}: ValueError: no such pixels"


def test_a_video_whose_end_cannot_be_decoded_says_so_and_a_whole_one_does_not(samples: Path, tmp_path: Path) -> None:
    whole = (samples / "hands_and_objects.mp4").read_bytes()
    path = tmp_path / "damaged.mp4"
    path.write_bytes(whole[: len(whole) * 7 // 10] + bytes(len(whole) - len(whole) * 7 // 10))
    *before, last = chunks_of(path, size=32)
    count = sum(int(chunk["count"][0]) for chunk in (*before, last))
    assert str(last["damage"][0]) == f"{path}: damaged, {count} of its 106 frames can be decoded"
    assert not str(last["error"][0])
    assert {str(chunk["damage"][0]) for chunk in before} == {""}
    assert str(chunks_of(write_clip(tmp_path / "clip.mp4", frames=16))[-1]["damage"][0]) == ""


def test_a_video_of_which_frames_never_came_has_failed(
    settings_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cut", "whole"):
        write_clip(tmp_path / "videos" / f"{name}.mp4", frames=20)

    def lossy(videos: dict[str, str], model: ModelConfig, settings: EncoderConfig, *_: object) -> Iterator[Row]:
        encoder = ChunkEncoder(model, settings)
        for name, path in videos.items():
            for chunk in chunks_of(Path(path), name=name)[name == "cut" :]:
                yield {column: values[0] for column, values in encoder(chunk).items()}

    monkeypatch.setattr(encode_frames, "connect", lambda: None)
    monkeypatch.setattr(encode_frames, "encoded_chunks", lossy)
    with pytest.raises(EncodingError, match=r"1 of 2 .*\n  cut: .*cut.mp4: some of its frames never came"):
        encode(settings_of())
    assert FrameStore.open(tmp_path / "store").video_ids() == ["whole"]
    assert sorted(path.name for path in (tmp_path / "store" / "videos").iterdir()) == ["whole.parquet"]


def test_what_of_a_damaged_video_is_there_is_stored_with_the_reason(
    settings_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "videos" / "cut.mp4", frames=20)

    def damaged(videos: dict[str, str], model: ModelConfig, settings: EncoderConfig, *_: object) -> Iterator[Row]:
        encoder = ChunkEncoder(model, settings)
        for chunk in chunks_of(Path(videos["cut"]), name="cut"):
            row = {column: values[0] for column, values in encoder(chunk).items()}
            yield row | ({"damage": "its end is damaged"} if row["last"] else {})

    monkeypatch.setattr(encode_frames, "connect", lambda: None)
    monkeypatch.setattr(encode_frames, "encoded_chunks", damaged)
    assert encode(settings_of()).damaged == {"cut": "its end is damaged"}
    store = FrameStore.open(tmp_path / "store")
    assert store.damage("cut") == "its end is damaged"
    assert store.source("cut").endswith("cut.mp4")
    assert json.loads((store.path / "encoding.json").read_text())["damaged"] == {"cut": "its end is damaged"}


def test_chunks_in_any_order_are_stored_in_their_own(tmp_path: Path, tiny_configs: dict[str, ModelConfig]) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=40)
    encoder = ChunkEncoder(tiny_configs["live1plus"], EncoderConfig())
    rows = [{name: column[0] for name, column in encoder(chunk).items()} for chunk in chunks_of(path)]
    random.Random(3).shuffle(rows)
    info = StoreInfo(fingerprint="x", vision="x", fps=2.0, num_tokens=10, width=48)
    store = FrameStore.create(tmp_path / "store", info)
    with store.writer("clip") as writer:
        video = OpenVideo(writer)
        assert [video.add(row) for row in rows] == [False] * (len(rows) - 1) + [True]
        writer.commit()
    frames = np.stack([frame.image for frame in read_frames(path, 2.0, 32, "pad")])
    expected = FrameEncoder(tiny_configs["live1plus"])(frames)
    torch.testing.assert_close(store.frames("clip"), expected, atol=2e-3, rtol=0)


def test_a_store_of_another_rate_is_refused_before_anything_is_encoded(settings_of, tmp_path: Path) -> None:
    write_clip(tmp_path / "videos" / "clip.mp4", frames=8)
    config = settings_of()
    model = config.model
    FrameStore.create(
        tmp_path / "store", StoreInfo(fingerprint="other", vision=model.vision, fps=4.0, num_tokens=10, width=48)
    )
    with pytest.raises(StoreError, match=r"fingerprint other, not siglip/32px/cls\+3x3/\w+; fps 4\.0, not 2\.0"):
        encode(config)


def test_another_video_of_an_id_that_is_in_the_store_is_refused(settings_of, tmp_path: Path) -> None:
    here = write_clip(tmp_path / "videos" / "one.mp4", frames=8)
    config = settings_of()
    model = config.model
    info = StoreInfo(
        fingerprint=vision_fingerprint(model),
        vision=model.vision,
        fps=2.0,
        num_tokens=model.frames.num_tokens,
        width=vision_width(model.vision),
    )
    store = FrameStore.create(tmp_path / "store", info)
    there = tmp_path / "elsewhere" / "one.mp4"
    there.parent.mkdir()
    shutil.copy(here, there)
    with store.locked(), store.writer("one", source=str(there)) as writer:
        writer.append([0.0], torch.zeros(1, info.num_tokens, info.width, dtype=torch.float16))
        writer.commit()
    assert encode(config).present == 1  # a copy is the same video
    there.write_bytes(b"another video")
    with pytest.raises(StoreError, match=r"another video under the id 'one': they are of .*elsewhere/one\.mp4"):
        encode(config)
    there.unlink()
    assert encode(config).present == 1  # it was moved, as far as anybody can tell


@pytest.mark.slow
def test_good_videos_are_stored_broken_ones_reported_and_what_is_there_is_kept(
    ray_cluster: None, settings_of, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    paths = {name: write_clip(videos / f"{name}.mp4", frames) for name, frames in (("long", 60), ("short", 6))}
    broken = videos / "broken.mp4"
    broken.write_bytes(b"no video")
    config = settings_of(encoders=1)
    with pytest.raises(EncodingError, match=r"1 of 3 videos could not be encoded [^\n]*\n  broken: .*not a readable"):
        encode(config)
    store = FrameStore.open(tmp_path / "store")
    assert store.video_ids() == ["long", "short"]
    encoder = FrameEncoder(config.model)
    for name, path in paths.items():
        ticks = list(read_frames(path, 2.0, 32, "pad"))
        assert store.source(name) == str(path)
        assert store.times(name).tolist() == [tick.time for tick in ticks]
        expected = encoder(np.stack([tick.image for tick in ticks]))
        torch.testing.assert_close(store.frames(name), expected, atol=2e-3, rtol=0)

    broken.unlink()
    write_clip(videos / "second.mp4", frames=8)
    before = {name: store.file(name).stat().st_mtime_ns for name in paths}
    summary = encode(config)
    assert (summary.encoded, summary.present, summary.frames) == (1, 2, 4)
    assert encode(config).encoded == 0
    assert {name: store.file(name).stat().st_mtime_ns for name in paths} == before

    encode(settings_of(folder=str(tmp_path / "other"), encoders=2))
    other = FrameStore.open(tmp_path / "other")
    for name in ("long", "short", "second"):
        assert torch.equal(store.frames(name), other.frames(name))


@pytest.mark.slow
def test_the_program_ends_with_an_error_if_a_video_failed(settings_of, tmp_path: Path) -> None:
    write_clip(tmp_path / "videos" / "clip.mp4", frames=8)
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(json.loads(json.dumps(settings_of().sections))))
    shutil.copy(settings, tmp_path / "videos" / "broken.mp4")
    command = [sys.executable, "-m", "jobs.encode_frames", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1, done.stderr
    assert "error: 1 of 2 videos could not be encoded (videos=1 already_there=0 failed=1 frames=4" in done.stderr
    assert "Traceback" not in done.stderr
    assert FrameStore.open(tmp_path / "store").video_ids() == ["clip"]
