"""The stock `openai` client, unchanged, as the client of a live video."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import application
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from openai.types.realtime import (
    ConversationItemAdded,
    RealtimeErrorEvent,
    ResponseCreatedEvent,
    ResponseDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    SessionCreatedEvent,
    SessionUpdatedEvent,
)
from websockets.exceptions import InvalidStatus

from actors.video import encode_jpeg, read_frames

pytestmark = pytest.mark.anyio

KEY = "a key"
FRAMES = 12
STOCK = {
    "session.created": SessionCreatedEvent,
    "session.updated": SessionUpdatedEvent,
    "conversation.item.added": ConversationItemAdded,
    "response.created": ResponseCreatedEvent,
    "response.output_text.delta": ResponseTextDeltaEvent,
    "response.output_text.done": ResponseTextDoneEvent,
    "response.done": ResponseDoneEvent,
    "error": RealtimeErrorEvent,
}


@pytest.fixture(scope="module")
def client(tiny: dict[str, object], redis_url: str) -> Iterator[AsyncOpenAI]:
    with application(tiny, redis_url, api_key=KEY) as url:
        yield AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY)


async def until(connection: AsyncRealtimeConnection, kind: str) -> dict[str, object]:
    """The next event of a kind; on the way every event that OpenAI has is checked against OpenAI's own type."""
    async with asyncio.timeout(60):
        while True:
            event = (await connection.recv()).to_dict()
            if (stock := STOCK.get(str(event["type"]))) is not None:
                stock.model_validate(event)
            if event["type"] == kind:
                return event


def image(jpeg: bytes) -> dict[str, object]:
    return {"type": "input_image", "image_url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"}


async def say(connection: AsyncRealtimeConnection, *content: dict[str, object]) -> None:
    await connection.conversation.item.create(item={"type": "message", "role": "user", "content": list(content)})  # type: ignore[typeddict-item]


async def test_a_video_is_streamed_and_questions_are_answered(client: AsyncOpenAI, sample_video: Path) -> None:
    pictures = [encode_jpeg(frame) for _, _, frame in read_frames(sample_video, 2.0, 32, "pad", stop=FRAMES / 2)]
    async with client.realtime.connect(model="any name") as connection:
        created = await until(connection, "session.created")
        await connection.session.update(
            session={
                "type": "realtime",
                "instructions": "Tell what happens.",
                "output_modalities": ["text"],
                "max_output_tokens": 3,
            }
        )
        updated = await until(connection, "session.updated")
        for jpeg in pictures[: FRAMES // 2]:
            await say(connection, image(jpeg))
        await say(connection, {"type": "input_text", "text": "What do you see?"})
        await connection.response.create()
        asked = await until(connection, "conversation.item.added")
        text = await until(connection, "response.output_text.done")
        done = await until(connection, "response.done")
        for jpeg in pictures[FRAMES // 2 :]:
            await say(connection, image(jpeg))
        await connection.response.create(response={"instructions": "Sum it up."})
        summed = await until(connection, "conversation.item.added")
        await connection.send({"type": "input_video_buffer.end"})  # type: ignore[arg-type]
        ended = await until(connection, "session.ended")
    assert created["session"]["type"] == "realtime"
    assert updated["session"]["instructions"] == "Tell what happens."
    assert [asked["item"]["content"][0]["text"], summed["item"]["content"][0]["text"]] == [
        "What do you see?",
        "Sum it up.",
    ]
    assert done["response"]["id"] == text["response_id"]
    assert done["response"]["output"][0]["content"][0]["text"] == text["text"]
    assert ended["frames"]["received"] == FRAMES
    assert ended["frames"]["decided"] + ended["frames"]["dropped"] == FRAMES


async def test_a_response_without_a_question_says_what_is_seen(client: AsyncOpenAI, sample_video: Path) -> None:
    async with client.realtime.connect(model="any name") as connection:
        [(_, _, frame)] = list(read_frames(sample_video, 2.0, 32, "pad", stop=0.5))
        await say(connection, image(encode_jpeg(frame)))
        await connection.response.create()
        asked = await until(connection, "conversation.item.added")
        await connection.response.cancel()
        done = await until(connection, "response.done")
    assert asked["item"]["content"][0]["text"] == "What do you see now?"
    assert done["response"]["item_id"] == asked["item"]["id"]


async def test_what_a_stock_client_asks_for_in_vain_is_refused_by_name(client: AsyncOpenAI) -> None:
    async with client.realtime.connect(model="any name") as connection:
        await connection.session.update(session={"type": "realtime", "output_modalities": ["audio"]})
        first = await until(connection, "error")
        await connection.session.update(session={"type": "realtime", "tools": []}, event_id="mine")
        second = await until(connection, "error")
        await connection.session.update(session={"type": "realtime", "max_output_tokens": "inf"})
        updated = await until(connection, "session.updated")
    assert first["error"]["param"] == "session.output_modalities.0"
    assert (second["error"]["code"], second["error"]["event_id"]) == ("unknown_field", "mine")
    assert updated["session"]["max_output_tokens"] == 4096


async def test_the_stock_client_hears_why_its_key_is_refused(client: AsyncOpenAI) -> None:
    stranger = client.with_options(api_key="another key")
    with pytest.raises(InvalidStatus, match="401") as refused:
        async with stranger.realtime.connect(model="any name"):
            pass
    assert json.loads(refused.value.response.body or b"")["error"]["code"] == "unauthorized"
