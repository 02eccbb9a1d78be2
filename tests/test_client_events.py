"""What clients say is read strictly: the good is understood, the bad is named."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.client_events import (
    CLIENT_TYPES,
    ClientError,
    ConversationItemCreate,
    SessionUpdate,
    VideoAppend,
    pack_binary,
    parse_binary,
    parse_text,
    picture_bytes,
)

GOOD = [
    {"type": "session.update", "session": {"instructions": "Be brief.", "video": {"fps": 2, "threshold": 0.5}}},
    {
        "type": "conversation.item.create",
        "event_id": "e1",
        "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What now?"}]},
    },
    {"type": "input_video_buffer.append", "video_time": 0.5, "image": "AAAA"},
    {"type": "input_video_buffer.end"},
    {"type": "response.create", "response": {"instructions": "Say more."}},
    {"type": "response.cancel"},
]


@pytest.mark.parametrize("message", GOOD, ids=[str(message["type"]) for message in GOOD])
def test_every_client_message_is_understood(message: dict[str, object]) -> None:
    assert parse_text(json.dumps(message)).type == message["type"]


def test_the_list_of_types_is_complete() -> None:
    assert sorted(CLIENT_TYPES) == sorted(str(message["type"]) for message in GOOD)


def test_fields_arrive_as_they_were_sent() -> None:
    update, item, append = (parse_text(json.dumps(message)) for message in GOOD[:3])
    assert isinstance(update, SessionUpdate)
    assert update.session.video is not None
    assert (update.session.video.fps, update.session.video.threshold) == (2, 0.5)
    assert isinstance(item, ConversationItemCreate)
    assert item.item.content[0].video_time is None
    assert isinstance(append, VideoAppend)
    assert append.video_time == 0.5


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("{", "bad_json", "JSON"),
        ("[" * 10_000, "bad_json", "JSON"),
        ('"hello"', "bad_value", "message"),
        ('{"type": "session.create"}', "unknown_type", "session.create"),
        ("{}", "unknown_type", "session.update"),
        ('{"type": "session.update", "session": {"fps": 2}}', "unknown_field", "session.fps"),
        ('{"type": "session.update", "session": {"video": {"fps": "fast"}}}', "bad_value", "'fast'"),
        ('{"type": "session.update", "session": {"video": {"fps": 0}}}', "bad_value", "greater than 0"),
        (
            '{"type": "session.update", "session": {"video": {"drop_policy": "oldest"}}}',
            "bad_value",
            "'latest' or 'block'",
        ),
        ('{"type": "input_video_buffer.append", "video_time": NaN, "image": ""}', "bad_time", "finite"),
        ('{"type": "input_video_buffer.append", "video_time": -1, "image": ""}', "bad_time", "-1"),
        ('{"type": "input_video_buffer.append", "image": ""}', "bad_time", "video_time is missing"),
        ('{"type": "conversation.item.create", "item": {"content": []}}', "bad_value", "content"),
        ('{"type": "conversation.item.create", "item": {"content": [{"type": "audio"}]}}', "bad_value", "input_text"),
        ('{"type": "conversation.item.create", "item": {"id": "a\\nb", "content": []}}', "bad_value", "id"),
        ('{"type": "response.cancel", "response_id": "\\ud800"}', "bad_json", "hex escape"),
    ],
)
def test_a_bad_message_is_refused_by_name(text: str, code: str, says: str) -> None:
    with pytest.raises(ClientError, match=says) as refused:
        parse_text(text)
    assert refused.value.code == code


def test_a_refusal_names_the_clients_own_event() -> None:
    with pytest.raises(ClientError) as refused:
        parse_text('{"type": "nonsense", "event_id": "mine"}')
    assert refused.value.event_id == "mine"


def test_a_refusal_does_not_repeat_a_long_message() -> None:
    with pytest.raises(ClientError) as refused:
        parse_text(json.dumps({"type": "session.update", "session": "x" * 100_000}))
    assert len(str(refused.value)) < 300


@given(st.floats(0, 1e9), st.binary(min_size=1))
def test_a_binary_frame_comes_back_as_it_was_packed(video_time: float, image: bytes) -> None:
    assert parse_binary(pack_binary(video_time, image)) == (video_time, image)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"\x01" + bytes(8), "9 bytes"),
        (b"\x02" + bytes(9), "version 2, expected 1"),
        (struct.pack(">Bd", 1, float("nan")) + b"x", "nan"),
        (struct.pack(">Bd", 1, float("inf")) + b"x", "inf"),
        (struct.pack(">Bd", 1, -0.5) + b"x", "-0.5"),
    ],
)
def test_a_bad_binary_frame_is_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says):
        parse_binary(data)


def test_pictures_come_as_base64_or_data_url() -> None:
    encoded = base64.b64encode(b"picture").decode()
    assert picture_bytes(encoded, "image") == b"picture"
    assert picture_bytes(f"data:image/png;base64,{encoded}", "image_url") == b"picture"


@pytest.mark.parametrize(
    "text", ["https://example.org/a.png", "data:text/html;base64,AAAA", "data:image/png,raw", "%%%"]
)
def test_anything_else_is_no_picture(text: str) -> None:
    with pytest.raises(ClientError) as refused:
        picture_bytes(text, "image_url")
    assert refused.value.code == "bad_frame"


@given(st.text(), st.binary(max_size=64))
def test_garbage_is_refused_and_nothing_else_is_raised(text: str, data: bytes) -> None:
    for parse, message in ((parse_text, text), (parse_binary, data)):
        try:
            parse(message)  # type: ignore[operator]
        except ClientError:
            continue
