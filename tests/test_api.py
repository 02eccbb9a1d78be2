"""The gateway over HTTP and WebSocket, with the real bus, encoder and LLM around it in one process."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from live_client import live, picture, post_video
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from actors.bus import Bus, BusConfig
from actors.config import Config, ModelConfig
from actors.encoder import build_encoder_worker
from actors.llm import build_llm_worker
from serve.api import build_api
from serve.gateway import Gateway, ServeConfig
from serve.keys import ApiKeys
from serve.limits import LimitsConfig
from serve.server_events import (
    ErrorEvent,
    FrameDecided,
    ItemAdded,
    ResponseCreated,
    ResponseDone,
    SessionCreated,
    SessionEnded,
    SessionUpdated,
    TextDelta,
    TextDone,
    VideoStatus,
)

A = 64  # the tiny tokenizer's letter "a": text at once, unlike the first bytes of a longer character


class Application:
    """Everything but Ray on one event loop in a thread; `url` answers once the constructor is through."""

    def __init__(self, config: Config, redis: str, api_key: str | None = None, workers: bool = True) -> None:
        self.config = config
        self.redis = redis
        self.api_key = api_key
        self.workers = workers
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self.url = self._started.result(timeout=60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=60)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            buses = [await Bus.connect(self.config.section("bus", BusConfig), self.redis) for _ in range(3)]
            encoder = build_encoder_worker(self.config, buses[0], "encoder")
            llm = build_llm_worker(self.config, buses[1], "llm")
            loops = [asyncio.create_task(worker.run()) for worker in (encoder, llm) if self.workers]
            gateway = Gateway(
                buses[2],
                llm.fingerprint,
                self.config.section("serve", ServeConfig),
                limits=self.config.section("limits", LimitsConfig),
            )
            api = build_api(
                gateway, self.config.model.frames.resolution_px, ApiKeys([self.api_key] if self.api_key else [])
            )
            server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning", timeout_graceful_shutdown=2))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            self._started.set_result(f"http://127.0.0.1:{port}")
        except BaseException as error:
            self._started.set_exception(error)
            return
        await self._stop.wait()
        server.should_exit = True
        await serving
        for worker in (encoder, llm):
            if self.workers:
                worker.stop()
        await asyncio.gather(*loops)
        for bus in buses:
            await bus.close()


@pytest.fixture(scope="module")
def tiny(tiny_configs: dict[str, ModelConfig], tiny_checkpoint: Path) -> dict[str, object]:
    """The model section of a checkpoint that is quick."""
    return {**tiny_configs["live1plus"].model_dump(mode="json"), "checkpoint": str(tiny_checkpoint)}


@contextmanager
def application(
    tiny: dict[str, object], redis_url: str, api_key: str | None = None, workers: bool = True, **serve: object
) -> Iterator[str]:
    """The address of an application of its own, with `serve` settings; without `workers` nobody takes its sessions."""
    limits = {name: serve.pop(name) for name in list(serve) if name in LimitsConfig.model_fields}
    sections = {
        "limits": limits,
        "model": tiny,
        "bus": {"prefix": f"test-{uuid.uuid4().hex}:", "credits": serve.pop("credits", 32)},
        "serve": {"status_interval_s": 0.05, **serve},
    }
    app = Application(Config(sections), redis_url, api_key, workers)
    try:
        yield app.url
    finally:
        app.close()


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
    assert (updated.session.video.fps, updated.session.video.threshold) == (4, 0.5)
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


def test_a_frame_that_is_no_picture_is_skipped_in_its_place(url: str) -> None:
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.frame(1, b"this is no picture")
        client.frame(2)
        ended = client.end()
    assert client.decided() == [(0, 0), (2, 2)]
    (error,) = client.all(ErrorEvent)
    assert (error.error.code, error.error.video_time) == ("frame_skipped", 1)
    assert "not an image" in error.error.message
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
            with httpx.Client() as client:
                answer = client.post(f"{url}/v1/videos", files={"video": ("a.mp4", b"")})
            assert answer.status_code in (422, 429)
            first.end()
        with live(url) as third:
            assert third.until(SessionCreated)


def test_a_posted_video_is_watched_to_its_end(url: str, sample_video: Path) -> None:
    events = post_video(
        url,
        sample_video.read_bytes(),
        question="What is this?",
        question_time="2",
        fps="1",
        max_output_tokens="3",
        include="frame_decided",
    )
    assert isinstance(events[0], SessionCreated)
    decided = [event.video_time for event in events if isinstance(event, FrameDecided)]
    assert decided == [float(index) for index in range(len(decided))]
    assert len(decided) > 30
    (asked,) = [event for event in events if isinstance(event, ItemAdded)]
    assert asked.video_time == 2
    assert isinstance(events[-1], SessionEnded)
    assert events[-1].frames.decided == len(decided)


@pytest.mark.parametrize(
    ("video", "form", "status", "says"),
    [
        (b"", {}, 422, "clip.mp4"),
        (b"not a video at all", {}, 422, "clip.mp4"),
        (b"x", {"fps": "0"}, 422, "fps"),
        (b"x", {"fps": "nan"}, 422, "fps"),
        (b"x", {"question": "why?", "question_time": "nan"}, 422, "nan"),
        (b"x", {"question_time": "1"}, 422, "1 times for 0 questions"),
        (b"x", {"question": " "}, 422, "empty"),
        (b"x", {"include": "everything"}, 422, "frame_decided"),
        (b"x", {"threshold": "-1"}, 422, "threshold"),
    ],
)
def test_a_bad_post_is_refused_with_what_is_wrong(
    url: str, video: bytes, form: dict[str, str], status: int, says: str
) -> None:
    answer = httpx.post(f"{url}/v1/videos", files={"video": ("clip.mp4", video)}, data=form)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


def test_an_upload_over_the_limit_is_refused_announced_or_not(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, upload_bytes=1000) as url:
        announced = httpx.post(f"{url}/v1/videos", files={"video": ("clip.mp4", bytes(2000))})
        boundary = b"--b\r\nContent-Disposition: form-data; name=video; filename=a.mp4\r\n\r\n"
        chunks = [boundary, *[bytes(500)] * 4, b"\r\n--b--\r\n"]
        unannounced = httpx.post(
            f"{url}/v1/videos", content=iter(chunks), headers={"content-type": "multipart/form-data; boundary=b"}
        )
    assert [answer.status_code for answer in (announced, unannounced)] == [413, 413]
    assert announced.json()["error"]["code"] == "too_big"


def test_health_and_statistics(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    frames = httpx.get(f"{url}/v1/stats").json()["gateway"]["frames"]
    assert frames["decided"] <= frames["admitted"] <= frames["received"]


def test_errors_look_alike_everywhere(url: str) -> None:
    for answer in (httpx.get(f"{url}/v1/nothing"), httpx.get(f"{url}/v1/videos"), httpx.post(f"{url}/v1/videos")):
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}


def test_with_a_key_only_its_bearers_are_served(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, api_key="secret") as url:
        assert httpx.get(f"{url}/v1/stats").status_code == 401
        assert httpx.get(f"{url}/v1/stats", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(f"{url}/v1/stats", headers={"Authorization": "Bearer secret"}).status_code == 200
        with pytest.raises(InvalidStatus):
            connect(f"{url.replace('http', 'ws', 1)}/v1/realtime")
        with live(url, Authorization="Bearer secret") as client:
            assert client.until(SessionCreated)


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_without_a_key_pages_of_other_sites_are_not_served(url: str, headers: dict[str, str]) -> None:
    answer = httpx.get(f"{url}/v1/stats", headers=headers)
    assert answer.status_code == 401
    assert "evil.example" in json.dumps(answer.json())
