"""The schema of the WebSocket's messages, against what is really said there."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest
from application import application
from jsonschema import Draft202012Validator, ValidationError
from live_client import live

from serve.client_events import CLIENT_TYPES
from serve.schema import realtime_schema
from serve.server_events import ErrorEvent, FrameDecided, SessionCreated

SCHEMA = realtime_schema()


def validator(side: str) -> Draft202012Validator:
    schema = SCHEMA[side]
    assert isinstance(schema, dict)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_what_is_said_in_a_session_is_as_the_schema_says(
    tiny: dict[str, object], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, told = list[dict[str, object]](), list[dict[str, object]]()
    with application(tiny, redis_url) as url, live(url) as client:
        send, receive = client.socket.send, client.socket.recv

        def sending(message: str | bytes) -> None:
            if isinstance(message, str):
                said.append(json.loads(message))
            send(message)

        def receiving(timeout: float) -> str:
            text = receive(timeout=timeout)
            told.append(json.loads(text))
            return str(text)

        monkeypatch.setattr(client.socket, "send", sending)
        monkeypatch.setattr(client.socket, "recv", receiving)
        client.configure(instructions="Be brief.", video={"threshold": 0.5, "drop_policy": "block"})
        client.ask("What is there?", video_time=0.5)
        for index in range(4):
            client.frame(index / 2)
        client.frame(1)
        client.until(ErrorEvent)
        client.say({"type": "response.create"})
        client.say({"type": "response.cancel"})
        client.say({"type": "input_video_buffer.append", "video_time": 9, "image": "AAAA"})
        client.say({"type": "session.update", "session": {"video": {"threshold": 0.25, "window": {"trigger": 500}}}})
        client.end()
    for message in said:
        validator("client").validate(message)
    for event in told:
        validator("server").validate(event)
    assert {event["type"] for event in told} >= {
        "session.created", "session.updated", "input_video_buffer.status", "frame_decided", "conversation.item.added",
        "response.created", "response.output_text.delta", "response.output_text.done", "response.done", "error",
        "session.ended",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("client", {"type": "session.update"}),
        ("client", {"type": "session.update", "session": {"video": {"fps": 0}}}),
        ("client", {"type": "input_video_buffer.append", "video_time": -1, "image": "AAAA"}),
        ("client", {"type": "what"}),
        ("server", {"type": "frame_decided", "seq": 1}),
        ("server", {"type": "error", "error": {"message": "no code"}}),
    ],
)
def test_the_schema_refuses_what_nobody_says(side: str, message: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        validator(side).validate(message)


def test_every_type_of_both_sides_is_in_the_schema() -> None:
    text = json.dumps(SCHEMA)
    names = [*CLIENT_TYPES, SessionCreated.model_fields["type"].default, FrameDecided.model_fields["type"].default]
    assert [name for name in names if f'"{name}"' not in text] == []


def test_the_schema_can_be_fetched_and_printed(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, workers=False) as url:
        assert httpx.get(f"{url}/v1/realtime/schema").json() == SCHEMA
    printed = subprocess.run([sys.executable, "-m", "serve.schema"], capture_output=True, check=True, timeout=60)
    assert json.loads(printed.stdout) == SCHEMA
