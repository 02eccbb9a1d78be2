"""A client of `/v1/realtime` for tests: says things, collects events until one of a kind comes."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlencode

import httpx
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from actors.video import encode_jpeg
from serve.client_events import pack_binary
from serve.server_events import ErrorEvent, FrameDecided, ServerEvent, SessionEnded, parse_event

DEADLINE_S = 60.0

EventT = TypeVar("EventT", bound=ServerEvent)


class LiveClient:
    """One session. Events are kept in `events` in the order in which they came."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.events: list[ServerEvent] = []

    def say(self, message: dict[str, object]) -> None:
        self.socket.send(json.dumps(message))

    def configure(self, **session: object) -> None:
        """All decisions are wanted, responses are short, unless said otherwise."""
        self.say(
            {"type": "session.update", "session": {"include": ["frame_decided"], "max_output_tokens": 2, **session}}
        )

    def ask(self, text: str, video_time: float | None = None, item_id: str | None = None) -> None:
        part = {"type": "input_text", "text": text} | ({} if video_time is None else {"video_time": video_time})
        item = {"content": [part]} | ({} if item_id is None else {"id": item_id})
        self.say({"type": "conversation.item.create", "item": item})

    def frame(self, video_time: float, image: bytes | None = None) -> None:
        self.socket.send(pack_binary(video_time, picture() if image is None else image))

    def end(self) -> SessionEnded:
        """No more frames; everything up to the end of the session."""
        self.say({"type": "input_video_buffer.end"})
        return self.until(SessionEnded)

    def until(self, *kinds: type[EventT], within_s: float = DEADLINE_S) -> EventT:
        """The next event of a kind. Raises TimeoutError."""
        deadline = time.monotonic() + within_s
        while True:
            event = parse_event(self.socket.recv(timeout=max(0.0, deadline - time.monotonic())))
            self.events.append(event)
            if isinstance(event, kinds):
                return event

    def all(self, kind: type[EventT]) -> list[EventT]:
        """Events of a kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def decided(self) -> list[tuple[int, float]]:
        """Frames decided so far, as they came: number and time."""
        return [(event.seq, event.video_time) for event in self.all(FrameDecided)]

    def closed(self) -> tuple[int, str]:
        """The close code, and the code of the last error, once the server has closed. Fails after a minute."""
        try:
            self.until(NoEvent)
        except ConnectionClosed as closed:
            errors = self.all(ErrorEvent)
            return closed.rcvd.code if closed.rcvd else 1006, errors[-1].error.code if errors else ""
        raise AssertionError("an event of no kind came")

    def vanish(self) -> None:
        """Cut the connection as a broken network would: no close frame."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    @property
    def logged(self) -> list[ServerEvent]:
        """Events so far that stem from the log."""
        return [event for event in self.events if event.position is not None]


class NoEvent(ServerEvent):
    """Never comes."""


@contextmanager
def live(url: str, session_id: str | None = None, after: int | None = None, **headers: str) -> Iterator[LiveClient]:
    """A session of the server at `url`, a new one or one to go on with; the connection closes with the block."""
    wanted = {name: value for name, value in {"session_id": session_id, "after": after}.items() if value is not None}
    address = f"{url.replace('http', 'ws', 1)}/v1/realtime?{urlencode(wanted)}"
    with connect(address, additional_headers=headers, max_size=None, close_timeout=5) as socket:
        yield LiveClient(socket)


def post_video(url: str, video: bytes, **form: object) -> list[ServerEvent]:
    """The events of a posted video, to the last."""
    with httpx.Client(timeout=DEADLINE_S) as client:
        answer = client.post(f"{url}/v1/videos", files={"video": ("clip.mp4", video)}, data=form)
        answer.raise_for_status()
        return [parse_event(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def picture(shade: int = 128) -> bytes:
    """A small grey JPEG."""
    return encode_jpeg(np.full((32, 32, 3), shade, np.uint8))
