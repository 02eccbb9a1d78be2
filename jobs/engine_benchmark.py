"""The batched engine against `reference`: same weights, input, dtype, threads, window and decisions.

Both take turns, frame by frame or slice by slice, so that whatever else the machine does slows both. On a
CPU with one thread the clock is the process's CPU time, which other programs disturb least; otherwise it is
the wall clock. Lag is that of a simulated stream: frames arrive on a clock that only measured steps advance.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median

import torch

from actors.context import Context
from actors.engine import EngineConfig, StepResult
from actors.kv import KVMemory
from actors.messages import Evicted, LogEntry, Query, ResponseTokens
from jobs.benchmark_models import Subject
from jobs.benchmark_report import Comparison, Report
from jobs.machine import cpu_name
from jobs.scripted import (
    SETTINGS,
    Folded,
    PlacedBatched,
    PlacedEngine,
    PlacedReference,
    add_frame,
    count,
    place,
    scripted,
)
from jobs.simulated_stream import SimulatedStream

logger = logging.getLogger(__name__)

Engines = dict[str, PlacedEngine]


@dataclass(frozen=True)
class Amount:
    """How much is measured. Windows are in positions; `None` is the model's limit."""

    lengths: tuple[int, ...] = (300, 1500, 3000)
    window: int | None = None
    samples: int = 4
    repeats: int = 2
    recorded_frames: int = 200
    later_from: int = 300
    later_frames: int = 100
    speaking: tuple[float, ...] = (0.1, 0.01, 0.0)
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    sessions_at: int = 90
    sessions_window: int = 2048
    rounds: int = 3
    cycle_window: int = 1024
    late_cycle: int = 20
    memory_frames: int = 400
    lag_sessions: int = 4
    lag_frames: int = 40
    crowd: int = 0
    crowd_window: int = 8192
    crowd_frames: int = 20


ON_GPU = Amount(crowd=45)
QUICK = Amount(
    lengths=(20, 120),
    window=700,
    samples=2,
    repeats=1,
    recorded_frames=20,
    later_from=10,
    later_frames=10,
    speaking=(0.1, 0.0),
    sessions=(1, 2),
    sessions_at=10,
    sessions_window=700,
    rounds=1,
    cycle_window=700,
    late_cycle=3,
    memory_frames=100,
    lag_sessions=2,
    lag_frames=8,
    crowd=2,
    crowd_window=700,
    crowd_frames=8,
)


@dataclass
class EngineBenchmark:
    """Measures everything once into `report`."""

    subject: Subject
    config: EngineConfig
    amount: Amount
    report: Report = field(init=False)
    weights: int = field(init=False)  # bytes

    def __post_init__(self) -> None:
        self.on_gpu = self.config.device.startswith("cuda")
        self.cpu_clock = not self.on_gpu and self.config.threads == 1
        self.frame = self.subject.frame()
        llm = self.subject.model.base_llm
        weights = self.weights = sum(p.numel() * p.element_size() for p in set(llm.parameters()))
        self.report = Report(
            {
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "cpu": cpu_name(),
                "gpu": torch.cuda.get_device_name() if self.on_gpu else "none",
                "torch": torch.__version__,
                "model": self.subject.name,
                "dtype": str(llm.dtype).removeprefix("torch."),
                "threads": self.config.threads,
                "clock": "CPU time" if self.cpu_clock else "wall",
                "token_budget": self.config.token_budget,
                "window": self.amount.window or llm.config.max_position_embeddings,
                "weights_mb": round(weights / 1e6),
                "frame_positions": self._frame_positions(),
            }
        )
        bandwidth, arithmetic = self._bandwidth(), self._arithmetic()
        self.report.numbers["memory_bandwidth_gb_s"] = bandwidth / 1e9
        self.report.numbers["floor_of_a_step_ms"] = weights / bandwidth * 1e3
        self.report.numbers["products_gflop_s"] = arithmetic / 1e9
        self.report.numbers["floor_of_a_recorded_frame_ms"] = self._products_of_a_frame() / arithmetic * 1e3

    @torch.inference_mode()
    def run(self) -> Report:
        parts: Sequence[Callable[[], None]] = (
            self.memory,  # first, while no other part has left memory that growth could hide in
            self.live,
            self.recorded,
            self.many_sessions,
            self.whole_cycles,
            self.lag,
            self.crowd,
        )
        for part in parts:
            began = time.monotonic()
            part()
            logger.info("part=%s seconds=%.0f", part.__name__, time.monotonic() - began)
        return self.report

    # -- what is measured ------------------------------------------------------------------------

    def live(self) -> None:
        """One session, one frame at a time, at several lengths of the stream.

        Past the first eviction a length means the whole eviction cycle that ends there: the mean of three
        points of it, and the rebuild's cost spread over its frames.
        """
        engines = self._engines(self.amount.window, 1)
        rebuild: dict[str, float] = {}
        for length in self.amount.lengths:
            points, cycle = self._cycle_before(engines["batched"], length)
            if cycle and not rebuild:
                rebuild = self._rebuild(engines, length)
            spread = {name: cost / cycle for name, cost in rebuild.items()} if cycle else dict.fromkeys(engines, 0.0)
            costs: dict[str, list[float]] = {name: [] for name in engines}
            for point in points:
                log = self._folded(engines["batched"]).run(point)
                sessions = {name: place(engine, "s", log, self.frame) for name, engine in engines.items()}
                for _ in range(1 + self.amount.samples * self.amount.repeats):
                    for name, engine in engines.items():
                        add_frame(sessions[name], self.frame)
                        costs[name].append(self._drain(engine))
                for name in engines:
                    costs[name].remove(max(costs[name]))  # the first after placing warms up, and is the slowest
            self._compare("live", length, {name: fmean(costs[name]) + spread[name] for name in engines})
            self._first_token(engines, length)

    def recorded(self) -> None:
        """A short video, and the middle of a longer one, all there at once; frames at random places speak."""
        for share in self.amount.speaking:
            self._play("recorded", share, 0, self.amount.recorded_frames)
        for share in self.amount.speaking:
            self._play("recorded_later", share, self.amount.later_from, self.amount.later_frames)

    def _play(self, kind: str, share: float, start: int, total: int) -> None:
        """Frames `start` to `start + total` of a video, a share of which speaks: the median of several times."""
        costs: dict[str, list[float]] = {}
        for _ in range(self.amount.repeats):
            for name, cost in self._played(kind, share, start, total).items():
                costs.setdefault(name, []).append(cost)
        self._compare(kind, share, {name: median(found) for name, found in costs.items()})

    def _played(self, kind: str, share: float, start: int, total: int) -> dict[str, float]:
        """Milliseconds a frame."""
        speaks = random.Random(7).sample(range(start, start + total), round(total * share))
        engines = self._engines(self.amount.window, 1, speaks)
        log = self._folded(engines["batched"]).run(start)
        logs: dict[str, list[LogEntry]] = {name: [] for name in engines}
        spent = dict.fromkeys(engines, 0.0)
        for engine in engines.values():
            session = place(engine, "s", log, self.frame)
            for _ in range(total):
                add_frame(session, self.frame)
        for reached in range(start + 10, start + total + 1, 10):
            for name, engine in engines.items():
                session = engine.sessions["s"]
                while session.next_seq < reached or session.response:
                    spent[name] += self._step(engine, logs[name])
        self.report.decided[f"{kind} at {share:g}"] = {name: count(log) for name, log in logs.items()}
        return {name: cost / total for name, cost in spent.items()}

    def many_sessions(self) -> None:
        """Every session has one frame waiting. Sessions of `reference` take turns: it needs no more than four."""
        most = max(self.amount.sessions)
        engines = self._engines(self.amount.sessions_window, most)
        log = self._folded(engines["batched"]).run(self.amount.sessions_at)
        for sessions in self.amount.sessions:
            present = {"reference": min(sessions, 4), "batched": sessions}
            for name, engine in engines.items():
                for index in range(len(engine.sessions), present[name]):
                    place(engine, f"s{index}", log, self.frame)
            costs: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(self.amount.rounds + 1):
                for name, engine in engines.items():
                    for session in engine.sessions.values():
                        add_frame(session, self.frame)
                    costs[name].append(self._drain(engine) / present[name])
            self._compare("sessions", sessions, {name: median(costs[name][1:]) for name in engines})
            self.report.numbers[f"frames_per_second_of_{sessions}_sessions"] = 1e3 / median(costs["batched"][1:])

    def whole_cycles(self) -> None:
        """The batched engine's cost of a frame over one whole eviction cycle, early and late in a stream."""
        engine = self._engines(self.amount.cycle_window, 2)["batched"]
        folded = self._folded(engine)
        while len(folded.evicted_at) <= self.amount.late_cycle:
            folded.run(folded.next_seq + 10)
        starts = {"early": folded.evicted_at[1], "late": folded.evicted_at[self.amount.late_cycle]}
        cycle = folded.evicted_at[2] - folded.evicted_at[1]
        sessions = {
            name: place(engine, name, self._folded(engine).run(start), self.frame) for name, start in starts.items()
        }
        spent = dict.fromkeys(starts, 0.0)
        for _ in range(cycle):
            for name, session in sessions.items():
                add_frame(session, self.frame)
                spent[name] += self._drain(engine)
        for name, start in starts.items():
            self.report.numbers[f"{name}_cycle_ends_at_frame"] = start + cycle
            self.report.numbers[f"{name}_cycle_ms"] = spent[name] / cycle
        self.report.numbers["late_to_early"] = spent["late"] / spent["early"]

    def memory(self) -> None:
        """Resident memory of the process, on a GPU what is allocated beside the weights, along many evictions."""
        engine = self._engines(self.amount.cycle_window, 1)["batched"]
        session = engine.open("s", SETTINGS)
        kv_mb = self._kv_bytes(engine) / 1e6
        full_at = None
        for frames in range(20, self.amount.memory_frames + 1, 20):
            log: list[LogEntry] = []
            for _ in range(20):
                add_frame(session, self.frame.clone())
            while session.waiting_frames:
                self._step(engine, log)
            if full_at is None and any(isinstance(entry, Evicted) for entry in log):
                full_at = len(self.report.memory) + 1
            self.report.memory.append((frames, self._resident_mb(), kv_mb))
        settled = [resident for _, resident, _ in self.report.memory[full_at or 0 :]]
        self.report.numbers["memory_growth"] = max(settled) / settled[0]

    def lag(self) -> None:
        """Live sessions that speak now and then: how late frames are decided, and how long steps take."""
        dice = random.Random(11)
        total, sessions = self.amount.lag_frames, self.amount.lag_sessions
        speaks = dice.sample(range(2, total), round(total * 0.1) or 1)
        for name, engine in self._engines(self.amount.sessions_window, sessions, speaks).items():
            stream = SimulatedStream(engine, sessions, total, self.frame)
            stream.run(self._timed)
            self.report.numbers[f"{name}_step_p50_ms"] = _percentile(stream.steps, 50)
            self.report.numbers[f"{name}_step_p99_ms"] = _percentile(stream.steps, 99)
            for kind, lags in (("others", stream.others), ("behind_own_response", stream.behind)):
                if lags:
                    self.report.numbers[f"{name}_lag_{kind}_p50_ms"] = _percentile(lags, 50)
                    self.report.numbers[f"{name}_lag_{kind}_p99_ms"] = _percentile(lags, 99)
            self.report.decided.setdefault("lag", {})[name] = count(stream.log)

    def crowd(self) -> None:
        """As many live sessions as are wanted and `engine.kv_memory_gb` holds, all over their eviction cycles."""
        if not self.amount.crowd:
            return
        window, budget = self.amount.crowd_window, self.config.kv_memory_gb
        every_tenth = range(3, 1_000_000, 10)
        engine = self._engines(window, self.amount.crowd, every_tenth, budget if self.on_gpu else None)["batched"]
        sessions = min(self.amount.crowd, engine.room)
        folded = self._folded(engine)
        while len(folded.evicted_at) < 2:
            folded.run(folded.next_seq + 1)
        start, stop = folded.evicted_at
        lived = [self._folded(engine).run(start + (stop - start) * i // sessions) for i in range(sessions)]
        stream = SimulatedStream(engine, sessions, self.amount.crowd_frames, self.frame, lived)
        stream.run(self._timed)
        self.report.numbers["crowd_sessions"] = sessions
        self.report.numbers["crowd_kv_memory_gb"] = self._kv_bytes(engine) / 1e9
        self.report.numbers["crowd_step_p99_ms"] = _percentile(stream.steps, 99)
        self.report.numbers["crowd_lag_p50_ms"] = _percentile(stream.others, 50)
        self.report.numbers["crowd_lag_p99_ms"] = _percentile(stream.others, 99)

    def _first_token(self, engines: Engines, length: int) -> None:
        """A question to the session that `live` has left there, until its first token is logged."""
        costs = {}
        for name, engine in engines.items():
            session = engine.sessions["s"]
            session.add(Query(query_id="q", text="What is happening now?", after_seq=session.next_seq - 1))
            log: list[LogEntry] = []
            costs[name] = 0.0
            while not any(isinstance(entry, ResponseTokens) for entry in log):
                costs[name] += self._step(engine, log)
            self._drain(engine)
        self._compare("first_token", length, costs)

    def _rebuild(self, engines: Engines, before: int) -> dict[str, float]:
        """Milliseconds of one rebuild: of a frame that causes one, less what an ordinary frame costs."""
        folded = self._folded(engines["batched"])
        folded.run(before)
        log = self._folded(engines["batched"]).run(folded.evicted_at[-1])
        costs = {}
        kept = 0
        for name, engine in engines.items():
            session = place(engine, "s", log, self.frame)
            add_frame(session, self.frame)
            whole = self._drain(engine)
            kept = session.fed
            add_frame(session, self.frame)
            costs[name] = whole - self._drain(engine)
        self._compare("rebuild", kept, costs)
        return costs

    # -- how it is measured -----------------------------------------------------------------------

    def _engines(
        self, window: int | None, sessions: int, speaks: Sequence[int] = (), kv_memory_gb: float | None = None
    ) -> Engines:
        """One engine of each kind, with `kv_memory_gb`, or memory for so many sessions of `window` positions."""
        llm = self.subject.model.base_llm
        positions = min(window or llm.config.max_position_embeddings, llm.config.max_position_embeddings)
        each = KVMemory.bytes_per_position(llm.config, llm.dtype) * (positions + 256)
        memory = kv_memory_gb or sessions * each / 1e9
        update = {
            "max_positions": positions,
            "max_sessions": sessions,
            "kv_memory_gb": memory,
            "kv_memory_share": None,
        }
        config = self.config.model_copy(update=update)
        engines: Engines = {
            "reference": PlacedReference(self.subject.baseline, self.subject.template, config),
            "batched": PlacedBatched(self.subject.model, self.subject.template, config),
        }
        for engine in engines.values():
            engine.session_type = scripted(speaks)
        return engines

    def _kv_bytes(self, engine: PlacedEngine) -> int:
        assert isinstance(engine, PlacedBatched)
        llm = self.subject.model.base_llm
        return engine.memory.positions * KVMemory.bytes_per_position(llm.config, llm.dtype)

    def _step(self, engine: PlacedEngine, log: list[LogEntry]) -> float:
        """Milliseconds of one step; what it logged goes to `log`."""
        spent, result = self._timed(engine)
        for _, entries in result:
            log += entries
        return spent

    def _timed(self, engine: PlacedEngine) -> tuple[float, StepResult]:
        began = self._clock()
        result = engine.step()
        return (self._clock() - began) * 1e3, result

    def _drain(self, engine: PlacedEngine) -> float:
        """Milliseconds until the engine has nothing to do."""
        log: list[LogEntry] = []
        spent = self._step(engine, log)
        while not engine.idle:
            spent += self._step(engine, log)
        return spent

    def _clock(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_clock else time.perf_counter()

    def _compare(self, kind: str, at: float, costs: dict[str, float]) -> None:
        found = Comparison(kind, at, costs["reference"], costs["batched"])
        logger.info("%s at=%g reference_ms=%.1f batched_ms=%.1f ratio=%.2f", kind, at, *costs.values(), found.ratio)
        self.report.comparisons.append(found)

    def _folded(self, engine: PlacedEngine) -> Folded:
        return Folded(self.subject.template, self.subject.model.config.system_prompt, engine.limits, self.frame)

    def _cycle_before(self, engine: PlacedEngine, length: int) -> tuple[list[int], int]:
        """Frames that stand for the eviction cycle which ends at `length`, and its frames; 0 before the first."""
        folded = self._folded(engine)
        folded.run(length)
        if len(folded.evicted_at) < 2:
            return [length - 1], 0
        cycle = folded.evicted_at[-1] - folded.evicted_at[-2]
        return [length - round(cycle * part / 6) for part in (5, 3, 1)], cycle

    def _bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes, the best of five."""
        source = torch.ones(64 << 20, device=self.config.device)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(5):
            began = self._clock()
            target.copy_(source)
            best = min(best, self._clock() - began)
        return 2 * source.numel() * source.element_size() / best

    def _arithmetic(self) -> float:
        """Floating-point operations a second of a product as a step with many frames has them, the best of five."""
        llm = self.subject.model.base_llm
        width = llm.config.hidden_size
        rows, weight = (torch.ones(n, width, device=self.config.device, dtype=llm.dtype) for n in (192, 4 * width))
        best = float("inf")
        for _ in range(5):
            began = self._clock()
            for _ in range(10):
                rows @ weight.t()
            best = min(best, self._clock() - began)
        return 20 * len(rows) * weight.numel() / best

    def _products_of_a_frame(self) -> float:
        """Operations that one frame costs in products with the weights, attention not counted."""
        llm = self.subject.model.base_llm
        layers = sum(p.numel() for p in llm.get_decoder().layers.parameters())
        return 2.0 * (self._frame_positions() * layers + llm.get_output_embeddings().weight.numel())

    def _frame_positions(self) -> int:
        context = Context(self.subject.template, self.subject.model.config.system_prompt)
        return len(context.frame_ids(2)[1])

    def _resident_mb(self) -> float:
        if self.on_gpu:
            return (torch.cuda.memory_allocated() - self.weights) / 1e6
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]
