"""`make demo` as a process: what it prints, how it exits, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import Marked

from actors.config import ModelConfig
from serve.demo import Screen, report
from serve.server_events import SessionEnded, Statistics
from serve.timeline import Span, overlapping

START_S = 150


class Demo:
    """A running demo and everything it started."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.marked, self.folder = Marked(), folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve.demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.marked.environment, "TMPDIR": str(folder)},
            start_new_session=True,
        )
        self.lines: list[str] = []

    def until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came, but {''.join(self.lines)}")

    def wait(self) -> int:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            self.lines += list(stdout)
        return self.process.wait(timeout=60)

    def left_behind(self) -> list[str]:
        """Processes and folders that are still there when they have had some seconds to go."""
        deadline = time.monotonic() + 20
        while (left := [*self.marked.names(), *self.folders()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def folders(self) -> list[str]:
        return [path.name for path in self.folder.glob("videollm-*")]


@pytest.fixture
def folder() -> Iterator[Path]:
    """For what a demo keeps in files. A short path: Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def config(
    tiny_configs: dict[str, ModelConfig], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    model = {**tiny_configs["live1plus"].model_dump(mode="json"), "checkpoint": str(tiny_checkpoint)}
    path = tmp_path_factory.mktemp("demo") / "settings.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    return str(path)


@pytest.mark.slow
def test_the_demo_plays_a_video_and_leaves_nothing_behind(config: str, folder: Path, tmp_path: Path) -> None:
    demo = Demo(folder, "--config", config, "--max-seconds", "4", "--timeline", str(tmp_path / "timeline.png"))
    assert demo.wait() == 0, "".join(demo.lines)
    said = "".join(demo.lines)
    assert "0.0s  user: Please narrate the video in real time." in said
    assert "assistant:" in said
    assert "received 8" in said
    assert (tmp_path / "timeline.png").stat().st_size > 0
    assert not demo.left_behind()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "processes", "number", "status"),
    [
        ("starting", 2, signal.SIGINT, 130),
        ("starting", 11, signal.SIGTERM, 143),
        ("playing", 0, signal.SIGINT, 130),
    ],
)
def test_a_demo_that_is_stopped_leaves_nothing_behind(
    config: str, folder: Path, moment: str, processes: int, number: signal.Signals, status: int
) -> None:
    demo = Demo(folder, "--config", config)
    demo.until(moment)
    if moment == "starting":
        deadline = time.monotonic() + START_S
        while len(demo.marked.names()) < processes and time.monotonic() < deadline:
            time.sleep(0.05)
    demo.process.send_signal(number)
    assert demo.wait() == status, "".join(demo.lines)
    assert not demo.left_behind()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4"),
        (["serve.portt=1"], "portt"),
    ],
)
def test_a_demo_that_cannot_start_says_why(config: str, folder: Path, arguments: list[str], says: str) -> None:
    demo = Demo(folder, "--config", config, *arguments)
    assert demo.wait() == 1
    assert says in demo.lines[-1]
    assert not demo.left_behind()


def test_the_report_names_every_count() -> None:
    frames = Statistics(received=9, admitted=8, waiting=0, decided=6, skipped=2, dropped=1, lag_p50=0.25, lag_p99=1.5)
    ended = SessionEnded(position=3, reason="end of input", frames=frames)
    stats: dict[str, list[dict[str, object]]] = {
        "encoders": [{"encoded": 6, "frames_per_s": 80.0, "pid": 1}],
        "llms": [{"frames_per_s": None, "pid": 2, "responses": 1, "tokens": 5}],
    }
    said = "\n".join(report(ended, stats))
    for part in (
        "received 9",
        "encoded 6",
        "decided 6",
        "skipped 2",
        "dropped 1",
        "0.25 s",
        "1.50 s",
        "80.00",
        "- frames/s",
    ):
        assert part in said


def test_overlap_needs_an_earlier_frame_at_the_same_time() -> None:
    decide = Span("decide", "a", 0, 0, start=1.0, end=2.0)
    later, same_frame, apart = (
        Span("encode", "a", 1, 2, 1.5, 1.6),
        Span("encode", "a", 0, 0, 1.5, 1.6),
        Span("encode", "a", 3, 3, 2.5, 2.6),
    )
    assert overlapping([decide, later, same_frame, apart]) == [later]


def test_progress_does_not_flood_what_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(terminal=False)
    for _ in range(100):
        screen.progress("P(silent)")
    assert capsys.readouterr().out.count("P(silent)") <= 1
