"""Sources that the server reads: files, an HTTP server that hiccups, and whatever clients do with them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from application import application, running
from av.container import InputContainer
from rtsp_server import camera
from test_chat_completions import make_clip
from test_url_guard import Server

from actors.config import FrameConfig
from actors.video import encode_jpeg
from serve import ingest, streams
from serve.conversation import Conversation
from serve.ingest import Ingest, Source
from serve.server_events import AnyServerEvent, ErrorEvent, FrameDecided, ItemAdded, SessionEnded, TextDone, parse_event
from serve.url_guard import SourcesConfig, UrlGuard

DEADLINE_S = 60
FRAMES = FrameConfig(resolution_px=32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_clip(folder / "clip.mp4", 30)
    make_clip(folder / "long.mp4", 300)
    (folder / "words.mp4").write_text("just words")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (folder / "list.ffconcat").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    return folder


@pytest.fixture(scope="module")
def url(tiny: dict[str, object], redis_url: str, videos: Path) -> Iterator[str]:
    with application(tiny, redis_url, folders=[str(videos)], streams=2) as address:
        yield address


def start(url: str, source: object, live: bool = False, **session: object) -> httpx.Response:
    settings = {"include": ["frame_decided"], "max_output_tokens": 2, **session}
    return httpx.post(f"{url}/v1/streams", json={"source": str(source), "live": live, "session": settings}, timeout=30)


def events(url: str, stream_id: str, last: str | None = None) -> list[tuple[str | None, AnyServerEvent]]:
    """Ids and events to the end of the stream."""
    headers = {} if last is None else {"Last-Event-ID": last}
    found: list[tuple[str | None, AnyServerEvent]] = []
    with httpx.stream("GET", f"{url}/v1/streams/{stream_id}/events", headers=headers, timeout=DEADLINE_S) as answer:
        answer.raise_for_status()
        event_id = None
        for line in answer.iter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                found.append((event_id, parse_event(line[6:])))
                event_id = None
    return found


def until(url: str, stream_id: str, status: str) -> dict[str, object]:
    """The stream once it has that status. Fails after a minute."""
    deadline = time.monotonic() + DEADLINE_S
    while (stream := httpx.get(f"{url}/v1/streams/{stream_id}").json())["status"] != status:
        assert time.monotonic() < deadline, stream
    return stream


def test_a_file_is_watched_to_its_end_and_told_again_to_who_comes_later(url: str, videos: Path) -> None:
    made = start(url, videos / "clip.mp4")
    assert made.status_code == 201, made.text
    stream = made.json()
    assert (stream["object"], stream["source"], stream["status"]) == ("stream", "clip.mp4", "running")
    told = events(url, stream["id"])
    decided = [event.video_time for _, event in told if isinstance(event, FrameDecided)]
    assert decided == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    ended = told[-1][1]
    assert isinstance(ended, SessionEnded)
    assert ended.frames.received == 6
    assert until(url, stream["id"], "ended")["error"] is None
    assert [event for _, event in events(url, stream["id"])] == [event for _, event in told]


def test_last_event_id_goes_on_behind_that_event(url: str, videos: Path) -> None:
    stream_id = start(url, videos / "clip.mp4").json()["id"]
    told = events(url, stream_id)
    ids = [event_id for event_id, _ in told if event_id is not None]
    assert ids == sorted(ids, key=int)
    middle = ids[len(ids) // 2]
    behind = next(index for index, (event_id, _) in enumerate(told) if event_id == middle)
    assert events(url, stream_id, middle) == told[behind + 1 :]
    for wrong in ("x", "-1", "999999"):
        answer = httpx.get(f"{url}/v1/streams/{stream_id}/events", headers={"Last-Event-ID": wrong})
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "bad_position"


def test_all_frames_are_counted_at_the_end_however_slowly_the_reader_follows(
    url: str, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(conversation: Conversation) -> None:
        async for _ in conversation.events():
            await asyncio.sleep(0.2)

    monkeypatch.setattr(streams, "_to_the_end", slowly)
    *_, (_, ended) = events(url, start(url, videos / "clip.mp4").json()["id"])
    assert isinstance(ended, SessionEnded)
    assert ended.frames.decided == ended.frames.admitted > 0


def test_questions_are_answered_among_the_events(url: str, videos: Path) -> None:
    stream_id = start(url, videos / "long.mp4", live=True).json()["id"]
    asked = httpx.post(f"{url}/v1/streams/{stream_id}/queries", json={"text": "What is there?", "video_time": 0.5})
    assert asked.status_code == 202
    item_id = asked.json()["id"]
    seen = []
    with httpx.stream("GET", f"{url}/v1/streams/{stream_id}/events", timeout=DEADLINE_S) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                seen.append(parse_event(line[6:]))
            if any(isinstance(event, ItemAdded) and event.item.id == item_id for event in seen) and isinstance(
                seen[-1], TextDone
            ):
                break
    for body in ({"text": " "}, {"text": "x" * 5000}, {"text": "x", "video_time": -1}, {"txt": "x"}):
        assert httpx.post(f"{url}/v1/streams/{stream_id}/queries", json=body).status_code == 422
    assert httpx.delete(f"{url}/v1/streams/{stream_id}").json()["deleted"] is True
    assert until(url, stream_id, "ended")


def test_a_deleted_stream_ends_and_makes_room(url: str, videos: Path) -> None:
    with ThreadPoolExecutor(6) as pool:  # at once: none slips in while another begins
        answers = list(pool.map(lambda _: start(url, videos / "long.mp4", live=True), range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [429] * 4
    ids = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    full = start(url, videos / "clip.mp4")
    assert full.status_code == 429
    assert full.json()["error"]["code"] == "too_many_streams"
    assert full.headers["retry-after"]
    listed = {stream["id"]: stream for stream in httpx.get(f"{url}/v1/streams").json()["data"]}
    assert [listed[stream_id]["status"] for stream_id in ids] == ["running", "running"]
    for stream_id in ids:
        assert httpx.delete(f"{url}/v1/streams/{stream_id}").status_code == 200
        until(url, stream_id, "ended")
    assert start(url, videos / "clip.mp4").status_code == 201


@pytest.mark.parametrize("name", ["words.mp4", "list.m3u8", "list.ffconcat"])
def test_what_is_no_video_fails_with_a_reason(url: str, videos: Path, name: str) -> None:
    stream_id = start(url, videos / name).json()["id"]
    stream = until(url, stream_id, "failed")
    assert name in str(stream["error"])
    assert any(isinstance(event, ErrorEvent | SessionEnded) for _, event in events(url, stream_id))


def test_a_stream_that_fails_in_an_unforeseen_way_makes_room(
    url: str, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> Iterator[None]:
        raise UnicodeError("label empty")
        yield

    monkeypatch.setattr("serve.streams.Ingest.pictures", broken)
    stream = start(url, videos / "long.mp4").json()
    assert until(url, stream["id"], "failed")["error"] == "internal: UnicodeError"


def test_sources_that_are_not_listed_are_refused(url: str, videos: Path) -> None:
    for source in (
        "/etc/passwd",
        f"{videos}/../secret.mp4",
        "https://example.org/a.mp4",
        "rtsp://10.0.0.1/",
        "concat:a",
    ):
        answer = start(url, source)
        assert answer.status_code == 422, source
        assert answer.json()["error"]["code"] == "url_refused"


def test_hostile_questions_and_places_are_refused_and_the_stream_goes_on(url: str, videos: Path) -> None:
    stream_id = start(url, videos / "long.mp4", live=True).json()["id"]
    address = f"{url}/v1/streams/{stream_id}"
    times = ("-1", "NaN", "1e999", '"soon"', "true", "1e10", "[1]")
    bodies = [f'{{"text": "?", "video_time": {video_time}}}' for video_time in times]
    bodies += [
        "",
        "null",
        "[" * 50_000,
        '{"text": "\\ud800"}',
        '{"text": 7}',
        '{"text": "?", "more": 1}',
        '{"text": " "}',
    ]
    for body in (*bodies, json.dumps({"text": "x" * 5000})):
        answer = httpx.post(f"{address}/queries", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), body[:40]
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}
    for place in ("-1", "1.5", "\u00b2", "9" * 15, "9" * 5000, "a b"):
        headers = {"Last-Event-ID": place.encode("latin-1")}
        answer = httpx.get(f"{address}/events", headers=headers)  # type: ignore[arg-type]
        assert (place[:10], answer.status_code) == (place[:10], 422)
        assert answer.json()["error"]["code"] == "bad_position"
    assert httpx.get(address).json()["status"] == "running"
    assert httpx.delete(address).status_code == 200
    until(url, stream_id, "ended")


def test_unknown_streams_are_not_found(url: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/queries")):
        answer = httpx.request(
            method, f"{url}/v1/streams/nothing{path}", json={"text": "x"} if path == "/queries" else None
        )
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


def test_streams_belong_to_their_key_and_are_seen_at_every_gateway(
    tiny: dict[str, object], redis_url: str, videos: Path
) -> None:
    with running(tiny, redis_url, ["mine", "theirs"], gateways=2, folders=[str(videos)]) as app:
        one, other = app.urls
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        body = {"source": str(videos / "long.mp4")}
        stream_id = httpx.post(f"{one}/v1/streams", json=body, headers=mine).json()["id"]
        deadline = time.monotonic() + DEADLINE_S
        assert httpx.get(f"{other}/v1/streams/{stream_id}", headers=mine).status_code == 200
        for foreign in (httpx.get, httpx.delete):
            assert foreign(f"{other}/v1/streams/{stream_id}", headers=theirs).status_code == 404
        assert httpx.get(f"{one}/v1/streams", headers=theirs).json()["data"] == []
        assert httpx.delete(f"{other}/v1/streams/{stream_id}", headers=mine).status_code == 200
        while httpx.get(f"{one}/v1/streams/{stream_id}", headers=mine).json()["status"] == "running":
            assert time.monotonic() < deadline


def test_a_source_that_breaks_off_is_read_on_without_repeating(
    tiny: dict[str, object], redis_url: str, videos: Path
) -> None:
    """The server hangs up in the middle twice, then answers with an error once."""
    body, server, troubles = (videos / "clip.mp4").read_bytes(), Server(), ["cut", "error", "cut"]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        first = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        trouble = troubles.pop(0) if troubles else None
        if trouble == "error":
            handler.send_error(503)
            return
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Length", str(len(body) - first))
        handler.send_header("Accept-Ranges", "bytes")
        handler.end_headers()
        handler.wfile.write(body[first : first + 600] if trouble else body[first:])
        handler.close_connection = True

    server.answers["/clip.mp4"] = answer
    allowed = {"hosts": [f"127.0.0.1:{server.port}"], "schemes": ["http"], "networks": ["127.0.0.1/32"]}
    try:
        with application(tiny, redis_url, **allowed) as url:
            stream_id = start(url, f"http://127.0.0.1:{server.port}/clip.mp4").json()["id"]
            told = events(url, stream_id)
            metrics = httpx.get(f"{url}/metrics").text
    finally:
        server.close()
    assert [event.video_time for _, event in told if isinstance(event, FrameDecided)] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert "videollm_ingest_reconnects_total{" in metrics
    assert not troubles


def test_a_camera_is_read_by_rtsp_and_again_when_it_hangs_up(tiny: dict[str, object], redis_url: str) -> None:
    allowed = {"hosts": ["127.0.0.1:*"], "networks": ["127.0.0.0/8"], "schemes": ["rtsp"]}
    with camera(frames=8) as (port, asked), application(tiny, redis_url, **allowed) as url:
        made = start(url, f"rtsp://127.0.0.1:{port}/door", live=True, video={"fps": 5})
        assert made.status_code == 201, made.text
        stream_id = made.json()["id"]
        deadline = time.monotonic() + DEADLINE_S
        while asked.count("PLAY") < 2 or httpx.get(f"{url}/v1/streams/{stream_id}").json()["frames"]["decided"] < 6:
            assert time.monotonic() < deadline, (asked, httpx.get(f"{url}/v1/streams/{stream_id}").json())
            time.sleep(0.05)
        assert httpx.delete(f"{url}/v1/streams/{stream_id}").status_code == 200
        times = [event.video_time for _, event in events(url, stream_id) if isinstance(event, FrameDecided)]
    assert times[0] == 0
    assert times == sorted(set(times))
    assert times[-1] > 0.8


def test_a_camera_that_tells_no_times_is_in_real_time() -> None:
    """JPEGs one after another, ten a second: FFmpeg would have them at 25 a second."""
    pictures = [encode_jpeg(np.full((32, 32, 3), 20 * number, np.uint8), 90) for number in range(12)]
    server = Server()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
        handler.end_headers()
        for one in pictures:
            head = f"--part\r\nContent-Type: image/jpeg\r\nContent-Length: {len(one)}\r\n\r\n"
            handler.wfile.write(head.encode() + one + b"\r\n")
            time.sleep(0.1)
        handler.close_connection = True

    server.answers["/camera"] = answer
    allowed = {"hosts": [f"127.0.0.1:{server.port}"], "schemes": ["http"], "networks": ["127.0.0.1/32"]}
    guard = UrlGuard(SourcesConfig.model_validate(allowed | {"reconnects": 1}))
    source = Source.of(f"http://127.0.0.1:{server.port}/camera", guard)
    reader = Ingest(source, 20, FRAMES, True, reconnected=lambda: reader.stopped.set())
    try:
        times = [at for at, _ in reader.pictures()]
    finally:
        server.close()
    assert len(times) > 5
    assert times[-1] - times[0] > 0.08 * (len(times) - 1)


@pytest.mark.parametrize("untimed", [{0}, {5}, set(range(12))])
def test_frames_without_a_time_come_one_after_another(
    untimed: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 32
        for number in range(12):
            grey = np.full((32, 32, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    decoded = ingest._decoded

    def some_untimed(container: InputContainer, index: int) -> Iterator[av.VideoFrame]:
        for number, frame in enumerate(decoded(container, index)):
            if number in untimed:
                frame.pts = None
            yield frame

    monkeypatch.setattr(ingest, "_decoded", some_untimed)
    source = Source("file", path.name, UrlGuard(SourcesConfig()), path=path)
    reader = Ingest(source, 10, FRAMES, False, reconnected=lambda: None)
    assert [at for at, _ in reader.pictures()] == pytest.approx([number / 10 for number in range(12)])


def reader_of(server: Server, path: str, fps: float = 2) -> Ingest:
    allowed = {"hosts": [f"127.0.0.1:{server.port}"], "schemes": ["http"], "networks": ["127.0.0.1/32"]}
    guard = UrlGuard(SourcesConfig.model_validate(allowed | {"reconnects": 1}))
    return Ingest(
        Source.of(f"http://127.0.0.1:{server.port}{path}", guard), fps, FRAMES, False, reconnected=lambda: None
    )


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", ["mp4", "ts"])
def test_a_file_on_any_web_server_is_read_to_its_end_once(kind: str, ranges: bool, tmp_path: Path) -> None:
    """Behind the last byte servers answer 416; many know no ranges and yet say how long a file is."""
    path = tmp_path / f"clip.{kind}"
    make_clip(path, 30)
    body, server = path.read_bytes(), Server()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range") if ranges else None
        first = int((asked or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first >= len(body):
            handler.send_error(416)
            return
        handler.send_response(206 if asked else 200)
        if ranges:
            handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(len(body) - first))
        handler.end_headers()
        handler.wfile.write(body[first:])

    server.answers["/clip"] = answer
    reader = reader_of(server, "/clip")
    try:
        times = [at for at, _ in reader.pictures()]
    finally:
        server.close()
    assert times == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5], abs=0.05)
    assert reader.source.broken is None


def test_a_stopped_reader_leaves_no_connection_open() -> None:
    picture, ended = encode_jpeg(np.zeros((32, 32, 3), np.uint8), 90), threading.Event()
    server = Server()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
        handler.end_headers()
        head = f"--part\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
        try:
            while True:
                handler.wfile.write(head.encode() + picture + b"\r\n")
                time.sleep(0.02)
        except OSError:
            ended.set()

    server.answers["/camera"] = answer
    reader = reader_of(server, "/camera", fps=20)
    pictures = reader.pictures()
    try:
        next(pictures)
        reader.stopped.set()
        assert next(pictures, None) is None
        assert ended.wait(20)
    finally:
        server.close()


def clip_at(path: Path, rate: int, count: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = 32, 32
        for number in range(count):
            grey = np.full((32, 32, 3), number % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("rate", "fps"), [(30, 30), (30, 15), (25, 10), (25, 2)])
def test_as_many_pictures_are_taken_as_were_asked_for(rate: int, fps: int, tmp_path: Path) -> None:
    path = clip_at(tmp_path / "clip.mkv", rate, 4 * rate)
    source = Source("file", path.name, UrlGuard(SourcesConfig()), path=path)
    times = [at for at, _ in Ingest(source, fps, FRAMES, False, reconnected=lambda: None).pictures()]
    assert len(times) == 4 * fps
    assert times == pytest.approx([number / fps for number in range(4 * fps)], abs=1 / rate + 1e-3)


def test_times_that_begin_anew_go_on(tmp_path: Path) -> None:
    """As behind a relay whose encoder was started again."""
    part = clip_at(tmp_path / "part.ts", 10, 30).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(part + part)
    source = Source("file", path.name, UrlGuard(SourcesConfig()), path=path)
    times = [at for at, _ in Ingest(source, 2, FRAMES, False, reconnected=lambda: None).pictures()]
    assert len(times) == pytest.approx(12, abs=1)
    assert times == sorted(set(times))
    assert times[-1] == pytest.approx(5.5, abs=0.6)


def test_a_source_that_stays_away_is_given_up(tiny: dict[str, object], redis_url: str) -> None:
    allowed = {"hosts": ["127.0.0.1:9"], "schemes": ["http"], "networks": ["127.0.0.1/32"], "reconnects": 1}
    with application(tiny, redis_url, **allowed) as url:
        stream_id = start(url, "http://127.0.0.1:9/a.mp4").json()["id"]
        stream = until(url, stream_id, "failed")
    assert "failed 2 times in a row" in str(stream["error"])


def test_the_body_of_a_stream_request_is_checked(url: str) -> None:
    for body in ("{", "[]", '{"source": ""}', '{"source": "a", "session": {"wings": 2}}', '{"source": "\\ud800"}'):
        answer = httpx.post(f"{url}/v1/streams", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422, body
        assert set(json.loads(answer.text)["error"]) == {"message", "type", "code", "param"}


def test_a_stream_has_a_longest_time(tiny: dict[str, object], redis_url: str, videos: Path) -> None:
    with application(tiny, redis_url, folders=[str(videos)], stream_s=0.5) as url:
        stream = until(url, start(url, videos / "long.mp4", live=True).json()["id"], "ended")
    assert stream["error"] == "the longest time of a stream is over"
