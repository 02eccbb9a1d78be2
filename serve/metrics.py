"""What a gateway measures of itself, and the metrics of all replicas as one page for Prometheus.

Every replica's report brings its own metrics (actors/meters.py declares those of encoders and LLMs);
any gateway shows those of all, told apart by `role` and `replica`. docs/monitoring.md lists them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from actors.meters import Figured, Figures, Meters, gauge
from actors.replicas import ReplicaReport

ROLES = ("gateway", "encoder", "llm")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class GatewayMeters(Meters):
    """Stages `admission` and `total`, frames by what became of them, errors by code."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(figures)
        self._received = self.counter("frames_received", "Frames that clients sent")
        self._admitted = self.counter("frames_admitted", "Frames that got a number and went to the encoders")
        self._dropped = self.counter("frames_dropped", "Frames that were dropped before they got a number", ["reason"])
        self._errors = self.counter("errors", "Errors told to clients", ["code"])
        for code in ("sessions_full", "no_capacity"):
            self._errors.labels(code)  # from 0 on: an alert on the rate does not see a series that begins at 1
        self._reconnects = self.counter("ingest_reconnects", "Connections of server-side streams that were made again")
        self._requests = self.counter("http_requests", "HTTP requests answered", ["route", "status"])

    def frame(self, outcome: str, reason: str = "") -> None:
        """One more frame was `received`, `admitted` or `dropped`; what else becomes of it is counted elsewhere."""
        if outcome == "received":
            self._received.inc()
        elif outcome == "admitted":
            self._admitted.inc()
        elif outcome == "dropped":
            self._dropped.labels(reason).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def reconnect(self) -> None:
        self._reconnects.inc()

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()


def exposition(reports: Iterable[ReplicaReport]) -> bytes:
    """The metrics of all replicas in Prometheus' text format, and how many replicas of each role there are."""
    families: dict[str, Metric] = {}
    alive = dict.fromkeys(ROLES, 0)
    ages: list[Metric] = []
    for report in reports:
        alive[report.role] += 1
        labels = {"role": report.role, "replica": report.name}
        age_s = max(0.0, time.time() - report.at)
        ages.append(gauge("report_age_seconds", "Age of a replica's report", age_s, **labels))
        for family in text_string_to_metric_families(report.metrics):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**labels, **sample.labels}, sample.value)
    for role, count in alive.items():
        _merge(families, gauge("replicas", "Replicas that report", count, role=role))
    for age in ages:
        _merge(families, age)
    registry = CollectorRegistry()
    registry.register(Figured(families.values))
    return generate_latest(registry)


def _merge(families: dict[str, Metric], found: Metric) -> None:
    families.setdefault(found.name, Metric(found.name, found.documentation, found.type)).samples.extend(found.samples)
