"""What encoder and LLM replicas measure of themselves, as Prometheus metrics of one process.

Every metric of theirs is declared here once; serve/metrics.py has the gateways' and puts those of all
replicas together. Waiting times come from Redis: the id of an entry says when it was written, so they
are as right as the clocks of the machines agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from actors.messages import FramesDecided, LogEntry, QueryConsumed, ResponseEnded, ResponseStarted, ResponseTokens

NAMESPACE = "videollm"
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40)
BATCH = (1, 2, 4, 8, 16, 32, 64)

Figures = Callable[[], Iterable[Metric]]

disable_created_metrics()


def counter(name: str, about: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    """One counter's value as it stands."""
    return counters(name, about, [(labels or {}, value)])


def counters(name: str, about: str, values: Sequence[tuple[Mapping[str, str], float]]) -> Metric:
    """A counter with several combinations of labels."""
    family = CounterMetricFamily(f"{NAMESPACE}_{name}", about, labels=list(values[0][0]) if values else None)
    for labels, value in values:
        family.add_metric(list(labels.values()), value)
    return family


def gauge(name: str, about: str, value: float, **labels: str) -> Metric:
    """One gauge's value as it stands."""
    family = GaugeMetricFamily(f"{NAMESPACE}_{name}", about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


class Figured(Collector):
    """Numbers that live elsewhere, read when somebody asks."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        return self._figures()


class Meters:
    """The registry of one replica: `figures` are read at every report, histograms are added by subclasses."""

    def __init__(self, figures: Figures) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace=NAMESPACE, registry=self.registry)
        self.registry.register(Figured(figures))
        self._latency = self.histogram(
            "decision_latency_seconds", "From a frame's arrival to its decision, by stage", LATENCY_S, ["stage"]
        )

    def histogram(self, name: str, about: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, about, labelnames=labels, namespace=NAMESPACE, buckets=buckets, registry=self.registry)

    def counter(self, name: str, about: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, about, labelnames=labels, namespace=NAMESPACE, registry=self.registry)

    def stage(self, name: str, seconds: float) -> None:
        """One frame has spent so long in a stage of its way."""
        self._latency.labels(name).observe(max(0.0, seconds))


class EncoderMeters(Meters):
    """Stages `encode_queue` and `encode`, and the size of batches."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(figures)
        self._batch = self.histogram("encoder_batch_frames", "Frames encoded at once", BATCH)

    def encoded(self, entry_ids: Sequence[str], start: float, end: float) -> None:
        """A batch of frames, by the entries they were admitted with, took from `start` to `end` in Unix time."""
        self._batch.observe(len(entry_ids))
        for entry_id in entry_ids:
            self.stage("encode_queue", start - written_at(entry_id))
            self.stage("encode", end - start)


class LLMMeters(Meters):
    """Stage `decide`, the time to the first token, and what a step serves."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(figures)
        self._first_token = self.histogram(
            "first_token_seconds",
            "From the question or frame that caused a response, as it reached the LLM's input, to its first token",
            LATENCY_S,
        )
        self._step_sessions = self.histogram("step_sessions", "Sessions that one step of the LLM served", BATCH)
        self._step = self.histogram("step_seconds", "Duration of one step of the LLM", LATENCY_S)
        self._causes: dict[str, float] = {}

    def stepped(self, sessions: int, seconds: float) -> None:
        self._step_sessions.observe(sessions)
        self._step.observe(seconds)

    def appended(
        self, session_id: str, entries: Sequence[LogEntry], frame_ids: Mapping[int, str], query_ids: Mapping[str, str]
    ) -> None:
        """Entries were written to a session's log; the mappings say which input entry a frame and a query were."""
        now = time.time()
        for entry in entries:
            match entry:
                case FramesDecided():
                    for seq in range(entry.first_seq, entry.last_seq + 1):
                        if entry_id := frame_ids.get(seq):
                            self.stage("decide", now - written_at(entry_id))
                case QueryConsumed() | ResponseStarted():
                    causes = [frame_ids.get(entry.seq), query_ids.get(entry.query_id or "")]
                    times = [written_at(entry_id) for entry_id in causes if entry_id]
                    self._causes.setdefault(session_id, max(times, default=now))
                case ResponseTokens() if session_id in self._causes:
                    self._first_token.observe(max(0.0, now - self._causes.pop(session_id)))
                case ResponseEnded():
                    self.forget(session_id)

    def forget(self, session_id: str) -> None:
        self._causes.pop(session_id, None)


def written_at(entry_id: str) -> float:
    """Unix time in seconds at which Redis wrote the entry of a stream that numbers by its clock."""
    return int(entry_id.partition("-")[0]) / 1000
