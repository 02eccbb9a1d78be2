"""Hostile input over every HTTP entrance: a typed error, the server alive, another session's decisions unchanged."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from application import application, running
from live_client import live, picture
from PIL import Image
from test_chat_completions import image_part, make_clip, post, shown, user

FIELD = b"--b\r\nContent-Disposition: form-data; name=%s\r\n\r\nx\r\n"
LIMITS = {
    "body_bytes": 2 << 20,
    "upload_bytes": 2 << 20,
    "send_s": 1.0,
    "frame_pixels": 1 << 20,
    "video_pixels": 1 << 20,
}


@pytest.fixture(scope="module")
def url(tiny: dict[str, object], redis_url: str) -> Iterator[str]:
    with application(tiny, redis_url, **LIMITS) as address:
        yield address


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 20)


@contextmanager
def undisturbed(url: str) -> Iterator[None]:
    """A session that is open around the block decides every frame, in order."""
    with live(url) as client:
        client.configure(video={"drop_policy": "block"})
        for index in range(3):
            client.frame(index / 2)
        yield
        for index in range(3, 6):
            client.frame(index / 2)
        client.end()
    assert client.decided() == [(index, index / 2) for index in range(6)]
    assert httpx.get(f"{url}/health").status_code == 200


def refused(answer: httpx.Response, *codes: str) -> None:
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500, error
    assert error["code"] in codes, error
    assert set(error) == {"message", "type", "code", "param"}
    assert len(error["message"]) < 1000


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims that size; its pixels are not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, kind, **options)
    return buffer.getvalue()


def animated() -> bytes:
    frames = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (0, 255)]
    return encoded_all(frames)


def encoded_all(frames: list[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BAD_IMAGES = {
    "truncated": picture()[:40],
    "text": b"just words",
    "bomb": png(60_000, 60_000),
    "1x2000000": png(1, 2_000_000),
    "animated": animated(),
    "gif": encoded("P", "GIF"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "empty": b"\0",
}
GOOD_IMAGES = {
    "cmyk": encoded("CMYK", "JPEG"),
    "polyglot": picture() + b"PK\x03\x04<script>alert(1)</script>",
    "16 bits": encoded("I;16", "PNG"),
    "palette": encoded("P", "PNG"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_hostile_image_is_a_typed_error(url: str, name: str) -> None:
    refused(post(url, messages=user(image_part(data=BAD_IMAGES[name]))), "bad_image")


def test_odd_images_that_are_images_are_seen(url: str) -> None:
    with undisturbed(url):
        answer = post(url, messages=user(*(image_part(data=data) for data in GOOD_IMAGES.values())), max_tokens=1)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["frames"] == len(GOOD_IMAGES)


def bad_videos(clip: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"just words",
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "dash": b"<?xml version='1.0'?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n",
        "header alone": clip[:24],
        "nested": b"".join(struct.pack(">I4s", 1 << 20, b"moov") for _ in range(2000)),
    }


def damaged_videos(clip: bytes) -> dict[str, bytes]:
    """FFmpeg plays some of them."""
    at = clip.index(b"tkhd") + 4
    wild = np.frombuffer(clip, np.uint8).copy()
    wild[len(wild) // 4 :: 97] ^= 0x5A
    return {
        "truncated": clip[: len(clip) // 3],
        "boxes without end": struct.pack(">I4s", 0xFFFFFFF0, b"moov") + clip,
        "cut in the header": clip[: at + 20],
        "wild bytes": wild.tobytes(),
        "twice": clip + clip,
    }


def test_hostile_videos_are_typed_errors(url: str, clip: bytes) -> None:
    with undisturbed(url):
        for name, data in bad_videos(clip).items():
            answer = httpx.post(f"{url}/v1/videos", files={"video": (name, data)}, timeout=60)
            refused(answer, "bad_video")
            assert "/tmp" not in answer.text, name
            refused(post(url, messages=user(shown(data or b" "))), "bad_video")


def test_damaged_videos_are_refused_or_watched_as_far_as_they_go(url: str, clip: bytes) -> None:
    with undisturbed(url):
        for name, data in damaged_videos(clip).items():
            answer = httpx.post(f"{url}/v1/videos", files={"video": (name, data)}, timeout=60)
            if answer.status_code == 200:
                last = [line for line in answer.text.splitlines() if line.startswith("event: ")][-1]
                assert last in ("event: session.ended", "event: error"), name
            else:
                refused(answer, "bad_video")


def test_a_video_with_too_many_pixels_is_refused_by_its_header(url: str, tmp_path: Path) -> None:
    data = make_clip(tmp_path / "wide.mp4", 2, side=1056)
    refused(httpx.post(f"{url}/v1/videos", files={"video": ("wide.mp4", data)}), "bad_video")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": NaN}',
        b'{"model": "videollm-online", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "videollm-online", "messages": "all"}',
        b'{"model": "videollm-online", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}',
        b'{"model": "videollm-online", "messages": [{"role": "user", "content": [{"type": ["text"]}]}]}',
        b'{"model": "videollm-online", "temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "videollm-online", "seed": 1e400, "messages": [{"role": "user", "content": "a"}]}',
        b"\xff\xfe\x00",
        json.dumps({"model": "\0" * 100, "messages": [{"role": "user", "content": "a"}]}).encode(),
        json.dumps({"model": "a\n" * 200, "messages": []}).encode(),
    ],
)
def test_hostile_json_is_a_typed_error(url: str, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/streams"):
        answer = httpx.post(f"{url}{path}", content=body, headers={"content-type": "application/json"})
        refused(answer, "bad_json", "bad_value", "bad_request", "unknown_field", "model_not_found", "url_refused")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\n\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", FIELD % b"\xff\xfe" + b"--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=video; filename=a\r\n"),
        ("multipart/form-data; boundary=" + "b" * 10_000, b"x"),
        ("multipart/form-data; boundary=b", FIELD % b"video" * 2000 + b"--b--"),
        ("application/x-www-form-urlencoded", b"video=1&" * 1000),
        ("text/plain", b"video"),
    ],
)  # fmt: skip
def test_garbage_for_a_form_is_a_typed_error(url: str, kind: str, body: bytes) -> None:
    for path in ("/v1/videos", "/v1/chat/completions"):
        answer = httpx.post(f"{url}{path}", content=body, headers={"content-type": kind})
        refused(answer, "bad_value", "bad_request", "bad_json", "error")


def test_bodies_that_are_too_large_are_refused_before_they_are_read(url: str) -> None:
    big = b"x" * (3 << 20)
    for path in ("/v1/chat/completions", "/v1/streams", "/v1/videos"):
        answer = httpx.post(f"{url}{path}", content=big)
        assert answer.status_code == 413
        refused(answer, "too_big")
    middle = b"x" * (3 << 19)
    refused(httpx.post(f"{url}/v1/streams", content=middle), "too_big")
    refused(httpx.post(f"{url}/v1/chat/completions", content=middle), "bad_request", "bad_value", "bad_json")


def test_very_many_parts_and_mistakes_have_one_answer(url: str) -> None:
    def asked(part: dict[str, str], count: int) -> httpx.Response:
        body = {"model": "videollm-online", "messages": [{"role": "user", "content": [part] * count}]}
        return httpx.post(f"{url}/v1/chat/completions", json=body)

    too_many = asked({"type": "text", "text": "?"}, 257)
    assert too_many.status_code == 422
    assert "256" in too_many.text
    wrong = asked({"type": "text"}, 200)
    refused(wrong, "bad_value")
    assert "fields or items of this request are wrong" in wrong.text


def test_a_body_that_drips_is_given_up(url: str) -> None:
    """Headers, a byte, then nothing: the server answers on its own and closes."""
    parts = urlsplit(url)
    with undisturbed(url), socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        answer = connection.recv(65536)
    assert b" 408 " in answer.split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("key", "path", "kind", "begins"),
    [
        ("flooding", "/v1/chat/completions", "application/json", "{"),
        ("flooding", "/v1/videos", "multipart/form-data; boundary=b", "-"),
        ("flooding", "/v1/streams", "application/json", "{"),
    ],
)
def test_a_flood_of_requests_is_refused_and_other_keys_are_served(
    tiny: dict[str, object], redis_url: str, key: str, path: str, kind: str, begins: str
) -> None:
    """Bodies that drip hold as many requests as a key may have open, and no more."""
    slow = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: 1000\r\n\r\n{begins}"
    )
    flooding, quiet = ({"Authorization": f"Bearer {name}"} for name in (key, "quiet"))
    with running(tiny, redis_url, ["flooding", "quiet"], requests_per_key=3) as app, ExitStack() as stack:
        parts = urlsplit(app.url)
        other = stack.enter_context(live(app.url, **quiet))
        other.configure(video={"drop_policy": "block"})
        other.frame(0)
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=30))
            connection.sendall(slow.encode())
        deadline = time.monotonic() + 30
        while (answer := httpx.get(f"{app.url}/v1/models", headers=flooding)).status_code != 429:
            assert time.monotonic() < deadline, answer.text
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        refused(answer, "too_many_requests")
        for _ in range(5):
            assert httpx.get(f"{app.url}/v1/models", headers=quiet).status_code == 200
        other.frame(0.5)
        other.end()
        assert other.decided() == [(0, 0.0), (1, 0.5)]


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/streams", "/v1/chat/completions"])
def test_the_body_of_a_stranger_is_not_waited_for(tiny: dict[str, object], redis_url: str, path: str) -> None:
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer wrong\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n-"
    )
    with application(tiny, redis_url, api_key="secret") as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
            connection.sendall(request.encode())
            answer = connection.recv(65536)
    assert b" 401 " in answer.split(b"\r\n")[0]


@pytest.mark.parametrize("video_time", [-1, "NaN", "Infinity", "soon", True, 1e10])
def test_times_that_are_none_are_refused(url: str, clip: bytes, video_time: object) -> None:
    part = {"type": "text", "text": "?", "video_time": video_time}
    refused(post(url, messages=user(shown(clip), part)), "bad_value", "bad_time")
    form = {"question": "?", "question_time": str(video_time)}
    refused(httpx.post(f"{url}/v1/videos", files={"video": ("a.mp4", clip)}, data=form), "bad_value", "bad_time")


@pytest.mark.parametrize(
    "stream_id", ["..%2f..%2fetc", "a" * 2000, "%00", "sess_x%0d%0aX: 1", "{replicas}:reports", "%F0%9F%90%87"]
)
def test_foreign_ids_are_not_found(url: str, stream_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        answer = httpx.request(method, f"{url}/v1/streams/{stream_id}{path}")
        refused(answer, "not_found", "bad_method")


def test_every_route_lists_its_errors_and_every_schema_is_there(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    references = set(_references(document))
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= set(schemas)
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            where = f"{method} {path}"
            assert route["description"], where
            assert {"401", "500"} <= set(route["responses"]), where
            for status, response in route["responses"].items():
                if int(status) >= 400:
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, f"{where} {status}"
            if "requestBody" in route:
                assert {"413", "422"} <= set(route["responses"]), where


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def test_base64_that_is_none_and_data_urls_of_other_kinds(url: str) -> None:
    for bad in (
        "data:image/png;base64,%%%",
        "data:text/html;base64,AAAA",
        "data:image/png",
        "javascript:alert(1)",
        "data:",
    ):
        part = {"type": "image_url", "image_url": {"url": bad}}
        refused(post(url, messages=user(part)), "bad_url", "url_refused")
