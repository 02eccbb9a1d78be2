"""Rates, on a clock that the test moves; what a client hears that is over a limit."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import httpx
import pytest
from application import application, running
from live_client import live, picture
from pydantic import ValidationError

from serve import recorded
from serve.conversation import Conversation
from serve.limits import LimitsConfig, TokenBucket
from serve.server_events import ErrorEvent, ServerEvent, SessionCreated, SessionUpdated, failure


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    now = 0.0
    bucket = TokenBucket(per_s=2, burst=3, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    assert bucket.wait_s == 0.5
    now = 0.5
    assert [bucket.take(), bucket.take()] == [True, False]
    now = 100.0
    assert sum(bucket.take() for _ in range(10)) == 3


def test_a_bucket_that_begins_nearly_empty_earns_its_burst() -> None:
    now = 0.0
    bucket = TokenBucket(per_s=2, burst=3, clock=lambda: now, first=1)
    assert [bucket.take(), bucket.take()] == [True, False]
    now = 1.5
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_a_message_limit_above_what_serve_lets_through_is_refused() -> None:
    with pytest.raises(ValidationError):
        LimitsConfig(message_bytes=17 << 20)


class QuietVideo:
    """A conversation in which frames are decided one after another, nothing is said, and then nothing happens."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.counts = SimpleNamespace(decided=0, skipped=0)

    async def feed(self) -> None:
        for _ in range(self.frames):
            await asyncio.sleep(0.02)
            self.counts.decided += 1
        await asyncio.Event().wait()

    async def events(self) -> AsyncGenerator[ServerEvent]:
        await asyncio.Event().wait()
        yield failure("never", "comes")


@pytest.mark.anyio
async def test_recorded_video_is_not_idle_while_its_frames_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(recorded, "owned", nothing)
    monkeypatch.setattr(recorded, "_supply", nothing)
    gateway = SimpleNamespace(limits=SimpleNamespace(idle_s=0.2), config=SimpleNamespace(max_llms=None))
    conversation = QuietVideo(40)
    [event] = [event async for event in recorded._watch(None, conversation, gateway)]  # type: ignore[arg-type]
    assert (event.type, event.error.code) == ("error", "idle_timeout")
    assert conversation.counts.decided == 40


@pytest.mark.parametrize(("limit", "code"), [("idle_s", "idle_timeout"), ("total_s", "session_too_long")])
def test_a_session_that_is_idle_or_too_old_is_closed_as_a_matter_of_policy(
    tiny: dict[str, object], redis_url: str, limit: str, code: str
) -> None:
    with application(tiny, redis_url, workers=False, **{limit: 0.1}) as url, live(url) as client:
        client.configure()
        assert client.closed() == (1008, code)


def test_sessions_of_a_key_and_of_all_are_refused_before_they_begin(tiny: dict[str, object], redis_url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(picture()).decode()}}
    body = {"model": "videollm-online", "messages": [{"role": "user", "content": [part]}]}
    limits = {"sessions_per_key": 1, "sessions": 2}
    with running(tiny, redis_url, ["a", "b", "c"], workers=False, **limits) as app:

        def refused(key: str) -> str:
            """The code, which has to be the same on the WebSocket and over HTTP."""
            authorization = {"Authorization": f"Bearer {key}"}
            with live(app.url, **authorization) as client:
                status, code = client.closed()
            answer = httpx.post(f"{app.url}/v1/chat/completions", json=body, headers=authorization)
            assert (status, answer.status_code, answer.headers["retry-after"]) == (1013, 429, "5")
            assert answer.json()["error"]["code"] == code
            return code

        with live(app.url, Authorization="Bearer a") as first, live(app.url, Authorization="Bearer b") as second:
            first.until(SessionCreated)
            second.until(SessionCreated)
            assert refused("a") == "too_many_sessions"
            assert refused("c") == "sessions_full"
            first.configure()
            first.until(SessionUpdated)


def test_connections_beyond_what_a_gateway_takes_are_refused(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, workers=False, connections=1) as url, live(url) as first:
        first.until(SessionCreated)
        with live(url) as second:
            assert second.closed() == (1013, "sessions_full")


def test_questions_beyond_those_that_may_wait_are_refused_and_the_session_goes_on(
    tiny: dict[str, object], redis_url: str
) -> None:
    with application(tiny, redis_url, workers=False, max_pending_inputs=2) as url, live(url) as client:
        for question in "abc":
            client.ask(question)
        error = client.until(ErrorEvent).error
        client.say({"type": "session.update", "session": {"include": ["frame_decided"]}})
        client.until(SessionUpdated)
    assert (error.code, error.type) == ("too_many_inputs", "rate_limit_error")


def test_a_failure_of_the_server_closes_one_connection_and_says_so(
    tiny: dict[str, object], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with application(tiny, redis_url, workers=False) as url, live(url) as other:
        other.configure()
        other.until(SessionUpdated)
        with monkeypatch.context() as patch, live(url) as client:
            patch.setattr(Conversation, "offer", broken)
            client.frame(0)
            assert client.closed() == (1011, "internal")
        other.configure()
        other.until(SessionUpdated)
