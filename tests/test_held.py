"""What a takeover starts from when most of a session's log and input have been trimmed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from test_session import FRAME, Driver, make_session

from actors.bus import Lease, SessionMeta
from actors.engine import Engine
from actors.held import Held, StoredInput, rebuild
from actors.messages import (
    End,
    Evicted,
    FrameTokens,
    Interrupt,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    SessionInput,
    SettingsApplied,
    SettingsChange,
    Window,
    encode,
)
from actors.session import Limits, Session

LEASE = Lease("s", 1)
LIMITS = Limits(500, memory_tokens=40)
SHAPE = (FRAME.shape[0], FRAME.shape[1])


def narrow() -> Session:
    return make_session(LIMITS, max_response_tokens=20)


def tokens(seq: int) -> FrameTokens:
    return FrameTokens.from_tensor(seq, seq / 2, FRAME.to(torch.float16))


def lived(frames: int, speaks: set[int]) -> tuple[Driver, Held, list[StoredInput], Window]:
    """A session with its owner's notes, all its input, and the window of its last eviction."""
    driver = Driver(narrow(), speaks=lambda seq: seq in speaks)
    held = Held(LEASE, driver.session, 0, "0-0")
    inputs: list[StoredInput] = [(f"{seq + 1}-0", tokens(seq)) for seq in range(frames)]
    for entry_id, message in inputs:
        held.note_input(entry_id, message)
        held.cursor = entry_id
    driver.frames(0, frames)
    driver.run()
    window = None
    for position, entry in enumerate(driver.log):
        held.note_entry(position, entry)
        if isinstance(entry, Evicted):
            window = held.window(entry, position)
    assert window is not None
    return driver, held, inputs, window


def taken_over(driver: Driver, window: Window, inputs: list[StoredInput], limits: Limits = LIMITS) -> Session:
    session = make_session(limits, max_response_tokens=20)
    engine = SimpleNamespace(open=lambda *_: session, close=lambda _: None)
    meta = SimpleNamespace(window=encode(window), position=len(driver.log), settings=session.settings)
    log = list(enumerate(driver.log))[window.out_position :]
    kept = [(at, message) for at, message in inputs if int(at.partition("-")[0]) >= int(window.in_id.partition("-")[0])]
    return rebuild(cast(Engine, engine), LEASE, cast(SessionMeta, meta), log, kept, SHAPE).session


def test_responses_are_numbered_on_although_the_window_has_none() -> None:
    driver, _, inputs, window = lived(200, speaks={3, 5, 9})
    heir = taken_over(driver, window, inputs)
    assert not any(isinstance(entry, ResponseStarted) for entry in driver.log[window.out_position :])
    assert (heir.responses, heir.spoken, heir.recent) == (
        driver.session.responses,
        driver.session.spoken,
        driver.session.recent,
    )
    assert heir.responses == 3
    assert heir.context.ids == driver.session.context.ids
    assert heir.forgotten == driver.session.forgotten > 2 * LIMITS.capacity


def test_what_was_said_in_the_window_is_not_counted_twice() -> None:
    driver, _, inputs, window = lived(200, speaks={3, *range(150, 200, 4)})
    heir = taken_over(driver, window, inputs)
    assert any(isinstance(entry, ResponseStarted) for entry in driver.log[window.out_position :])
    assert (heir.responses, heir.spoken, heir.recent) == (
        driver.session.responses,
        driver.session.spoken,
        driver.session.recent,
    )


def test_a_far_question_keeps_no_input_and_is_not_forgotten() -> None:
    driver, held, inputs, before = lived(200, speaks=set())
    held.note_input("0-1", Query(query_id="far", text="And now?", after_seq=-1, time=100.0))
    position = max(at for at, entry in enumerate(driver.log) if isinstance(entry, Evicted))
    evicted = driver.log[position]
    assert isinstance(evicted, Evicted)
    window = held.window(evicted, position)
    assert window.in_id == before.in_id
    heir = taken_over(driver, window, inputs)
    assert heir.next_seq == 200
    assert heir.waiting_frames == 0
    later = Driver(heir)
    later.frames(200, 202)
    later.run()
    assert [entry.query_id for entry in later.of(QueryConsumed)] == ["far"]


@pytest.mark.parametrize(("named", "cut"), [("s-1", True), ("s-0", False), (None, False)])
def test_an_interrupt_that_nobody_read_cuts_the_response_it_names(named: str | None, cut: bool) -> None:
    driver, _, inputs, window = lived(200, speaks={3, 195})
    start = max(at for at, entry in enumerate(driver.log) if isinstance(entry, ResponseStarted))
    driver.log = driver.log[: start + 2]
    heir = taken_over(driver, window, [*inputs, ("999-0", Interrupt(after_seq=199, response_id=named))])
    assert heir.response is not None
    assert heir.response.response_id == "s-1"
    ended = [entry.reason for entry in heir.advance() if isinstance(entry, ResponseEnded)]
    assert ended == ["interrupted"] * cut


def test_the_end_of_input_is_not_trimmed_before_frames_that_came_after_it() -> None:
    held = Held(LEASE, narrow(), 0, "9-0")
    held.note_input("5-0", End(after_seq=8))
    held.note_input("6-0", SettingsChange(after_seq=1, settings=held.session.settings))
    for number in range(7, 10):
        held.note_input(f"{number}-0", tokens(number))
    evicted = Evicted(first_seq=8, positions_before=400, pinned="", memory="")
    assert held.window(evicted, 3).in_id == "5-0"


def test_a_context_too_long_for_its_heir_is_cut_before_anything_else() -> None:
    driver = Driver(make_session(Limits(1000, memory_tokens=40), max_response_tokens=20))
    driver.frames(0, 70)
    driver.run()
    assert driver.session.context.length > LIMITS.capacity
    heir = Driver(narrow())
    heir.frames(0, 70)
    heir.session.restore(driver.log)
    heir.session.advance()
    assert heir.session.context.length <= LIMITS.capacity
    heir.frames(70, 72)
    heir.run()
    assert heir.session.next_seq == 72


def living(frames: int) -> tuple[Driver, Held, list[StoredInput], Callable[[SessionInput], None], list[Window]]:
    """A session that is given its input one by one by what is returned, with the windows of its evictions so far."""
    driver = Driver(narrow())
    held = Held(LEASE, driver.session, 0, "0-0")
    inputs, windows, noted = list[StoredInput](), list[Window](), 0

    def give(message: SessionInput) -> None:
        nonlocal noted
        entry_id = f"{len(inputs) + 1}-0"
        inputs.append((entry_id, message))
        held.cursor = entry_id
        held.note_input(entry_id, message)
        held.deliver(entry_id, message, SHAPE)
        driver.run()
        for position, entry in enumerate(driver.log[noted:], noted):
            held.note_entry(position, entry)
            if isinstance(entry, Evicted):
                windows.append(held.window(entry, position))
        noted = len(driver.log)

    for seq in range(frames):
        give(tokens(seq))
    return driver, held, inputs, give, windows


def test_a_change_that_waits_is_not_lost_behind_one_that_the_window_has() -> None:
    driver, _, inputs, give, windows = living(10)
    settings = driver.session.settings
    give(SettingsChange(after_seq=9, settings=settings.model_copy(update={"instructions": "You watch a kitchen."})))
    for seq in range(10, 14):
        give(tokens(seq))
    assert len(driver.of(SettingsApplied)) == len(windows) == 1
    wanted = driver.session.settings.model_copy(update={"threshold": 0.123})
    give(SettingsChange(after_seq=16, settings=wanted))  # behind frames that are still with the encoder
    heir = Driver(taken_over(driver, windows[-1], inputs))
    for one in (driver, heir):
        one.frames(14, 20)
        one.run()
    assert [entry.settings.threshold for entry in heir.of(SettingsApplied)] == [0.123]
    assert heir.session.settings == driver.session.settings == wanted


def test_an_heir_pins_what_its_predecessor_pins() -> None:
    """A question that was asked again behind another one is not the first of the log that is left."""
    driver, _, inputs, give, windows = living(1)
    seq = 1

    def see(count: int) -> None:
        nonlocal seq
        for _ in range(count):
            give(tokens(seq))
            seq += 1

    give(Query(query_id="a", text="Tell me when a dog comes.", after_seq=0))
    while not windows:
        see(1)
    see(14)
    give(Query(query_id="b", text="What colour is it?", after_seq=seq - 1))
    see(1)
    give(Query(query_id="c", text="Tell me when a dog comes.", after_seq=seq - 1))
    known = len(windows)
    while len(windows) == known:
        see(1)
    heir = Driver(taken_over(driver, windows[-1], inputs))
    assert heir.session.context.ids == driver.session.context.ids
    assert heir.session.context.pinned == driver.session.context.pinned
    for one in (driver, heir):
        one.frames(seq, seq + 60)
        one.run()
    assert heir.of(Evicted)[-1] == driver.of(Evicted)[-1]
