"""Hostile input on the WebSocket: each its typed error, the server alive, and nothing of it in another's session."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
from application import Application, running
from live_client import LiveClient, live, picture
from PIL import Image

from serve.client_events import pack_binary
from serve.server_events import ErrorEvent, FrameDecided, SessionCreated, SessionUpdated, TextDone, VideoStatus

FRAMES = 6
TIE = 1e-4  # batches of other sizes round differently


@pytest.fixture(scope="module")
def app(tiny: dict[str, object], redis_url: str) -> Iterator[Application]:
    with running(
        tiny, redis_url, frame_pixels=1_000_000, messages_per_s=50, messages_burst=100, message_bytes=256 << 10
    ) as application:
        yield application


def watch(client: LiveClient, first: int = 0, last: int = FRAMES) -> None:
    if first == 0:
        client.configure(max_output_tokens=3, video={"drop_policy": "block"})
        client.ask("What is there?", video_time=0.5)
    for index in range(first, last):
        client.frame(index / 2, picture(40 * index))


def outcome(client: LiveClient) -> tuple[list[float], list[str]]:
    """What a session decided and said."""
    client.end()
    return [event.p_silent for event in client.all(FrameDecided)], [event.text for event in client.all(TextDone)]


@pytest.fixture(scope="module")
def undisturbed(app: Application) -> tuple[list[float], list[str]]:
    with live(app.url) as client:
        watch(client)
        return outcome(client)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, with hardly any data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def animation(form: str) -> bytes:
    frames = [Image.fromarray(np.full((32, 32, 3), shade, np.uint8)) for shade in (0, 90, 180)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def item(**fields: object) -> str:
    return json.dumps({"type": "conversation.item.create", "item": fields})


def update(**session: object) -> str:
    return json.dumps({"type": "session.update", "session": session})


WEBP_BOMB = b"RIFF\x00\x01\x00\x00WEBPVP8X" + bytes(8) + b"\xff\xff\x3f" * 2 + bytes(20)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
GREY = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
TEXTS: dict[str, tuple[str, str]] = {
    "deep arrays": ("[" * 50_000, "bad_json"),
    "deep objects": ('{"a":' * 20_000, "bad_json"),
    "deep where a value belongs": (f'{{"type":"session.update","session":{"[" * 50 + "]" * 50}}}', "bad_value"),
    "no object": ("[1, 2]", "bad_value"),
    "nothing": ("", "bad_json"),
    "null": ("null", "bad_value"),
    "lone surrogate": ('{"type":"conversation.item.create","item":{"id":"\\ud800","content":[]}}', "bad_json"),
    "surrogate in a question": (item(content=[]).replace("[]", '[{"type":"input_text","text":"\\udc00"}]'), "bad_json"),
    "not a number": ('{"type":"input_video_buffer.append","video_time":NaN,"image":"AAAA"}', "bad_time"),
    "infinite": ('{"type":"input_video_buffer.append","video_time":1e999,"image":"AAAA"}', "bad_time"),
    "negative time": ('{"type":"input_video_buffer.append","video_time":-1,"image":"AAAA"}', "bad_time"),
    "time as text": ('{"type":"input_video_buffer.append","video_time":"soon","image":"AAAA"}', "bad_time"),
    "huge integer": (update(max_output_tokens=10**400), "bad_value"),
    "wrong member of a union": (item(content=[{"type": "input_audio", "audio": "AAAA"}]), "bad_value"),
    "two members of a union": (item(content=[{"type": "input_text", "text": "a", "image_url": "b"}]), "unknown_field"),
    "type of another kind": ('{"type":7}', "unknown_type"),
    "another server's type": ('{"type":"input_audio_buffer.append","audio":"AAAA"}', "unknown_type"),
    "unknown field": (update(threshhold=1), "unknown_field"),
    "threshold that is none": (update(video={"threshold": float("nan")}), "bad_value"),
    "window that ends before it begins": (update(video={"window": {"trigger": 0}}), "bad_value"),
    "hotter than hot": (update(temperature=2.5), "bad_value"),
    "nothing to draw from": (update(top_p=0), "bad_value"),
    "penalty that divides by nothing": (update(repetition_penalty=0), "bad_value"),
    "huge seed": (update(seed=1 << 63), "bad_value"),
    "frames a second": (update(video={"fps": 1e9}), "bad_value"),
    "id with a line break": (item(id="a\nb", content=[{"type": "input_text", "text": "?"}]), "bad_value"),
    "huge id": (item(id="x" * 10_000, content=[{"type": "input_text", "text": "?"}]), "bad_value"),
    "huge event id": (json.dumps({"type": "response.cancel", "event_id": "x" * 10_000}), "bad_value"),
    "question of blanks": (item(content=[{"type": "input_text", "text": " \n "}]), "bad_value"),
    "long question": (item(content=[{"type": "input_text", "text": "x" * 5000}]), "question_too_long"),
    "long instructions": (update(instructions="x" * 9000), "bad_value"),
    "many parts": (item(content=[{"type": "input_text", "text": "?"}] * 100), "bad_value"),
    "picture by address": (item(content=[{"type": "input_image", "image_url": "http://10.0.0.1/a.jpg"}]), "bad_frame"),
    "picture of the disk": (item(content=[{"type": "input_image", "image_url": "file:///etc/passwd"}]), "bad_frame"),
    "picture that is no base64": ('{"type":"input_video_buffer.append","video_time":99,"image":"%%%"}', "bad_frame"),
    "large message": (json.dumps({"type": "response.cancel", "event_id": "x" * 300_000}), "too_big"),
}
BINARIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bad_frame"),
    "short header": (b"\x01\x00\x00", "bad_frame"),
    "header alone": (pack_binary(90.0, b""), "bad_frame"),
    "wrong version": (b"\x02" + pack_binary(90.0, picture())[1:], "bad_frame"),
    "not a number": (pack_binary(float("nan"), picture()), "bad_time"),
    "infinite": (pack_binary(float("inf"), picture()), "bad_time"),
    "negative": (pack_binary(-0.5, picture()), "bad_time"),
    "backwards": (pack_binary(0.0, picture()), "bad_time"),
    "no picture": (pack_binary(90.0, b"just words"), "bad_frame"),
    "truncated header": (pack_binary(90.0, picture()[:30]), "bad_frame"),
    "bomb": (pack_binary(90.0, png(60_000, 60_000)), "bad_frame"),
    "bomb of WebP": (pack_binary(90.0, WEBP_BOMB), "bad_frame"),
    "larger than allowed": (pack_binary(90.0, encoded(GREY.resize((1001, 1000)), "JPEG")), "bad_frame"),
    "animated WebP": (pack_binary(90.0, animation("WEBP")), "bad_frame"),
    "animated PNG": (pack_binary(90.0, animation("PNG")), "bad_frame"),
    "animated GIF": (pack_binary(90.0, animation("GIF")), "bad_frame"),
    "BMP": (pack_binary(90.0, encoded(GREY, "BMP")), "bad_frame"),
    "TIFF": (pack_binary(90.0, encoded(GREY, "TIFF")), "bad_frame"),
    "SVG": (pack_binary(90.0, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "bad_frame"),
    "PDF before a JPEG": (pack_binary(90.0, b"%PDF-1.4\n" + picture()), "bad_frame"),
    "large": (pack_binary(90.0, picture() + bytes(300_000)), "too_big"),
}  # fmt: skip
TAKEN: dict[str, bytes] = {
    "CMYK": encoded(GREY.convert("CMYK"), "JPEG"),
    "1x100000": encoded(Image.new("L", (1, 100_000)), "PNG"),
    "100000x1": encoded(Image.new("L", (100_000, 1)), "PNG"),
    "one pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
    "16 bits of grey": encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"),
    "one bit": encoded(GREY.convert("1"), "PNG"),
    "transparent": encoded(GREY.convert("RGBA"), "WEBP"),
    "a JPEG that is also an archive": picture() + b"PK\x03\x04" + bytes(50),
}
SKIPPED: dict[str, bytes] = {
    "truncated JPEG": encoded(GREY, "JPEG")[:-20],
    "truncated PNG": encoded(NOISE, "PNG")[:-4000],
    "PNG without data": png(200, 200),
}  # fmt: skip


def refused(client: LiveClient, message: str | bytes) -> ErrorEvent:
    client.socket.send(message)
    return client.until(ErrorEvent)


def check_texts(client: LiveClient, names: list[str]) -> None:
    for name in names:
        text, code = TEXTS[name]
        error = refused(client, text).error
        assert (name, error.code, error.type) == (name, code, "invalid_request_error")
        assert len(error.message) < 1000


def check_binaries(client: LiveClient, names: list[str]) -> None:
    for name in names:
        data, code = BINARIES[name]
        assert (name, refused(client, data).error.code) == (name, code)


def check_other_entrances(client: LiveClient) -> None:
    """Pictures as base64 and as data URLs instead of in binary messages, with their times."""
    pictures = {
        name: data[9:] for name, (data, code) in BINARIES.items() if code == "bad_frame" and data[:1] == b"\x01"
    }
    assert {"bomb", "truncated header", "animated WebP", "PDF before a JPEG"} <= set(pictures)
    for name, data in pictures.items():
        for message in as_base64(91, data), as_data_url(91, data):
            assert (name, refused(client, message).error.code) == (name, "bad_frame")
    for video_time in (-1, 0, "soon", None, True, [1], 1e10, 10**400):
        error = refused(client, as_base64(video_time, picture())).error
        assert (video_time, error.code) == (video_time, "bad_time")
        question = item(content=[{"type": "input_text", "text": "?", "video_time": video_time}])
        if video_time not in (0, None):  # of a question: at once, and now
            assert (video_time, refused(client, question).error.code) == (video_time, "bad_time")


def as_base64(video_time: object, data: bytes) -> str:
    image = base64.b64encode(data).decode()
    return json.dumps({"type": "input_video_buffer.append", "video_time": video_time, "image": image})


def as_data_url(video_time: object, data: bytes) -> str:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return item(content=[{"type": "input_image", "image_url": url, "video_time": video_time}])


def check_pictures(client: LiveClient) -> None:
    client.ask("And these?", video_time=1000)
    decided = len(client.all(FrameDecided))
    for index, (name, data) in enumerate(TAKEN.items()):
        client.frame(100 + index, data)
        assert (name, client.until(FrameDecided).video_time) == (name, 100 + index)
    assert len(client.all(FrameDecided)) == decided + len(TAKEN)
    for index, (name, data) in enumerate(SKIPPED.items()):
        client.frame(200 + index, data)
        error = client.until(ErrorEvent).error
        assert (name, error.code, error.video_time) == (name, "frame_skipped", 200 + index)


def beside(app: Application, undisturbed: tuple[list[float], list[str]], attack: Callable[[LiveClient], None]) -> None:
    """Run an attack in the middle of another session: that one must not notice, the attacker's must go on."""
    with live(app.url) as other, live(app.url) as client:
        watch(other, 0, FRAMES // 2)
        client.configure(max_output_tokens=3, video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        attack(client)
        client.frame(500)
        client.end()
        assert client.decided()[-1][1] == 500
        watch(other, FRAMES // 2)
        decisions, texts = outcome(other)
    assert decisions == pytest.approx(undisturbed[0], abs=TIE)
    assert texts == undisturbed[1]
    assert not other.all(ErrorEvent)


def test_a_few_of_every_kind_are_refused(app: Application, undisturbed: tuple[list[float], list[str]]) -> None:
    def attack(client: LiveClient) -> None:
        check_texts(client, ["deep arrays", "lone surrogate", "not a number", "huge id", "picture by address"])
        check_binaries(client, ["short header", "wrong version", "not a number", "bomb", "animated WebP"])

    beside(app, undisturbed, attack)


@pytest.mark.slow
def test_all_texts_are_refused(app: Application, undisturbed: tuple[list[float], list[str]]) -> None:
    beside(app, undisturbed, lambda client: check_texts(client, list(TEXTS)))


@pytest.mark.slow
def test_all_binaries_are_refused(app: Application, undisturbed: tuple[list[float], list[str]]) -> None:
    beside(app, undisturbed, lambda client: check_binaries(client, list(BINARIES)))


@pytest.mark.slow
def test_pictures_and_times_are_refused_by_every_entrance(
    app: Application, undisturbed: tuple[list[float], list[str]]
) -> None:
    beside(app, undisturbed, check_other_entrances)


@pytest.mark.slow
def test_odd_pictures_are_seen_and_damaged_ones_skipped(
    app: Application, undisturbed: tuple[list[float], list[str]]
) -> None:
    beside(app, undisturbed, check_pictures)


@pytest.mark.slow
def test_a_flood_of_messages_is_refused_and_the_session_goes_on(
    app: Application, undisturbed: tuple[list[float], list[str]]
) -> None:
    def attack(client: LiveClient) -> None:
        for _ in range(3000):
            client.socket.send("{")
        while client.until(ErrorEvent).error.code != "rate_limited":
            pass
        assert client.events[-1].error.type == "rate_limit_error"  # type: ignore[attr-defined]
        with suppress(TimeoutError):  # a refusal a second is told as long as there is something to refuse
            while client.until(ErrorEvent, within_s=3):
                pass
        client.configure()
        client.until(SessionUpdated)

    beside(app, undisturbed, attack)


def test_frames_beyond_the_rate_are_dropped_and_counted(tiny: dict[str, object], redis_url: str) -> None:
    with running(tiny, redis_url, frames_per_s=0.001, frames_burst=5) as app, live(app.url) as client:
        client.configure(video={"drop_policy": "block"})
        for index in range(50):
            client.frame(index)
        while (status := client.until(VideoStatus).frames).received < 50:
            pass
        client.end()
    assert status.dropped_by == {"rate": 45}
    assert [seq for seq, _ in client.decided()] == list(range(5))
    assert "rate_limited" in {event.error.code for event in client.all(ErrorEvent)}


@pytest.mark.slow
def test_half_open_connections_and_storms_of_others_disturb_nobody(
    app: Application, undisturbed: tuple[list[float], list[str]]
) -> None:
    host, port = app.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(100)]
    for number, connection in enumerate(idle):
        connection.send(b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"x" * number)

    def attack(_: LiveClient) -> None:
        for _ in range(100):
            with live(app.url) as visitor:
                visitor.until(SessionCreated)
                visitor.vanish()

    try:
        beside(app, undisturbed, attack)
    finally:
        for connection in idle:
            connection.close()
