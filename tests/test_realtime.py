"""One client's WebSocket, with the real bus, encoder and LLM around the gateway in one process."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
from application import application
from live_client import LiveClient, live, picture
from websockets.exceptions import ConnectionClosed

from serve.server_events import (
    ErrorEvent,
    FrameDecided,
    ItemAdded,
    ResponseCreated,
    ResponseDone,
    SessionCreated,
    SessionUpdated,
    TextDelta,
    TextDone,
    VideoStatus,
    WindowInfo,
)

A = 64  # the tiny tokenizer's letter "a": text at once, unlike the first bytes of a longer character


@pytest.fixture(scope="module")
def url(tiny: dict[str, object], redis_url: str) -> Iterator[str]:
    with application(tiny, redis_url) as address:
        yield address


def test_every_frame_is_decided_once_and_in_order(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        for index in range(40):
            client.frame(index / 2)
        ended = client.end()
    assert client.decided() == [(index, index / 2) for index in range(40)]
    assert (ended.frames.received, ended.frames.admitted, ended.frames.decided, ended.frames.dropped) == (40, 40, 40, 0)


def test_a_session_begins_with_its_settings_and_ends_normally(url: str) -> None:
    with live(url) as client:
        created = client.until(SessionCreated)
        client.configure(instructions="Be brief.", video={"fps": 4, "threshold": 0.5})
        updated = client.until(SessionUpdated)
        ended = client.end()
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(timeout=10)
    assert created.session.id == updated.session.id
    assert updated.session.instructions == "Be brief."
    video = updated.session.video
    assert (video.fps, video.threshold, video.fit) == (4, 0.5, "pad")
    assert ended.frames.decided == 0
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1000


def test_positions_never_decrease_and_a_response_is_told_in_order(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.ask("What is there?", video_time=1.0, item_id="mine")
        for index in range(6):
            client.frame(index / 2)
        client.end()
    positions = [event.position for event in client.events if event.position is not None]
    assert positions == sorted(positions)
    asked = client.all(ItemAdded)
    assert [(item.item.id, item.video_time, item.item.content[0].text) for item in asked] == [
        ("mine", 1.0, "What is there?")
    ]
    answer = next(event.response for event in client.all(ResponseCreated) if event.response.item_id == "mine")
    told = [
        type(event)
        for event in client.events
        if getattr(event, "response_id", None) == answer.id
        or (isinstance(event, ResponseCreated | ResponseDone) and event.response.id == answer.id)
    ]
    assert told[0] is ResponseCreated
    assert told[-2:] == [TextDone, ResponseDone]
    assert set(told[1:-2]) <= {TextDelta}
    done = next(event for event in client.all(TextDone) if event.response_id == answer.id)
    deltas = [event.delta for event in client.all(TextDelta) if event.response_id == answer.id]
    assert "".join(deltas).strip() == done.text.strip()
    assert done.video_time == 1.0


def test_decisions_are_told_only_when_asked_for(url: str) -> None:
    with live(url) as client:
        client.configure(include=[], video={"drop_policy": "block"})
        client.frame(0)
        ended = client.end()
    assert not client.all(FrameDecided)
    assert ended.frames.decided == 1


def test_frames_come_as_binary_base64_or_data_url(url: str) -> None:
    encoded = base64.b64encode(picture()).decode()
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.say({"type": "input_video_buffer.append", "video_time": 1, "image": encoded})
        part = {"type": "input_image", "image_url": f"data:image/jpeg;base64,{encoded}", "video_time": 2}
        client.say({"type": "conversation.item.create", "item": {"content": [part]}})
        client.end()
    assert client.decided() == [(0, 0), (1, 1), (2, 2)]


def test_bad_messages_are_answered_and_the_session_goes_on(url: str) -> None:
    bad: list[str | bytes] = [
        "{",
        '{"type": "what"}',
        b"\x07",
        b"\x01",
        '{"type": "session.update", "session": {"a": 1}}',
    ]
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(5)
        for message in bad:
            client.socket.send(message)
        client.frame(5)
        client.frame(4)
        client.ask("x" * 5000)
        client.frame(6)
        client.end()
    codes = " ".join(event.error.code for event in client.all(ErrorEvent))
    assert codes == "bad_json unknown_type bad_frame bad_frame unknown_field bad_time bad_time question_too_long"
    assert client.decided() == [(0, 5), (1, 6)]


@pytest.mark.parametrize(
    "bad",
    [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, {"type": "input_text", "text": "x" * 5000}],
)
def test_of_an_item_with_a_bad_part_nothing_is_taken(url: str, bad: dict[str, object]) -> None:
    image = f"data:image/jpeg;base64,{base64.b64encode(picture()).decode()}"
    good = [{"type": "input_text", "text": "What is there?"}, {"type": "input_image", "image_url": image}]
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.say({"type": "conversation.item.create", "item": {"content": [*good, bad]}})
        client.until(ErrorEvent)
        client.frame(1)
        client.end()
    assert client.decided() == [(0, 1)]
    assert not client.all(ItemAdded)


def test_a_damaged_picture_is_skipped_in_its_place(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.frame(1, picture()[:-8])
        client.frame(2)
        ended = client.end()
    assert client.decided() == [(0, 0), (2, 2)]
    (error,) = client.all(ErrorEvent)
    assert (error.error.code, error.error.video_time) == ("frame_skipped", 1)
    assert "damaged" in error.error.message
    assert ended.frames.skipped == 1


def test_settings_change_in_the_middle_of_a_session(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        client.say({"type": "session.update", "session": {"video": {"threshold": 0.125}}})
        while (changed := client.until(SessionUpdated)).position is None:
            pass
        client.end()
    assert changed.session.video.threshold == 0.125


def window_after_a_change(client: LiveClient) -> WindowInfo | None:
    """The window in force once the model has taken another threshold; ends the session."""
    client.say({"type": "session.update", "session": {"video": {"threshold": 0.125}}})
    while (changed := client.until(SessionUpdated)).session.video.threshold != 0.125 or changed.position is None:
        pass
    client.end()
    return changed.session.video.window


def test_what_the_model_refused_is_not_asked_for_again(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        client.say({"type": "session.update", "session": {"video": {"window": {"trigger": 100000, "keep": 50000}}}})
        assert client.until(ErrorEvent).error.code == "refused"
        assert window_after_a_change(client) is None


def test_a_refused_change_does_not_undo_the_next(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        for window in ({"trigger": 100000, "keep": 50000}, {"trigger": 1000, "keep": 600}):
            client.say({"type": "session.update", "session": {"video": {"window": window}}})
        assert client.until(ErrorEvent).error.code == "refused"
        assert window_after_a_change(client) == WindowInfo(trigger=1000, keep=600)


def test_what_was_refused_while_the_client_was_away_is_not_asked_for_again(url: str) -> None:
    with live(url) as client:
        session_id = client.until(SessionCreated).session.id
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        decided = client.until(FrameDecided)
        client.say({"type": "session.update", "session": {"video": {"window": {"trigger": 100000, "keep": 50000}}}})
    with live(url, session_id, decided.position) as client:
        assert client.until(ErrorEvent).error.code == "refused"
        assert window_after_a_change(client) is None


def test_with_latest_the_newest_frame_wins_and_the_rest_is_counted(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, max_live_frames=1) as url, live(url) as client:
        client.configure(max_output_tokens=40)
        for index in range(200):
            client.frame(index)
        ended = client.end()
    frames = ended.frames
    assert frames.received == 200
    assert frames.dropped > 0
    assert frames.decided + frames.dropped == 200
    assert client.decided()[-1][1] == 199
    assert [seq for seq, _ in client.decided()] == list(range(frames.decided))


def test_with_latest_video_that_comes_faster_than_time_goes_by_is_thinned(
    tiny: dict[str, object], redis_url: str
) -> None:
    with application(tiny, redis_url, max_live_frames=4) as url, live(url) as client:
        client.configure(max_output_tokens=4, video={"fps": 0.001})
        for index in range(50):
            client.frame(index)
        frames = client.end().frames
    assert (frames.received, frames.decided, frames.dropped) == (50, 2 + 1, 47)  # at once, and the last at the end
    assert client.decided()[-1][1] == 49


def test_with_block_a_flood_is_refused_frame_by_frame(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, max_waiting_frames=2, credits=1) as url, live(url) as client:
        client.configure(max_output_tokens=40, video={"drop_policy": "block"})
        for index in range(50):
            client.frame(index)
        ended = client.end()
    refused = client.all(ErrorEvent)
    assert {event.error.code for event in refused} == {"buffer_full"}
    assert ended.frames.dropped == len(refused)
    assert ended.frames.decided + len(refused) == ended.frames.received == 50


def test_the_state_of_the_video_is_told_while_it_changes(url: str) -> None:
    with live(url) as client:
        client.configure()
        client.frame(0)
        client.until(FrameDecided)
        while (status := client.until(VideoStatus)).frames.decided == 0:
            pass
        client.end()
    assert status.frames.lag_p50 is not None
    assert status.frames.lag_p50 > 0


def test_a_session_is_sampled_as_its_client_says(url: str) -> None:
    def spoken(**sampling: float) -> str:
        with live(url) as client:
            client.configure(max_output_tokens=24, **sampling)
            client.ask("Tell me everything.")
            text = client.until(TextDone).text
            client.end()
        return text

    greedy = spoken()
    assert spoken(seed=5) == greedy
    sampled = [spoken(temperature=2, repetition_penalty=2, seed=seed) for seed in range(4)]
    assert len({greedy, *sampled}) > 2
    assert spoken(temperature=2, repetition_penalty=2, seed=3) == sampled[3]
    assert spoken(temperature=2, top_p=1e-6) == greedy


def test_a_change_of_sampling_is_told_and_in_force_from_there_on(url: str) -> None:
    with live(url) as client:
        client.configure(temperature=0.5, video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        client.say({"type": "session.update", "session": {"temperature": 0, "repetition_penalty": 1.5, "seed": -3}})
        client.frame(1)
        while (session := client.until(SessionUpdated).session).seed != -3:
            pass
        client.end()
    assert (session.temperature, session.top_p, session.repetition_penalty) == (0, 1, 1.5)


def test_a_response_can_be_cancelled(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is kept from ending its answer, or it might be over before the cancellation comes."""
    monkeypatch.setattr("actors.batched.sample", lambda *_: A)
    with live(url) as client:
        client.configure(max_output_tokens=4096)
        client.ask("Tell me everything.", video_time=0.0)
        client.frame(0)
        client.until(TextDelta)
        client.say({"type": "response.cancel"})
        done = client.until(ResponseDone)
        client.end()
    assert done.response.status == "cancelled"


def test_a_session_that_nobody_takes_is_told_so(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, admission_timeout_s=0.2, workers=False) as url, live(url) as client:
        client.configure()
        error = client.until(ErrorEvent)
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(timeout=10)
    assert error.error.code == "no_capacity"
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1013


def test_an_idle_session_is_closed_with_a_reason(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, idle_s=0.1) as url, live(url) as client:
        assert client.until(ErrorEvent).error.code == "idle_timeout"


def test_a_full_gateway_says_so_and_takes_the_next_when_there_is_room(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, sessions=1) as url:
        with live(url) as first:
            first.until(SessionCreated)
            with live(url) as second:
                assert second.until(ErrorEvent).error.code == "sessions_full"
            first.end()
        with live(url) as third:
            assert third.until(SessionCreated)
