"""`python -m serve.replay RECORDING --url URL`: a recorded session once more, and whether it goes the same way.

Frames are shown without a drop, questions and settings come after the same frames as they did. With the
same model and settings the log's events are the same, up to where a response was interrupted: how far it
had got is a matter of time. So are the session's id, and into how many log entries decisions are put
together, which moves positions: these are not compared. Exit status 1 when something differs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import sys
from pathlib import Path

import websockets
from websockets.asyncio.client import ClientConnection

from actors.messages import SessionSettings
from serve.client_events import pack_binary
from serve.keys import API_KEY_VARIABLE
from serve.preferences import SAMPLING
from serve.recording import Asked, Changed, Finished, Interrupted, Opened, RecordingError, Shown, Told, read
from serve.server_events import (
    ErrorEvent,
    FrameDecided,
    ServerEvent,
    SessionCreated,
    SessionEnded,
    VideoStatus,
    parse_event,
)

AHEAD = 16
QUIET_S = 120.0
ROUNDING = 1e-4  # of P(silent) in batches of other sizes


class ReplayError(RuntimeError):
    """The recording cannot be played; says why."""


class Player:
    """One session that is given what a recording holds."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.told: list[ServerEvent] = []
        self.sent = 0
        self._admitted = self._decided = 0

    async def play(self, lines: list[Shown | Asked | Changed | Interrupted | Finished]) -> list[ServerEvent]:
        """The events of the log. Raises ReplayError when the server refuses something or says nothing."""
        for line in lines:
            match line:
                case Shown(video_time=video_time, image=image):
                    while self.sent - self._decided >= AHEAD:
                        await self._listen()
                    await self.socket.send(pack_binary(video_time, base64.b64decode(image)))
                    self.sent += 1
                case Asked():
                    await self._all_admitted()
                    part = {"type": "input_text", "text": line.text, "video_time": line.video_time}
                    item = {"id": line.id, "content": [part]}
                    await self.say({"type": "conversation.item.create", "item": item})
                case Changed(settings=settings):
                    await self._all_admitted()
                    await self.say({"type": "session.update", "session": as_patch(settings)})
                case Interrupted():
                    await self._all_admitted()
                    await self.say({"type": "response.cancel"})
                case Finished():
                    await self.say({"type": "input_video_buffer.end"})
        while not (self.told and isinstance(self.told[-1], SessionEnded)):
            await self._listen()
        return self.told

    async def say(self, message: dict[str, object]) -> None:
        await self.socket.send(json.dumps(message))

    async def _all_admitted(self) -> None:
        while self._admitted < self.sent:
            await self._listen()

    async def _listen(self) -> None:
        try:
            async with asyncio.timeout(QUIET_S):
                event = parse_event(await self.socket.recv())
        except TimeoutError:
            raise ReplayError(f"the server said nothing for {QUIET_S:g} s") from None
        if isinstance(event, VideoStatus):
            self._admitted, self._decided = event.frames.admitted, event.frames.decided + event.frames.skipped
        elif event.position is not None:
            self.told.append(event)
        elif isinstance(event, ErrorEvent):
            raise ReplayError(f"the server refused what was recorded: {event.error.code}: {event.error.message}")


async def replay(path: Path, url: str, key: str | None = None) -> tuple[list[ServerEvent], list[ServerEvent]]:
    """The events that were recorded and those of now, both without the session's id. Raises RecordingError."""
    lines = read(path)
    opened = next(line for line in lines if isinstance(line, Opened))
    inputs = [line for line in lines if isinstance(line, Shown | Asked | Changed | Interrupted | Finished)]
    if not any(isinstance(line, Finished) for line in inputs):
        inputs.append(Finished())
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = f"{url.replace('http', 'ws', 1)}/v1/realtime"
    async with websockets.connect(address, additional_headers=headers, max_size=16 << 20) as socket:
        created = parse_event(await socket.recv())
        if not isinstance(created, SessionCreated):
            raise ReplayError(f"the server began with {created.type}, expected session.created: {created.json_text()}")
        player = Player(socket)
        patch = as_patch(opened.settings)
        video = {**_mapping(patch["video"]), "drop_policy": "block"}
        await player.say({"type": "session.update", "session": {**patch, "include": opened.include, "video": video}})
        told = await player.play(inputs)
    recorded = [line.event for line in lines if isinstance(line, Told)]
    return [_anonymous(event, path.stem) for event in recorded], [
        _anonymous(event, created.session.id) for event in told
    ]


def as_patch(settings: SessionSettings) -> dict[str, object]:
    """Settings as a client would ask for them."""
    window = {
        name: value
        for name, value in {"trigger": settings.window_trigger, "keep": settings.window_keep}.items()
        if value is not None
    }
    video: dict[str, object] = {"fps": settings.fps, "threshold": settings.threshold}
    patch: dict[str, object] = {
        "max_output_tokens": settings.max_response_tokens,
        **settings.model_dump(include=SAMPLING),
        "video": video | ({"window": window} if window else {}),
    }
    return patch | ({"instructions": settings.instructions} if settings.instructions is not None else {})


def difference(recorded: list[ServerEvent], told: list[ServerEvent]) -> str | None:
    """Where they differ first, None when they are the same."""
    for before, now in zip(recorded, told, strict=False):
        if _content(before) != _content(now) or abs(_p_silent(before) - _p_silent(now)) > ROUNDING:
            return f"recorded: {before.json_text()}\nreplayed: {now.json_text()}"
    if len(recorded) > len(told):
        return f"{len(recorded)} events were recorded, {len(told)} came: {recorded[len(told)].json_text()} is missing"
    return None if len(recorded) == len(told) else f"more came than was recorded: {told[len(recorded)].json_text()}"


def _content(event: ServerEvent) -> dict[str, object]:
    """What of an event is no matter of the run."""
    return event.model_dump(
        exclude={
            "frames": True,
            "position": True,
            "event_id": True,
            "p_silent": True,
            "session": {"video": {"drop_policy"}},
        }
    )


def _p_silent(event: ServerEvent) -> float:
    return event.p_silent if isinstance(event, FrameDecided) else 0.0


def _anonymous(event: ServerEvent, session_id: str) -> ServerEvent:
    return parse_event(event.model_dump_json().replace(session_id, "session"))


def _mapping(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.replay", description="Play a recorded session again.")
    parser.add_argument("recording", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    options = parser.parse_args(arguments)
    try:
        recorded, told = asyncio.run(replay(options.recording, options.url, os.environ.get(API_KEY_VARIABLE)))
    except (RecordingError, ReplayError, OSError, websockets.WebSocketException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = difference(recorded, told)
    print(found or f"{len(told)} events, all as recorded")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
