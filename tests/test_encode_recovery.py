"""What jobs.encode_frames survives: kill -9, videos of hours, videos behind a web server, videos that are bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import yaml
from processes import Marked
from transformers import SiglipVisionConfig, SiglipVisionModel

from actors.config import Config, FrameConfig, ModelConfig
from actors.encoder import FrameEncoder
from actors.video import read_frames
from jobs.data_benchmark import write_video
from jobs.encode_frames import EncodingError, encode
from jobs.frame_store import FrameStore
from jobs.process_usage import UsageSampler

# Ray warns about its own settings when it copies them.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Frames as large as real ones, and an encoder that hardly looks at them."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    SiglipVisionModel(sizes).save_pretrained(folder)
    return ModelConfig(llm="embedded", vision=str(folder), frames=FrameConfig(resolution_px=224), dtype="float32")


@pytest.fixture
def settings_of(model: ModelConfig, tmp_path: Path):
    def settings(videos: str, store: str = "store", fps: float = 2, **more: object) -> Config:
        return Config(
            {
                "model": model.model_dump(mode="json"),
                "data": {"fps": fps},
                "store": {"folder": str(tmp_path / store), "videos": [videos], "encoders": 1, "encoder_cpus": 0.5}
                | more,
            }
        )

    return settings


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address a web server on this machine shows it at."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.timeout(1200)
def test_after_kill_9_another_run_gives_the_same_rows_and_encodes_nothing_twice(
    ray_cluster: None, settings_of, tmp_path: Path
) -> None:
    """The first run has a Ray of its own, those after it the one of the tests."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, minutes in enumerate((0.2, 5, 5)):
        write_video(videos / f"{number}.mp4", minutes, rate=2)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings_of(str(videos), decoder_cpus=1).sections))
    marked = Marked()
    command = [sys.executable, "-m", "jobs.encode_frames", str(file)]
    first = tmp_path / "store" / "videos" / "0.parquet"
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(command, env=os.environ | marked.environment, stdout=log, stderr=log)
        try:
            wait_until(first.is_file, program)
        finally:
            program.kill()
            program.wait()
    # Ray's own agent waits a minute for connections that it does not have.
    wait_until(lambda: all("RuntimeEnvAgent" in command for command in marked.commands()))
    store = FrameStore.open(tmp_path / "store")
    finished = {name: store.file(name).stat().st_mtime_ns for name in store.video_ids()}
    assert 1 <= len(finished) < 3
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    subprocess.run(command, check=True, env=os.environ | address, capture_output=True)
    assert store.video_ids() == ["0", "1", "2"]
    assert {name: store.file(name).stat().st_mtime_ns for name in finished} == finished
    assert json.loads((tmp_path / "store" / "encoding.json").read_text())["already_there"] == len(finished)
    assert not [path for path in (tmp_path / "store" / "videos").iterdir() if path.name.startswith(".")]

    encode(settings_of(str(videos), store="undisturbed", decoder_cpus=1))
    undisturbed = FrameStore.open(tmp_path / "undisturbed")
    for name in store.video_ids():
        assert torch.equal(store.frames(name), undisturbed.frames(name))
        assert store.times(name).tolist() == undisturbed.times(name).tolist()


@pytest.mark.timeout(1200)
def test_two_hours_of_video_take_no_more_memory_than_some_minutes(
    ray_cluster: None, settings_of, tmp_path: Path
) -> None:
    """All its frames at once would be 1.1 GB."""
    peaks = {}
    for minutes in (5, 120):
        folder = tmp_path / f"{minutes}"
        folder.mkdir()
        write_video(folder / "video.mp4", minutes, rate=1, width=64, height=48)
        with UsageSampler(every_s=3, memory=True) as sampler:
            summary = encode(settings_of(str(folder), fps=1, store=f"store{minutes}", batch_size=64))
        assert summary.frames == 60 * minutes
        peaks[minutes] = sampler.peak_mb
    assert peaks[120] < peaks[5] + 300


def test_remote_videos_are_encoded_and_the_first_bad_one_ends_a_strict_run(
    ray_cluster: None, settings_of, served: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = served
    write_video(folder / "good.mp4", 0.1)
    config = settings_of(address, cache=str(tmp_path))
    encode(config)
    store = FrameStore.open(tmp_path / "store")
    assert store.source("good") == f"{address}good.mp4"
    images = np.stack([frame.image for frame in read_frames(folder / "good.mp4", store.info.fps, 224, "pad")])
    torch.testing.assert_close(store.frames("good"), FrameEncoder(config.model)(images), atol=2e-3, rtol=0)
    assert not list(tmp_path.glob("videollm-*"))

    (folder / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(EncodingError, match=r"1 of 2 videos could not be encoded"):
        encode(settings_of(address))
    with pytest.raises(EncodingError, match=r"video bad cannot be encoded, which store.strict makes the end .*bad.mp4"):
        encode(settings_of(address, strict=True))
    summary = json.loads((tmp_path / "store" / "encoding.json").read_text())
    assert list(summary["failed"]) == ["bad"]
    assert (tmp_path / "store" / "encoding.png").is_file()


def wait_until(happened, program: subprocess.Popen | None = None, deadline_s: float = 500) -> None:
    end = time.monotonic() + deadline_s
    while not happened():
        assert program is None or program.poll() is None, "the program ended by itself"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
