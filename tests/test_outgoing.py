"""A client that reads slowly loses its connection, never an event of the log."""

from __future__ import annotations

import asyncio

import pytest

from serve import outgoing as outgoing_module
from serve.limits import SINGLE_BURST, LimitsConfig
from serve.outgoing import Outgoing, SlowReader
from serve.proxy import SlowClients
from serve.server_events import FrameDecided, GoingAway, parse_event

pytestmark = pytest.mark.anyio

LIMITS = LimitsConfig(outgoing_events=4, send_s=0.02)


class Client:
    """Takes events while `reading` is set."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.reading = asyncio.Event()

    async def take(self, text: str) -> None:
        await self.reading.wait()
        self.told.append(text)


def decided(seq: int) -> FrameDecided:
    return FrameDecided(event_id=f"event_{seq}_0", position=seq, seq=seq, video_time=seq, p_silent=0.5)


async def test_events_come_in_order_and_each_has_an_id() -> None:
    client = Client()
    client.reading.set()
    outgoing = Outgoing(client.take, LIMITS)
    outgoing.put(decided(0))
    outgoing.put(GoingAway(seconds=1))
    outgoing.put(GoingAway(seconds=2))
    await outgoing.flush()
    assert [parse_event(text).event_id for text in client.told] == ["event_0_0", "event_local_1", "event_local_2"]


async def test_events_of_the_log_wait_where_they_are_until_the_client_reads() -> None:
    client = Client()
    outgoing = Outgoing(client.take, LIMITS.model_copy(update={"send_s": 60}))
    sending = asyncio.create_task(outgoing.run())

    async def follow() -> None:
        for seq in range(20):
            await outgoing.put_when_few_wait(decided(seq))

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    assert not following.done()
    client.reading.set()
    await following
    await outgoing.flush()
    sending.cancel()
    assert len({parse_event(text).event_id for text in client.told}) == 20


async def test_events_of_whoever_speaks_all_the_time_go_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing_module, "SINGLE_PER_S", 1e-6)
    client = Client()
    client.reading.set()
    outgoing = Outgoing(client.take, LimitsConfig())
    sending = asyncio.create_task(outgoing.run())
    for seq in range(SINGLE_BURST):
        outgoing.put(decided(seq))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(client.told) == seq + 1  # each at once
    for seq in range(3):
        outgoing.put(decided(SINGLE_BURST + seq))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(client.told) == SINGLE_BURST
    while len(client.told) == SINGLE_BURST:
        await asyncio.sleep(0)
    assert len(client.told) == SINGLE_BURST + 3
    sending.cancel()


async def test_what_cannot_wait_ends_the_connection_of_a_client_that_does_not_read() -> None:
    outgoing = Outgoing(Client().take, LIMITS)
    for _ in range(4):
        outgoing.put(GoingAway(seconds=1))
    with pytest.raises(SlowReader, match="4 events"):
        outgoing.put(GoingAway(seconds=1))


async def test_a_socket_that_takes_nothing_ends_the_connection() -> None:
    outgoing = Outgoing(Client().take, LIMITS)
    outgoing.put(GoingAway(seconds=1))
    with pytest.raises(SlowReader, match=r"0\.02 s"):
        await outgoing.run()


async def test_the_proxy_lets_a_client_go_that_takes_nothing() -> None:
    ended = asyncio.Event()

    async def application(scope: object, receive: object, send: object) -> None:
        try:
            await send({"type": "websocket.send", "text": "a"})  # type: ignore[operator]
        finally:
            ended.set()

    async def never(_: object) -> None:
        await asyncio.Event().wait()

    await SlowClients(application, 0.01)({"type": "websocket"}, never, never)  # type: ignore[arg-type]
    assert ended.is_set()
