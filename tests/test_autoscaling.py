"""When replicas are added and taken away."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import pytest

from actors.bus import Bus
from actors.load import Load, measure
from actors.messages import SessionSettings
from serve.autoscaling import EncoderPolicy, Figures, LLMPolicy, ScalingConfig


@dataclass
class Seen:
    current_num_replicas: int
    aggregated_metrics: Figures | None
    target_num_replicas: int = field(default=7)


def llms(replicas: int, waiting: float = 0, **figures: float) -> int:
    """The policy's answer where every replica sees the same."""
    seen = {"kv_use": 0.6, "room": 0.0 if waiting else 16.0, "sessions": 4.0, "waiting_frames": 0.0, **figures}
    each = {name: dict.fromkeys(range(replicas), value) for name, value in seen.items()}
    each["waiting_sessions"] = dict.fromkeys(range(replicas), waiting)
    return LLMPolicy()(Seen(replicas, each))[0]


def encoders(replicas: int, oldest_frame_s: float, busy: float) -> int:
    figures = {"oldest_frame_s": {0: oldest_frame_s, 1: 0.0}, "busy": dict.fromkeys(range(replicas), busy)}
    return EncoderPolicy()(Seen(replicas, figures))[0]


def test_sessions_that_wait_for_a_model_get_as_many_replicas_as_they_need() -> None:
    assert llms(1, waiting=1) == 2
    assert llms(1, waiting=4) == 2
    assert llms(1, waiting=5) == 3
    assert llms(2, waiting=9) == 5


def test_sessions_that_wait_beside_room_are_about_to_be_taken() -> None:
    assert llms(2, waiting=2, room=1) == 2


def test_an_llm_is_added_when_memory_is_scarce_or_decisions_fall_behind() -> None:
    assert llms(2, kv_use=0.9) == 3
    assert llms(2, waiting_frames=17) == 3
    assert llms(2, waiting_frames=16) == 2


def test_an_llm_is_taken_away_only_when_the_others_can_hold_its_sessions() -> None:
    assert llms(2, kv_use=0.2) == 1
    assert llms(2, kv_use=0.3) == 2
    assert llms(4, kv_use=0.3) == 3
    assert llms(1, kv_use=0.0) == 1
    assert llms(2, kv_use=0.2, waiting=1) == 3


def test_places_count_like_memory_where_there_are_fewer() -> None:
    assert llms(1, kv_use=0.1, room=0) == 2
    assert llms(2, kv_use=0.1, sessions=2, room=2) == 2
    assert llms(2, kv_use=0.1, sessions=1, room=4) == 1


def test_a_replica_is_asked_for_before_the_last_place_is_taken() -> None:
    assert llms(1, kv_use=0.1, sessions=2, room=2) == 1
    assert llms(1, kv_use=0.1, sessions=3, room=1) == 2
    assert llms(1, kv_use=0.1, sessions=1, room=1) == 1
    assert llms(3, kv_use=0.1, sessions=1, room=0) == 4
    assert LLMPolicy()(places(3, 1, 2))[0] == 3


def test_a_replica_is_not_taken_away_where_it_would_be_asked_for_again() -> None:
    calm = ScalingConfig(calm=0.8).model_dump()
    for each, sessions in itertools.product(range(1, 9), range(17)):
        fewer = LLMPolicy(**calm)(places(2, each, sessions))[0]
        assert fewer >= 2 or LLMPolicy(**calm)(places(1, each, sessions))[0] == 1, (each, sessions)


def places(replicas: int, each: int, sessions: int) -> Seen:
    """What is seen of replicas with `each` places, of which sessions have taken some, and of little memory in use."""
    room = max(0.0, each - sessions / replicas)
    held = each - room
    figures = {"kv_use": 0.1, "room": room, "sessions": held, "waiting_frames": 0.0, "waiting_sessions": 0.0}
    return Seen(replicas, {name: dict.fromkeys(range(replicas), value) for name, value in figures.items()})


def test_an_encoder_is_added_when_frames_grow_old() -> None:
    assert encoders(1, oldest_frame_s=0.6, busy=1.0) == 2
    assert encoders(1, oldest_frame_s=0.3, busy=1.0) == 1


def test_an_encoder_is_taken_away_when_frames_do_not_wait_and_the_others_have_time() -> None:
    assert encoders(3, oldest_frame_s=0.0, busy=0.2) == 2
    assert encoders(3, oldest_frame_s=0.0, busy=0.4) == 3
    assert encoders(1, oldest_frame_s=0.0, busy=0.0) == 1


@pytest.mark.parametrize("policy", [EncoderPolicy(), LLMPolicy()])
def test_without_figures_nothing_changes(policy: EncoderPolicy | LLMPolicy) -> None:
    assert policy(Seen(2, None))[0] == 7
    assert policy(Seen(2, {}))[0] == 7


@pytest.mark.anyio
async def test_load_is_what_nobody_has_taken_yet(bus: Bus) -> None:
    assert await measure(bus) == Load(0, 0.0)
    for name in ("a", "b", "c"):
        await bus.open_session(name, "model-a", SessionSettings())
    await bus.claim("replica", "model-a", bus.partition("a"), 1)
    await bus.admit_frame("b", 0.0, b"jpeg")
    first = await measure(bus)
    assert first.waiting_sessions == 2
    async with asyncio.timeout(20):
        while (await measure(bus)).oldest_frame_s <= first.oldest_frame_s:
            await asyncio.sleep(0.01)
