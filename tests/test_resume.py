"""A client that comes back: at any gateway, after any event, and nobody but that client."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from application import Application, running
from live_client import DEADLINE_S, LiveClient, live

from actors.session_log import SessionMeta
from serve.server_events import (
    ErrorEvent,
    FrameDecided,
    ItemAdded,
    ServerEvent,
    SessionCreated,
    SessionEnded,
    SessionUpdated,
    TextDelta,
    VideoStatus,
)

KEY, OTHER_KEY = "first", "second"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def app(tiny: dict[str, object], redis_url: str) -> Iterator[Application]:
    """Two gateways for holders of two keys."""
    with running(tiny, redis_url, [KEY, OTHER_KEY], gateways=2, resume_s=600) as application:
        yield application


@pytest.fixture(scope="module")
def told(app: Application) -> tuple[str, list[ServerEvent]]:
    """A session that has ended, with all its events: decisions, answers and settings that change."""
    with live(app.url, **BEARER) as client:
        client.configure(max_output_tokens=5, video={"drop_policy": "block"})
        session_id = client.until(SessionCreated).session.id
        client.ask("What is there?", video_time=1.0)
        client.ask("And now?", video_time=3.0)
        for index in range(8):
            client.frame(index / 2)
        client.say({"type": "session.update", "session": {"video": {"threshold": 0.25}}})
        client.end()
    return session_id, client.logged


def meta(app: Application, session_id: str) -> SessionMeta | None:
    return app.call(app.gateways[0].bus.session_meta(session_id))


def test_what_comes_after_any_position_is_what_came_after_it_at_first(
    app: Application, told: tuple[str, list[ServerEvent]]
) -> None:
    """In the midst of a response, too: its end knows when it began and what it answers."""
    session_id, events = told
    kinds = {type(event) for event in events}
    assert {FrameDecided, ItemAdded, TextDelta, SessionUpdated, SessionEnded} <= kinds
    for number, after in enumerate(sorted({event.position for event in events if event.position is not None})[:-1]):
        with live(app.urls[number % 2], session_id, after, **BEARER) as client:
            client.until(SessionEnded)
        expected = [event for event in events if event.position is not None and event.position > after]
        assert [_plain(event) for event in client.logged] == [_plain(event) for event in expected]


def _plain(event: ServerEvent) -> dict[str, object]:
    """An event without what was measured: how far a frame's decision lagged is not in the log."""
    return event.model_dump(exclude={"frames": {"lag_p50", "lag_p99"}})


def test_ids_of_events_are_unlike(told: tuple[str, list[ServerEvent]]) -> None:
    ids = [event.event_id for event in told[1]]
    assert len(set(ids)) == len(ids)


def test_a_client_goes_on_at_another_gateway_with_nothing_missing_and_nothing_twice(app: Application) -> None:
    parts: list[LiveClient] = []
    session_id, after, sent = None, None, 0
    for turn in range(3):
        with live(app.urls[turn % 2], session_id, after, **BEARER) as client:
            parts.append(client)
            created = client.until(SessionCreated)
            assert created.resumed == (turn > 0)
            session_id = created.session.id
            if turn == 0:
                client.configure(instructions="Be brief.", video={"drop_policy": "block"})
            else:
                assert created.session.instructions == "Be brief."
                assert created.session.video.drop_policy == "block"
                through = client.until(VideoStatus).frames.through
                assert through is not None
                sent = int(through * 2) + 1
            while sent < 10 * (turn + 1):
                client.frame(sent / 2)
                sent += 1
            if turn == 2:
                ended = client.end()
                break
            while len(client.all(FrameDecided)) < 5:
                client.until(FrameDecided)
            client.vanish()
            after = client.logged[-1].position
    found = [event for client in parts for event in client.all(FrameDecided)]
    assert [(event.seq, event.video_time) for event in found] == [(seq, seq / 2) for seq in range(30)]
    assert (ended.frames.received, ended.frames.admitted, ended.frames.decided) == (30, 30, 30)


def test_what_was_counted_stays_counted(app: Application) -> None:
    with live(app.urls[0], **BEARER) as first:
        session_id = first.until(SessionCreated).session.id
        first.configure(max_output_tokens=40, video={"drop_policy": "latest"})
        for index in range(100):
            first.frame(index)
        while (status := first.until(VideoStatus).frames).received < 100:
            pass
        first.vanish()
    with live(app.urls[1], session_id, **BEARER) as second:
        assert second.until(SessionCreated).resumed
        resumed = second.until(VideoStatus).frames
        ended = second.end().frames
    assert status.dropped > 0
    assert (resumed.received, resumed.dropped_by, resumed.through) == (100, status.dropped_by, 99)
    assert ended.decided + ended.dropped == 100


def test_a_second_connection_takes_over_from_the_first(app: Application) -> None:
    with live(app.urls[0], **BEARER) as first:
        session_id = first.until(SessionCreated).session.id
        first.configure(video={"drop_policy": "block"})
        first.frame(0)
        first.until(FrameDecided)
        with live(app.urls[1], session_id, **BEARER) as second:
            assert second.until(SessionCreated).resumed
            assert first.closed() == (1008, "session_taken")
            second.frame(1)
            second.end()
    assert second.decided() == [(0, 0.0), (1, 1.0)]


def test_a_question_that_is_asked_again_after_coming_back_is_answered_once(app: Application) -> None:
    with live(app.urls[0], **BEARER) as first:
        session_id = first.until(SessionCreated).session.id
        first.configure(video={"drop_policy": "block"})
        for name in ("a", "b"):
            first.ask(f"What is {name}?", video_time=1.0, item_id=name)
        first.frame(0)
        first.until(FrameDecided)
        first.vanish()
    with live(app.urls[1], session_id, **BEARER) as second:
        for name in ("a", "b"):
            second.ask(f"What is {name}?", video_time=1.0, item_id=name)
        second.frame(1)
        second.end()
    assert [item.item.id for item in second.all(ItemAdded)] == ["a", "b"]


@pytest.mark.parametrize(
    ("session_id", "after", "key", "code"),
    [
        ("mine", None, OTHER_KEY, "session_expired"),
        ("sess_unknown", None, KEY, "session_expired"),
        ("mine", 10_000, KEY, "bad_position"),
        ("mine", "NaN", KEY, "bad_value"),
        ("mine", "9" * 400, KEY, "bad_value"),
        ("a\nb", None, KEY, "session_id"),
        ("x" * 2_000, None, KEY, "session_id"),
        ("{}:meta", None, KEY, "session_id"),
        ("", None, KEY, "session_id"),
    ],
)
def test_what_cannot_be_resumed_is_refused_and_the_session_goes_on(
    app: Application, told: tuple[str, list[ServerEvent]], session_id: str, after: object, key: str, code: str
) -> None:
    wanted = told[0] if session_id == "mine" else session_id
    with live(app.url, wanted, after, Authorization=f"Bearer {key}") as client:  # type: ignore[arg-type]
        assert client.closed() == (1008, code)
        (error,) = client.all(ErrorEvent)
        assert error.error.type == "invalid_request_error"
    with live(app.url, told[0], 0, **BEARER) as client:
        assert client.until(SessionCreated).resumed


def test_a_session_whose_client_stays_away_ends_and_gives_its_place_back(
    tiny: dict[str, object], redis_url: str
) -> None:
    with running(tiny, redis_url, resume_s=3, sessions=1) as app:
        with live(app.url) as client:
            session_id = client.until(SessionCreated).session.id
            client.configure()
            client.frame(0)
            client.until(FrameDecided)
            client.vanish()
        deadline = time.monotonic() + DEADLINE_S
        while (found := meta(app, session_id)) and found.state != "ended":
            assert time.monotonic() < deadline
        with live(app.url, session_id) as client:
            assert "client_gone" in client.until(SessionEnded).reason
        with live(app.url) as another:
            another.until(SessionCreated)
            another.configure()
            another.end()


def test_a_client_that_says_it_is_done_frees_its_place_at_once(tiny: dict[str, object], redis_url: str) -> None:
    with running(tiny, redis_url, sessions=1) as app:
        for _ in range(2):
            with live(app.url) as client:
                client.until(SessionCreated)
                client.configure()
                client.end()
                assert client.closed() == (1000, "")


def test_a_client_that_never_said_anything_leaves_nothing(tiny: dict[str, object], redis_url: str) -> None:
    with running(tiny, redis_url, sessions=1) as app:
        with live(app.url) as client:
            session_id = client.until(SessionCreated).session.id
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with live(app.url) as another:
                if isinstance(another.until(ServerEvent), SessionCreated):
                    break
            assert time.monotonic() < deadline
        assert meta(app, session_id) is None
