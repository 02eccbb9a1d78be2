"""A client's session at a gateway: which settings are in force, and what of an item or a recording is asked when."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
from PIL import Image

from actors.bus import Bus, BusError, SessionMeta
from actors.messages import (
    End,
    InputRefused,
    Interrupt,
    LogEntry,
    Query,
    ResponseStarted,
    SessionSettings,
    SettingsApplied,
    SettingsChange,
)
from actors.session_log import BusConfig
from serve.admission import NoCapacity, owned
from serve.client_events import MOST_PROBLEMS, ClientError, parse_patch, parse_text
from serve.conversation import Conversation
from serve.counts import Counts
from serve.errors import ApiError
from serve.frame_buffer import FrameBuffer
from serve.gateway import Gateway
from serve.limits import LimitsConfig
from serve.metrics import GatewayMeters
from serve.outgoing import SlowReader
from serve.realtime import Closing, Connection
from serve.recorded import Question, Recording, _supply, check_video, pictures_of_images

pytestmark = pytest.mark.anyio

SETTINGS = SessionSettings()


class Log:
    """A bus on which one session has the log entries that a test puts there, and its input is only remembered."""

    config = BusConfig(max_pending_inputs=4)

    def __init__(self) -> None:
        self.entries_to_come: asyncio.Queue[tuple[int, LogEntry]] = asyncio.Queue()
        self.sent: list[Any] = []
        self.notes: dict[str, str] = {}
        self.position = 0
        self.unanswered = 0

    async def open_session(self, *_: object) -> None: ...

    async def attach(self, *_: object) -> SessionMeta:
        return cast(
            SessionMeta,
            SimpleNamespace(
                connection=2,
                first_position=0,
                position=self.position,
                settings=SETTINGS,
                preferences=self.notes.get("preferences", ""),
                counts="",
                time=-1.0,
                admitted=0,
                state="open",
            ),
        )

    async def entries(self, *_: object) -> list[tuple[int, LogEntry]]:
        return []

    async def abandon(self, *_: object) -> bool:
        return False

    async def note(self, _id: str, _connection: int, field: str, text: str) -> bool:
        self.notes[field] = text
        return True

    async def send(self, _id: str, message: object, _connection: int | None = None) -> None:
        if isinstance(message, Query):
            if self.unanswered >= self.config.max_pending_inputs:
                raise BusError("too_many_inputs", "so many wait already: try later")
            self.unanswered += 1
        self.sent.append(message)

    async def tail(self, *_: object) -> AsyncIterator[tuple[int, LogEntry]]:
        while True:
            yield await self.entries_to_come.get()

    @property
    def changes(self) -> list[SessionSettings]:
        return [message.settings for message in self.sent if isinstance(message, SettingsChange)]

    async def put(self, *entries: LogEntry, at: int | None = None) -> None:
        """Entries of the log, and time for the gateway to read them."""
        for entry in entries:
            position = self.position if at is None else at
            self.position = max(self.position, position + 1)
            self.entries_to_come.put_nowait((position, entry))
        await asyncio.sleep(0.01)


def conversation_over(bus: Log, bulk: bool = False) -> Conversation:
    meters = cast(GatewayMeters, SimpleNamespace(frame=lambda *_: None, stage=lambda *_: None))
    return Conversation(
        cast(Bus, bus),
        "model",
        "pad",
        Counts(),
        SETTINGS,
        meters,
        max_waiting=64,
        max_live=8,
        live_speed=1.25,
        bulk=bulk,
    )


@asynccontextmanager
async def followed(conversation: Conversation) -> AsyncIterator[Conversation]:
    """A conversation whose events somebody reads meanwhile."""

    async def follow() -> None:
        async for _ in conversation.events():
            pass

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    try:
        yield conversation
    finally:
        task.cancel()


@asynccontextmanager
async def opened(bus: Log) -> AsyncIterator[Conversation]:
    conversation = conversation_over(bus)
    await conversation.open()
    async with followed(conversation):
        yield conversation


@asynccontextmanager
async def resumed(bus: Log, after: int | None = None) -> AsyncIterator[Conversation]:
    """The same session, where another gateway goes on with it."""
    conversation = conversation_over(bus)
    await conversation.resume("sess_x", after)
    async with followed(conversation):
        yield conversation


async def change(conversation: Conversation, **patch: object) -> None:
    await conversation.update(parse_patch(patch))


async def decide(bus: Log, conversation: Conversation) -> None:
    """As a model does that answers whenever there is a frame."""
    while True:
        await asyncio.sleep(0.001)
        if conversation._frames:
            conversation._frames.take()
            conversation._frames.note_change()
            bus.unanswered = 0


async def test_an_entry_that_is_read_again_answers_no_later_change() -> None:
    bus = Log()
    async with opened(bus) as first:
        await change(first, video={"threshold": 0.5})
        await bus.put(SettingsApplied(settings=bus.changes[0]))
        await change(first, instructions="Watch the door.")
    async with resumed(bus) as second:
        await bus.put(SettingsApplied(settings=bus.changes[0]), at=0)
        assert second.settings.instructions == "Watch the door."
        await change(second, max_output_tokens=7)
        assert bus.changes[-1].instructions == "Watch the door."
        for settings in bus.changes[1:]:
            await bus.put(SettingsApplied(settings=settings))
        assert second.settings == bus.changes[-1]


async def test_all_changes_under_way_are_counted_after_a_reconnect() -> None:
    bus = Log()
    first = conversation_over(bus)
    await first.open()
    await change(first, video={"threshold": 0.5})
    await change(first, instructions="Watch the door.")
    async with resumed(bus) as second:
        await bus.put(SettingsApplied(settings=bus.changes[0]))
        await change(second, max_output_tokens=7)
        assert (bus.changes[-1].instructions, bus.changes[-1].threshold) == ("Watch the door.", 0.5)


async def test_a_setting_there_and_back_ends_as_it_was_chosen_last() -> None:
    bus = Log()
    async with opened(bus) as conversation:
        for threshold in (0.5, 0.6, 0.5):
            await change(conversation, video={"threshold": threshold})
        await bus.put(*(SettingsApplied(settings=settings) for settings in bus.changes[:2]))
        assert conversation.settings.threshold == 0.5
        await change(conversation, max_output_tokens=7)
        await bus.put(*(SettingsApplied(settings=settings) for settings in bus.changes[2:]))
        assert (conversation.settings.threshold, conversation.settings.max_response_tokens) == (0.5, 7)


async def test_no_more_changes_wait_than_may_and_a_refused_one_is_taken_back() -> None:
    bus = Log()
    async with opened(bus) as conversation:
        for number in range(4):
            await change(conversation, max_output_tokens=10 + number)
        with pytest.raises(ClientError, match="4 changes of settings wait already"):
            await change(conversation, max_output_tokens=99)
        assert conversation.settings.max_response_tokens == 13
        await bus.put(*(SettingsApplied(settings=settings) for settings in bus.changes[:3]))
        await bus.put(InputRefused(query_id=None, reason="no"))
        assert conversation.settings == bus.changes[2]
        await change(conversation, max_output_tokens=99)


async def test_of_more_questions_than_may_wait_each_is_asked_once_there_is_room() -> None:
    bus = Log()
    conversation = conversation_over(bus, bulk=True)
    await conversation.open()
    moments: list[Any] = ["before", *(at / 2 for at in range(20)), 3.0, 3.0, 3.0, 3.0, 3.0, 99.0, "after"]
    questions = tuple(Question(f"{number}", moment) for number, moment in enumerate(moments))
    recording = Recording(pictures_of_images([b"x"] * 20, 2.0), questions)

    deciding = asyncio.create_task(decide(bus, conversation))
    await asyncio.wait_for(_supply(recording, conversation), 30)
    deciding.cancel()
    asked = [message for message in bus.sent if isinstance(message, Query)]
    assert sorted(int(query.text) for query in asked) == list(range(len(moments)))
    assert asked[0].time is None
    assert [query.time for query in asked[1:]] == sorted(query.time for query in asked[1:] if query.time is not None)
    assert [query.time for query in asked[-2:]] == [9.5, 9.5]


async def test_a_question_is_asked_before_the_frame_of_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Log()
    conversation = conversation_over(bus, bulk=True)
    await conversation.open()
    offer = conversation.offer

    def offered(video_time: float | None, image: bytes) -> None:
        bus.sent.append(video_time)
        offer(video_time, image)

    monkeypatch.setattr(conversation, "offer", offered)
    questions = (Question("a", "before"), Question("b", 1.0), Question("c", "after"))
    deciding = asyncio.create_task(decide(bus, conversation))
    await asyncio.wait_for(_supply(Recording(pictures_of_images([b"x"] * 5, 2.0), questions), conversation), 30)
    deciding.cancel()
    told = [message.text if isinstance(message, Query) else message for message in bus.sent]
    assert told == ["a", 0.0, 0.5, "b", 1.0, 1.5, "c", 2.0]


async def test_of_an_item_with_a_frame_out_of_order_nothing_is_taken() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    bus = Log()
    conversation = conversation_over(bus)
    await conversation.open()
    conversation.offer(5.0, picture.getvalue())
    gateway = SimpleNamespace(limits=LimitsConfig(), check_question=lambda text: text)
    connection = Connection(cast(Any, SimpleNamespace(send_text=None)), cast(Gateway, gateway), conversation)
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    for times in ([4.0], [6.0, 6.0], [6.0, None, 6.2]):
        frames = [{"type": "input_image", "image_url": url, "video_time": at} for at in times]
        content = [{"type": "input_text", "text": "What is this?"}, *frames]
        event = parse_text(json.dumps({"type": "conversation.item.create", "item": {"content": content}}))
        with pytest.raises(ClientError, match="expected more than"):
            await connection._take_item(cast(Any, event).item)
    assert not bus.sent
    assert conversation.counts.received == 1


def test_what_is_answered_for_never_goes_back() -> None:
    buffer = FrameBuffer("latest", 64, lambda _: None)
    buffer.add(1.0, b"1")
    buffer.give_back(buffer.take())
    admitted = buffer.take()
    buffer.add(2.0, b"2")
    buffer.add(3.0, b"3")
    assert buffer.through == 2.0
    buffer.admitted(admitted)
    assert buffer.through == 2.0


@pytest.mark.parametrize("session", [{"include": [1] * 300_000}, {f"unknown{n}": 0 for n in range(20_000)}])
def test_a_message_with_very_many_mistakes_has_one_error(session: dict[str, object]) -> None:
    with pytest.raises(ClientError) as caught:
        parse_text(json.dumps({"type": "session.update", "session": session}))
    assert len(str(caught.value)) < 400
    assert len(session) < MOST_PROBLEMS or "20000 fields or items are wrong" in str(caught.value)


@pytest.mark.filterwarnings("error")
async def test_a_session_that_is_never_taken_again_is_refused() -> None:
    """Its replica is gone, the others have no room: a client hears of it."""
    told: list[bool] = []
    held = iter([True, True, False, *[False] * 1000])

    async def placed() -> bool:
        return next(held)

    conversation = SimpleNamespace(ended=False, placed=placed)
    config = SimpleNamespace(max_llms=None, admission_timeout_s=0.01, start_timeout_s=0.05)
    with pytest.raises(NoCapacity, match="no model replica took the session within"):
        await owned(cast(Conversation, conversation), cast(Gateway, SimpleNamespace(config=config)), told.append)
    assert told == [False, False, True]


async def test_notes_of_an_older_gateway_answer_nothing_that_was_told() -> None:
    bus = Log()
    async with opened(bus) as old:
        await change(old, video={"threshold": 0.5})
        await bus.put(SettingsApplied(settings=bus.changes[0]))
        await change(old, instructions="Watch the door.")
    notes = json.loads(bus.notes["preferences"])
    del notes["changes"], notes["answered"]
    bus.notes["preferences"] = json.dumps(notes)
    async with resumed(bus, 0) as heir:
        await bus.put(SettingsApplied(settings=bus.changes[0]), at=0)
        assert heir.settings.instructions == "Watch the door."


async def test_a_cancellation_names_the_response_it_is_for() -> None:
    bus = Log()
    async with opened(bus) as conversation:
        await bus.put(ResponseStarted(response_id="r2", query_id=None, seq=0, time=0.0))
        await conversation.interrupt("r1")
        await conversation.interrupt()
        assert [message.response_id for message in bus.sent if isinstance(message, Interrupt)] == ["r1", "r2"]


async def test_who_leaves_ends_the_input_and_cuts_whatever_is_spoken() -> None:
    bus = Log()
    async with opened(bus) as conversation:
        await bus.put(ResponseStarted(response_id="r2", query_id=None, seq=0, time=0.0))
        await conversation.leave()
        assert isinstance(bus.sent[0], End)
        assert {message.response_id for message in bus.sent if isinstance(message, Interrupt)} == {None, "r2"}


async def test_a_slow_reader_is_closed_as_a_matter_of_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> None:
        raise SlowReader("so many events wait")

    gateway = cast(Gateway, SimpleNamespace(limits=LimitsConfig()))
    connection = Connection(cast(Any, SimpleNamespace(send_text=None)), gateway, conversation_over(Log()))
    monkeypatch.setattr(connection, "_run", slow)
    with pytest.raises(Closing, match="so many events wait") as closed:
        await connection.run()
    assert (closed.value.close_code, closed.value.code, closed.value.ends) == (1008, "slow_reader", False)


async def test_a_video_that_is_too_long_by_its_own_times_is_refused(tmp_path: Path) -> None:
    """Four pictures of a few kilobytes, the last of them a day later, are a day of frames."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 32
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 60 * number, np.uint8), format="rgb24")
            frame.pts = number if number < 3 else 10 * 86_400
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ApiError, match=r"upload lasts 86\d{3} s by its times, at most 28800 are taken") as refused:
        await check_video(path, "upload", LimitsConfig())
    assert refused.value.status_code == 422
    await check_video(path, "upload", LimitsConfig(video_s=100_000))
