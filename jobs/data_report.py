"""What the benchmark of the data pipeline found, as table, JSON and picture."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.config import Config
from jobs.benchmark_report import Goal
from jobs.frame_chunks import StoreConfig

LEAST_OF_BOUND = 0.85
MOST_MEMORY_GROWTH = 1.1


@dataclass(frozen=True)
class Stages:
    """CPU seconds a frame, each stage alone on one core."""

    decode_s: float
    encode_s: float

    @classmethod
    def mean(cls, *measured: Stages) -> Stages:
        return cls(
            sum(one.decode_s for one in measured) / len(measured), sum(one.encode_s for one in measured) / len(measured)
        )

    @property
    def both_s(self) -> float:
        return self.decode_s + self.encode_s


@dataclass(frozen=True)
class Pipeline:
    """The middle of a run: `cpu_s` of all our processes, `driver_s` of the one that writes the store.

    `free_cores` is what others left of the machine's `cores`.
    """

    frames: int
    wall_s: float
    cpu_s: float
    driver_s: float
    cores: int
    free_cores: float

    @property
    def frames_per_s(self) -> float:
        return self.frames / self.wall_s


@dataclass(frozen=True)
class Memory:
    """The peak of all processes (proportional set size) while one video was encoded."""

    minutes: float
    frames: int
    peak_mb: float


@dataclass(frozen=True)
class Reads:
    """Random ranges of `wanted` frames (`frames` on average: some videos are shorter), a second of CPU time."""

    wanted: int
    frames: float
    reads_per_s: float
    frames_per_s: float


@dataclass(frozen=True)
class DataReport:
    """All of it. `bound` is free cores / (decode + encode) in frames a second."""

    settings: dict[str, str | int | float]
    stages: Stages
    pipeline: Pipeline
    memory: list[Memory]
    megabytes_an_hour: float
    reads: list[Reads]

    @classmethod
    def of(
        cls,
        config: Config,
        stages: Stages,
        pipeline: Pipeline,
        memory: list[Memory],
        megabytes_an_hour: float,
        reads: list[Reads],
    ) -> DataReport:
        model, store = config.model, config.section("store", StoreConfig)
        settings: dict[str, str | int | float] = {
            "date": time.strftime("%Y-%m-%d"),
            "vision": model.vision,
            "resolution_px": model.frames.resolution_px,
            "tokens_a_frame": model.frames.num_tokens,
            "batch_size": store.batch_size,
        }
        return cls(settings, stages, pipeline, memory, megabytes_an_hour, reads)

    @property
    def bound(self) -> float:
        return self.pipeline.free_cores / self.stages.both_s

    @property
    def of_bound(self) -> float:
        return self.pipeline.frames_per_s / self.bound

    @property
    def of_cpu(self) -> float:
        """The share of the pipeline's CPU time that is decoding and encoding."""
        return self.stages.both_s * self.pipeline.frames / self.pipeline.cpu_s

    @property
    def memory_growth(self) -> float:
        return self.memory[-1].peak_mb / self.memory[0].peak_mb

    @property
    def goals(self) -> list[Goal]:
        return [
            Goal("frames a second, of the bound", LEAST_OF_BOUND, self.of_bound),
            Goal("memory, longest video to shortest", MOST_MEMORY_GROWTH, self.memory_growth, at_most=True),
        ]

    def table(self) -> str:
        run = self.pipeline
        lines = [f"{name}: {value}" for name, value in self.settings.items()]
        lines += [
            "",
            f"decode alone        {1e3 * self.stages.decode_s:9.2f} ms of CPU a frame",
            f"encode alone        {1e3 * self.stages.encode_s:9.2f} ms of CPU a frame",
            f"pipeline            {1e3 * run.cpu_s / run.frames:9.2f} ms of CPU a frame, all processes",
            f"  of it the driver  {1e3 * run.driver_s / run.frames:9.2f} ms: it could write "
            f"{run.frames / run.driver_s:.0f} frames a second",
            f"cores               {run.cores:9d}, of which others left {run.free_cores:.2f}",
            f"bound               {self.bound:9.1f} frames a second on these",
            f"pipeline            {run.frames_per_s:9.1f} frames a second, {self.of_bound:.2f} of the bound",
            f"of its CPU time     {self.of_cpu:9.2f} is decoding and encoding",
            "",
            *(f"memory {m.minutes:6g} min {m.frames:7d} frames {m.peak_mb:9.0f} MB" for m in self.memory),
            "",
            f"store               {self.megabytes_an_hour:9.1f} MB an hour of video",
            *(
                f"reads of {r.wanted:5d} frames {r.reads_per_s:9.0f} a second, {r.frames_per_s:.0f} frames a second"
                for r in self.reads
            ),
            "",
            *(
                f"{'met' if g.met else 'MISSED':<7} {g.name:<36} wanted {g.wanted:g}, reached {g.reached:.3g}"
                for g in self.goals
            ),
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write `path`.json and `path`.png."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = asdict(self)
        document["pipeline"]["frames_per_s"] = self.pipeline.frames_per_s
        document |= {"bound_frames_per_s": self.bound, "of_bound": self.of_bound, "of_cpu": self.of_cpu}
        document["goals"] = [asdict(goal) | {"met": goal.met} for goal in self.goals]
        path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1) + "\n")
        self._plot(path.with_name(path.name + ".png"))

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.6), layout="constrained")
        costs, memory, reads = figure.subplots(1, 3)
        run = self.pipeline
        decode, encode = 1e3 * self.stages.decode_s, 1e3 * self.stages.encode_s
        driver = 1e3 * run.driver_s / run.frames
        rest = max(0.0, 1e3 * run.cpu_s / run.frames - decode - encode - driver)
        bottom = 0.0
        for name, cost in (("decode", decode), ("encode", encode), ("driver", driver), ("all else", rest)):
            costs.bar(["a frame"], [cost], bottom=bottom, label=f"{name} {cost:.2f}")
            bottom += cost
        costs.set_ylabel("ms of CPU")
        costs.set_xlim(-0.5, 1.5)
        costs.legend(fontsize=8, loc="upper right")
        costs.set_title(f"{run.frames_per_s:.0f} frames/s, {self.of_bound:.2f} of the bound", fontsize=9)
        memory.plot([m.minutes for m in self.memory], [m.peak_mb for m in self.memory], marker="o")
        memory.set_ylim(0, 1.25 * max(m.peak_mb for m in self.memory))
        memory.set_xlabel("minutes of video")
        memory.set_ylabel("peak MB, all processes")
        memory.set_title("memory against video length", fontsize=9)
        reads.bar(range(len(self.reads)), [r.frames_per_s for r in self.reads])
        reads.set_xticks(range(len(self.reads)), [str(r.wanted) for r in self.reads])
        reads.set_xlabel("frames in a range")
        reads.set_ylabel("frames a CPU second")
        reads.set_title(f"random reads; {self.megabytes_an_hour:.0f} MB an hour", fontsize=9)
        figure.suptitle(", ".join(f"{name} {value}" for name, value in self.settings.items()), fontsize=10)
        figure.savefig(path, dpi=90)
