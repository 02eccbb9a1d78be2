"""Dashboard and alerts ask only for metrics and labels that the code has."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import pytest
import yaml

from actors.meters import EncoderMeters, LLMMeters
from serve.metrics import GatewayMeters

REPOSITORY = Path(__file__).parents[1]
MONITORING = REPOSITORY / "configs" / "monitoring"
ENDINGS = {"counter": ["_total"], "counters": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
EVERYWHERE = {"role", "replica", "le", "job"}


@functools.cache
def declared() -> set[str]:
    """Names of all time series, as the calls that make them say; those of the process come from a library."""
    names = {"videollm_process_resident_memory_bytes", "videollm_process_cpu_seconds_total"}
    for path in [*(REPOSITORY / "actors").glob("*.py"), *(REPOSITORY / "serve").glob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
                called = getattr(call.func, "attr", getattr(call.func, "id", ""))
                names |= {f"videollm_{call.args[0].value}{ending}" for ending in ENDINGS.get(called, [])}
    return names


@functools.cache
def documented_labels() -> dict[str, set[str]]:
    """Labels by metric, from the table of docs/monitoring.md."""
    found: dict[str, set[str]] = {}
    for line in (REPOSITORY / "docs" / "monitoring.md").read_text().splitlines():
        cells = line.split("|")
        if len(cells) > 4:
            for name in re.findall(r"`(\w+)`", cells[1]):
                found[f"videollm_{name}"] = set(re.findall(r"`(\w+)`", cells[4]))
    return found


def expressions() -> list[str]:
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    rules = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    return rules + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def metrics_of(expression: str) -> list[tuple[str, set[str]]]:
    """Metrics of an expression, each with the labels that it is asked for."""
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    found = []
    for name, selector in re.findall(r"\b(videollm_\w+|up)(?:\{([^}]*)\})?", expression):
        found.append((name, grouped | set(re.findall(r"(\w+)\s*=", selector or ""))))
    return found


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_and_label_exists(expression: str) -> None:
    asked = metrics_of(expression)
    assert asked
    for name, labels in asked:
        if name == "up":
            continue
        assert name in declared()
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert labels - EVERYWHERE <= documented_labels().get(base, set()), (name, labels)


def test_every_label_has_a_value_that_the_code_gives() -> None:
    source = "".join(path.read_text() for name in ("actors", "serve") for path in (REPOSITORY / name).glob("*.py"))
    asked = {(label, value) for text in expressions() for label, value in re.findall(r'(\w+)="([^"]*)"', text)}
    assert {("role", "llm"), ("cause", "window"), ("stage", "total")} <= asked
    for label, value in asked - {("job", "videollm")}:
        assert f'"{value}"' in source, (label, value)


def test_labels_are_those_of_a_running_replica() -> None:
    gateway = GatewayMeters(list)
    gateway.frame("dropped", "replaced")
    gateway.error("bad_time")
    gateway.request("/ready", 200)
    gateway.stage("total", 1.0)
    for family in (
        family for one in (gateway, EncoderMeters(list), LLMMeters(list)) for family in one.registry.collect()
    ):
        for sample in family.samples:
            base = re.sub(r"_(bucket|sum|count)$", "", sample.name)
            if not base.startswith("videollm_process_"):
                assert set(sample.labels) - EVERYWHERE == documented_labels()[base], sample.name


def test_a_metric_or_label_that_does_not_exist_is_noticed() -> None:
    assert "videollm_frames_lost_total" not in declared()
    assert {"videollm_frames_dropped_total", "videollm_step_seconds_bucket", "videollm_sessions"} <= declared()
    assert metrics_of('sum by (a) (rate(videollm_x_total{b="c"}[5m]))') == [("videollm_x_total", {"a", "b"})]
    assert documented_labels()["videollm_frames_dropped_total"] == {"reason"}


def test_the_alerts_cover_what_goes_wrong_and_say_so() -> None:
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    rules = {rule["alert"]: rule for group in alerts["groups"] for rule in group["rules"]}
    assert {"VideollmLag", "VideollmNoCapacity", "VideollmRebuildStorm", "VideollmDrops"} <= rules.keys()
    for rule in rules.values():
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("page", "ticket")
    scrape = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert scrape["rule_files"] == ["alerts.yaml"]


def test_error_codes_of_the_alerts_are_told_to_clients() -> None:
    [codes] = [re.findall(r'code=~"([^"]*)"', text)[0] for text in expressions() if "code=~" in text]
    source = "".join(path.read_text() for path in (REPOSITORY / "serve").glob("*.py"))
    for code in codes.split("|"):
        assert f'"{code}"' in source


def test_panels_lie_side_by_side() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"]) == len({panel["id"] for panel in dashboard["panels"]})
    assert all(panel["datasource"]["uid"] == "${source}" for panel in dashboard["panels"])
