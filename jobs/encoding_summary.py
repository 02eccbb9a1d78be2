"""What a run of jobs.encode_frames did: counts, what went wrong, and how fast it went, as JSON and picture."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from actors.cache import write_whole

FILE = "encoding.json"
POINTS = 500  # of the picture: a run of days has as many as one of minutes


@dataclass
class Summary:
    """`videos` maps what was encoded to its frames; `failed` what was not, and `damaged` what was in part, to what
    was wrong.

    `progress` is (seconds since the start, frames until then), a point for every so many chunks.
    """

    encoded: int = 0
    present: int = 0
    frames: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    videos: dict[str, int] = field(default_factory=dict)
    progress: list[tuple[float, int]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return (
            f"videos={self.encoded} already_there={self.present} failed={len(self.failed)} "
            f"frames={self.frames} frames_per_s={self.frames_per_s:.1f}"
        )

    @property
    def frames_per_s(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0

    def add_frames(self, count: int) -> None:
        """Count frames that have just been stored."""
        self.frames += count
        self.seconds = time.monotonic() - self.started
        self.progress.append((self.seconds, self.frames))
        if len(self.progress) > 2 * POINTS:
            del self.progress[1:-1:2]

    def add_video(self, name: str, frames: int) -> None:
        """Count a video that is completely in the store."""
        self.encoded += 1
        self.videos[name] = frames

    def save(self, folder: Path) -> None:
        """Write `encoding.json`, and `encoding.png` if anything was encoded."""
        document = {
            "encoded": self.encoded,
            "already_there": self.present,
            "frames": self.frames,
            "seconds": round(self.seconds, 3),
            "frames_per_s": round(self.frames_per_s, 3),
            "failed": self.failed,
            "damaged": self.damaged,
            "videos": self.videos,
            "progress": [[round(seconds, 3), frames] for seconds, frames in self.progress],
        }
        write_whole(folder / FILE, [json.dumps(document, indent=1, ensure_ascii=False), "\n"])
        if self.frames:
            self._plot(folder / "encoding.png")

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        whole, lengths = figure.subplots(1, 2, width_ratios=(2, 1))
        seconds, frames = [0.0, *(at for at, _ in self.progress)], [0, *(count for _, count in self.progress)]
        whole.step(seconds, frames, where="post")
        whole.set_xlabel("seconds since the start, loading the encoder included")
        whole.set_ylabel("frames stored")
        whole.set_ylim(bottom=0)
        whole.set_xlim(left=0)
        lengths.hist(list(self.videos.values()) or [0], bins=min(30, max(1, len(self.videos))))
        lengths.set_xlabel("frames of a video")
        lengths.set_ylabel("videos")
        figure.suptitle(
            f"{self.encoded} videos, {self.frames} frames, {self.frames_per_s:.1f} frames a second; "
            f"{self.present} were there, {len(self.failed)} failed",
            fontsize=10,
        )
        figure.savefig(path, dpi=90)


def failures(folder: Path) -> dict[str, str]:
    """The videos that the last run on the store in `folder` could not encode, and why; none where it does not say."""
    try:
        return dict(json.loads((folder / FILE).read_text())["failed"])
    except (FileNotFoundError, KeyError, ValueError):
        return {}
