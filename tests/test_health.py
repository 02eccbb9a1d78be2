"""Readiness, models, statistics and metrics, with real workers and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from application import application
from live_client import live
from prometheus_client.parser import text_string_to_metric_families

from actors.replicas import ReplicaReport
from serve.metrics import exposition

DOCUMENTED = Path(__file__).parents[1] / "docs" / "monitoring.md"


@pytest.fixture(scope="module")
def url(tiny: dict[str, object], redis_url: str) -> Iterator[str]:
    with application(tiny, redis_url) as address:
        yield address


def samples(text: str) -> dict[str, float]:
    """Sums over replicas, by name and the labels that are not theirs."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "replica"}
            key = sample.name + "".join(f" {name}={value}" for name, value in sorted(labels.items()))
            found[key] = found.get(key, 0) + sample.value
    return found


def ready(url: str) -> httpx.Response:
    """The answer once it is 200, or the last after half a minute."""
    deadline = time.monotonic() + 30
    while (answer := httpx.get(f"{url}/ready")).status_code != 200 and time.monotonic() < deadline:
        pass
    return answer


def test_a_gateway_with_all_its_workers_is_healthy_and_ready(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert ready(url).json() == {"status": "ready"}


def test_without_workers_it_is_healthy_and_says_what_is_missing(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, workers=False) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        answer = httpx.get(f"{url}/ready")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("not_ready", "server_error")
    assert "no encoder replica" in error["message"]
    assert "no LLM replica" in error["message"]


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_live_video_that_nobody_decides_lags_and_recorded_video_does_not(
    policy: str, tiny: dict[str, object], redis_url: str
) -> None:
    with application(tiny, redis_url, workers=False) as url, live(url) as client:
        client.configure(video={"drop_policy": policy})
        client.frame(0.0)
        now: dict[str, float] = {}
        deadline = time.monotonic() + 30
        while now.get("videollm_frames_behind_live_max role=gateway") != 1 and time.monotonic() < deadline:
            now = samples(httpx.get(f"{url}/metrics").text)
    assert now["videollm_frames_behind_live_max role=gateway"] == 1
    assert (now["videollm_lag_seconds_max role=gateway"] > 0) == (policy == "latest")


def test_the_model_goes_by_a_short_name_and_its_fingerprint(url: str) -> None:
    listed = httpx.get(f"{url}/v1/models").json()
    assert listed["object"] == "list"
    short, exact = listed["data"]
    assert short["id"] == "videollm-online"
    assert short["root"] == exact["root"] == exact["id"]
    assert httpx.get(f"{url}/v1/models/{exact['id']}").json() == exact
    missing = httpx.get(f"{url}/v1/models/gpt-4o")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_metrics_of_all_replicas_follow_a_session(url: str) -> None:
    assert ready(url).status_code == 200
    before = samples(httpx.get(f"{url}/metrics").text)
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.ask("What is there?", video_time=0.0)
        for index in range(6):
            client.frame(index / 2)
        client.end()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # workers report once a second
        now = samples(httpx.get(f"{url}/metrics").text)
        gained = {key: value - before.get(key, 0) for key, value in now.items()}
        if gained["videollm_frames_decided_total role=llm"] >= 6:
            break
    assert gained["videollm_frames_received_total role=gateway"] == 6
    assert gained["videollm_frames_admitted_total role=gateway"] == 6
    assert gained["videollm_frames_encoded_total role=encoder"] == 6
    for role, stage in [
        ("gateway", "admission"),
        ("encoder", "encode_queue"),
        ("encoder", "encode"),
        ("llm", "decide"),
        ("gateway", "total_recorded"),  # with `block` frames wait on purpose
    ]:
        assert gained[f"videollm_decision_latency_seconds_count role={role} stage={stage}"] == 6
    assert gained["videollm_responses_total role=llm"] >= 1
    assert now["videollm_first_token_seconds_count role=llm"] >= 1
    assert now["videollm_kv_positions role=llm"] > 0
    assert [now[f"videollm_replicas role={role}"] for role in ("gateway", "encoder", "llm")] == [1, 1, 1]


def test_every_metric_is_documented_and_every_documented_one_is_there(url: str) -> None:
    assert ready(url).status_code == 200
    httpx.get(f"{url}/v1/models/none")
    families = {family.name for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    rows = [line.split("|")[1] for line in DOCUMENTED.read_text().splitlines() if line.startswith("| `")]
    documented = {name.strip(" `").removesuffix("_total") for row in rows for name in row.split(",")} - {"..."}
    shown = {family.removeprefix("videollm_") for family in families}
    process = {name for name in shown if name.startswith("process_")}
    assert shown - process == documented - {name for name in documented if name.startswith("process_")}
    assert {name for name in documented if name.startswith("process_")} <= process


def test_statistics_name_every_replica_by_role(url: str) -> None:
    assert ready(url).status_code == 200
    stats = httpx.get(f"{url}/v1/stats", params={"timeline": "true"}).json()
    assert [len(stats[role]) for role in ("gateways", "encoders", "llms")] == [1, 1, 1]
    frames = stats["gateways"][0]["frames"]
    assert frames["decided"] <= frames["admitted"] <= frames["received"]
    assert "streams" not in stats["gateways"][0]  # they are their clients' business
    assert {told["role"] for told in stats["steps"]} <= {"encoder", "llm"}


def test_errors_are_counted_by_code(url: str) -> None:
    httpx.get(f"{url}/v1/models/none")
    found = samples(httpx.get(f"{url}/metrics").text)
    assert found["videollm_errors_total code=model_not_found role=gateway"] >= 1
    assert found["videollm_http_requests_total role=gateway route=/v1/models/{name:path} status=404"] >= 1


def test_replicas_of_one_role_stay_apart() -> None:
    text = "# HELP videollm_things_total Things\n# TYPE videollm_things_total counter\nvideollm_things_total 1.0\n"
    reports = [
        ReplicaReport(role="llm", name=name, pid=1, at=time.time(), model="m", stats={}, metrics=text)
        for name in ("a", "b")
    ]
    shown = exposition(reports).decode()
    assert shown.count("# TYPE videollm_things_total counter") == 1
    assert 'videollm_things_total{replica="a",role="llm"} 1.0' in shown
    assert 'videollm_things_total{replica="b",role="llm"} 1.0' in shown
    assert samples(shown)["videollm_replicas role=llm"] == 2
