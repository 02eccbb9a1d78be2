"""The streaming loop as pure logic: scripted decisions on the golden tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden_files import template
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import (
    End,
    Evicted,
    FramesDecided,
    FrameSkipped,
    InputRefused,
    Interrupt,
    LogEntry,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
    SessionEnded,
    SessionSettings,
    SettingsApplied,
    SettingsChange,
)
from actors.session import Decision, Limits, Session, SessionError, nearly_equal

TEMPLATE = template("tiny", "live1plus")
PROMPT = "You watch."
SILENT, SPEAK = Decision(0.99, True), Decision(0.01, True)
REPLY = [token.id for token in TEMPLATE.plain.encode(" You cut the onion.")] + [TEMPLATE.eos_id]
FRAME = torch.zeros(10, 4)


def make_session(limits: Limits | None = None, **changes: object) -> Session:
    return Session("s", TEMPLATE, PROMPT, SessionSettings(**changes), limits or Limits(2000))


class Driver:
    """Runs a session as an engine would: `speaks` says at which seq it wants to, `reply` what it says."""

    def __init__(
        self,
        session: Session,
        speaks: Callable[[int], bool] = lambda seq: False,
        reply: list[int] = REPLY,
        run: int = 1,
    ) -> None:
        self.session, self.speaks, self.reply, self.run_length = session, speaks, reply, run
        self.log: list[LogEntry] = []

    def step(self) -> bool:
        """One advance and one piece of work; False when there is nothing to do."""
        session = self.session
        entries = session.advance()
        self.log += entries
        work = session.work(self.run_length, 120)
        if work is None:
            return bool(entries)
        assert work.start == session.fed
        if work.kind == "prefill":
            session.resolve_prefill(work)
        elif work.kind == "frames":
            wanted = [self.speaks(session.next_seq + i) for i in range(len(work.marks))]
            self.log += session.resolve_frames(work, [SPEAK if speak else SILENT for speak in wanted])
        else:
            said = len(session.response.ids) if session.response else 0
            self.log += session.resolve_token(work, self.reply[min(said, len(self.reply) - 1)])
        return True

    def run(self) -> list[LogEntry]:
        while self.step():
            pass
        return self.log

    def frames(self, start: int, stop: int, fps: int = 2) -> None:
        for seq in range(start, stop):
            self.session.add_frame(seq, seq / fps, FRAME)

    def of(self, kind: type) -> list:
        return [entry for entry in self.log if isinstance(entry, kind)]


def rendered(*turns: dict) -> list[int]:
    return TEMPLATE.render([{"role": "system", "content": PROMPT}, *turns]).input_ids


def stream(count: int) -> dict:
    return {"role": "stream", "num_frames": count}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


ANSWER = {"role": "assistant", "content": "You cut the onion."}


def test_a_silent_stream_is_the_rendered_dialogue() -> None:
    driver = Driver(make_session())
    driver.frames(0, 5)
    driver.run()
    assert driver.session.context.ids == rendered(stream(5))[:-1]  # rendering closes the bracket
    assert [entry.first_seq for entry in driver.of(FramesDecided)] == [0, 1, 2, 3, 4]


def test_a_spontaneous_reply_is_the_rendered_dialogue() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 2)
    driver.frames(0, 3)
    driver.run()
    assert driver.session.context.ids == rendered(stream(3), ANSWER)
    (ended,) = driver.of(ResponseEnded)
    assert (ended.reason, ended.text) == ("eos", "You cut the onion.")
    assert "".join(entry.text for entry in driver.of(ResponseTokens)) == "You cut the onion."


def test_frames_after_a_reply_open_a_new_bracket() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 0)
    driver.frames(0, 3)
    driver.run()
    assert driver.session.context.ids == rendered(stream(1), ANSWER, stream(2))[:-1]


def test_a_timed_query_takes_the_place_of_the_spontaneous_reply() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 2)
    driver.session.add(Query(query_id="q", text="What now?", after_seq=-1, time=1.0))
    driver.frames(0, 3)
    log = driver.run()
    kinds = [type(entry) for entry in log if not isinstance(entry, ResponseTokens)]
    assert kinds[-4:] == [FramesDecided, QueryConsumed, ResponseStarted, ResponseEnded]
    assert driver.of(FramesDecided)[-1].p_silent == [SPEAK.p_silent]
    assert [started.query_id for started in driver.of(ResponseStarted)] == ["q"]
    assert driver.session.context.ids == rendered(stream(3), user("What now?"), ANSWER)


@pytest.mark.parametrize("fps", [2, 3, 7, 10, 25, 30])
def test_a_timed_query_applies_at_the_first_frame_at_or_after_its_time(fps: int) -> None:
    driver = Driver(make_session())
    driver.session.add(Query(query_id="q", text="What now?", after_seq=-1, time=1.0))
    driver.frames(0, 3 * fps, fps)
    driver.run()
    assert driver.of(QueryConsumed)[0].seq == fps


def test_queries_are_answered_in_the_order_of_their_times() -> None:
    driver = Driver(make_session())
    for query_id, time in [("late", 1.6), ("early", 0.2), ("same", 0.2)]:
        driver.session.add(Query(query_id=query_id, text="What now?", after_seq=-1, time=time))
    driver.frames(0, 5)
    driver.run()
    assert [(entry.query_id, entry.seq) for entry in driver.of(QueryConsumed)] == [
        ("early", 1),
        ("same", 1),
        ("late", 4),
    ]


def test_a_query_after_a_reply_closes_it_with_eos() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 0)
    driver.frames(0, 1)
    driver.run()
    driver.session.add(Query(query_id="q", text="What now?", after_seq=0))
    driver.run()
    assert driver.session.context.ids == rendered(stream(1), ANSWER, user("What now?"), ANSWER)


def test_a_query_before_the_first_frame_follows_the_system_prompt() -> None:
    driver = Driver(make_session())
    driver.session.add(Query(query_id="q", text="Who are you?", after_seq=-1))
    driver.run()
    driver.frames(0, 1)
    driver.run()
    assert driver.session.context.ids == rendered(user("Who are you?"), ANSWER, stream(1))[:-1]


def test_a_timed_query_before_the_first_frame_waits_for_it() -> None:
    driver = Driver(make_session())
    driver.session.add(Query(query_id="q", text="Who are you?", after_seq=-1, time=-1.0))
    driver.run()
    assert not driver.log
    driver.frames(0, 1)
    driver.run()
    assert driver.session.context.ids == rendered(stream(1), user("Who are you?"), ANSWER)


def test_a_live_query_waits_until_the_frame_before_it_is_decided() -> None:
    driver = Driver(make_session(), run=8)
    driver.session.add(Query(query_id="q", text="What now?", after_seq=3))
    driver.frames(0, 6)
    driver.run()
    assert [(entry.first_seq, entry.last_seq) for entry in driver.of(FramesDecided)] == [(0, 3), (4, 5)]
    assert driver.of(QueryConsumed)[0].seq == 3


def test_queries_queue_while_a_response_is_spoken() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 0)
    driver.frames(0, 1)
    driver.step(), driver.step()
    assert driver.session.response is not None
    driver.session.add(Query(query_id="q", text="What now?", after_seq=0))
    driver.run()
    assert [entry.reason for entry in driver.of(ResponseEnded)] == ["eos", "eos"]
    assert [entry.query_id for entry in driver.of(ResponseStarted)] == [None, "q"]


@pytest.mark.parametrize("by_query", [False, True])
def test_an_interrupt_ends_the_response_within_one_step_and_closes_the_turn(by_query: bool) -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 0)
    driver.frames(0, 1)
    driver.step(), driver.step(), driver.step()
    if by_query:
        driver.session.add(Query(query_id="q", text="Stop. What now?", after_seq=0, interrupt=True))
    else:
        driver.session.add(Interrupt(after_seq=0))
    said = len(driver.session.response.ids)
    driver.step()
    ended = driver.of(ResponseEnded)[0]
    assert ended.reason == "interrupted"
    assert driver.session.context.groups[-1].turns[0].ids == REPLY[:said]
    prefix = rendered(stream(1))
    assert TEMPLATE.eos_id in driver.session.context.ids[len(prefix) :]
    driver.frames(1, 2)
    driver.run()
    assert driver.session.next_seq == 2


def test_an_interrupt_while_silent_changes_nothing() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 1)
    driver.frames(0, 1)
    driver.run()
    driver.session.add(Interrupt(after_seq=0))
    driver.frames(1, 2)
    driver.run()
    assert [entry.reason for entry in driver.of(ResponseEnded)] == ["eos"]


def test_a_response_at_the_length_limit_is_closed_with_eos() -> None:
    driver = Driver(make_session(max_response_tokens=3), speaks=lambda seq: seq == 0)
    driver.frames(0, 2)
    driver.run()
    assert driver.of(ResponseEnded)[0].reason == "length"
    at = driver.session.context.ids.index(TEMPLATE.eos_id)
    assert driver.session.context.ids[at - 3 : at] == REPLY[:3]


def test_any_winner_but_silence_speaks_even_above_the_threshold() -> None:
    session = make_session(threshold=0.0)
    session.add_frame(0, 0.0, FRAME)
    session.advance()
    work = session.work()
    entries = session.resolve_frames(work, [Decision(0.4, silence_wins=False)])
    assert isinstance(entries[-1], ResponseStarted)


@pytest.mark.parametrize(("p_silent", "speaks"), [(0.4, False), (0.09, True)])
def test_decided_by_the_threshold_alone_a_low_one_keeps_quiet(p_silent: float, speaks: bool) -> None:
    session = make_session(threshold=0.1, decide_by="threshold")
    session.add_frame(0, 0.0, FRAME)
    session.advance()
    entries = session.resolve_frames(session.work(), [Decision(p_silent, silence_wins=False)])
    assert any(isinstance(entry, ResponseStarted) for entry in entries) is speaks


def test_queries_left_at_the_end_are_answered_before_the_session_ends() -> None:
    driver = Driver(make_session())
    driver.session.add(Query(query_id="q", text="What was it?", after_seq=-1, time=99.0))
    driver.frames(0, 2)
    driver.session.add(End(after_seq=1))
    log = driver.run()
    assert [entry.query_id for entry in driver.of(QueryConsumed)] == ["q"]
    assert isinstance(log[-1], SessionEnded)
    assert not driver.step()


def test_the_end_waits_for_frames_before_it() -> None:
    driver = Driver(make_session())
    driver.session.add(End(after_seq=1))
    driver.frames(0, 1)
    assert not isinstance(driver.run()[-1], SessionEnded)
    driver.frames(1, 2)
    assert isinstance(driver.run()[-1], SessionEnded)


def test_frames_are_decided_in_order_of_seq_whatever_the_order_they_come_in() -> None:
    driver = Driver(make_session(), run=4)
    for seq in (2, 0, 3, 1, 1):
        driver.session.add_frame(seq, seq / 2, FRAME)
    driver.run()
    assert [seq for entry in driver.of(FramesDecided) for seq in range(entry.first_seq, entry.last_seq + 1)] == [
        0,
        1,
        2,
        3,
    ]


def test_a_skipped_frame_is_logged_in_its_place_and_leaves_no_trace_in_the_context() -> None:
    driver = Driver(make_session(), run=8)
    driver.session.skip_frame(1, 0.5, "not an image")
    driver.frames(0, 1)
    driver.frames(2, 3)
    driver.run()
    assert [type(entry) for entry in driver.log] == [FramesDecided, FrameSkipped, FramesDecided]
    assert driver.session.context.ids == rendered(stream(2))[:-1]


def test_settings_apply_after_their_frame() -> None:
    driver = Driver(make_session(), speaks=lambda seq: True, run=8)
    driver.session.add(SettingsChange(after_seq=1, settings=SessionSettings(threshold=0.0)))
    driver.frames(0, 4)
    driver.run()
    assert [entry.seq for entry in driver.of(ResponseStarted)] == [0, 1]
    assert len(driver.of(SettingsApplied)) == 1


def test_new_instructions_rebuild_the_context_behind_them() -> None:
    driver = Driver(make_session())
    driver.frames(0, 3)
    driver.run()
    driver.session.add(SettingsChange(after_seq=2, settings=SessionSettings(instructions="Be brief.")))
    driver.run()
    expected = TEMPLATE.render([{"role": "system", "content": "Be brief."}, stream(3)]).input_ids[:-1]
    assert driver.session.context.ids == expected
    assert driver.session.fed == len(expected) or driver.session.pending <= 64


def test_long_new_instructions_leave_the_context_within_its_capacity() -> None:
    limits = Limits(1000, memory_tokens=20)
    driver = Driver(make_session(limits, max_response_tokens=20))
    driver.frames(0, 75)
    driver.run()
    before = driver.session.context.length
    long = "word " * 150
    driver.session.add(
        SettingsChange(after_seq=74, settings=SessionSettings(instructions=long, max_response_tokens=20))
    )
    driver.run()
    assert driver.of(InputRefused) == []
    assert before > 800  # so that all of it and the longer prompt are too much
    assert driver.session.context.length <= limits.capacity
    assert driver.session.settings.instructions == long


def test_settings_that_do_not_fit_are_refused_and_the_session_goes_on() -> None:
    driver = Driver(make_session(Limits(1000)))
    driver.session.add(SettingsChange(after_seq=-1, settings=SessionSettings(window_trigger=5000)))
    driver.frames(0, 1)
    driver.run()
    assert "5000" in driver.of(InputRefused)[0].reason
    assert driver.session.next_seq == 1


def test_a_session_without_room_for_its_prompt_is_refused() -> None:
    with pytest.raises(SessionError, match="positions"):
        make_session(Limits(220), instructions="word " * 300)


def test_a_question_longer_than_the_window_is_refused_by_name() -> None:
    driver = Driver(make_session(Limits(400, memory_tokens=20), max_response_tokens=20))
    driver.session.add(Query(query_id="q", text="why " * 400, after_seq=-1))
    driver.frames(0, 1)
    driver.run()
    assert driver.of(InputRefused)[0].query_id == "q"
    assert driver.session.next_seq == 1


def test_eviction_keeps_prompt_pinned_query_memory_and_the_newest_frames() -> None:
    session = make_session(Limits(500, memory_tokens=40), max_response_tokens=20)
    driver = Driver(session, speaks=lambda seq: seq % 7 == 3)
    session.add(Query(query_id="q", text="Please narrate.", after_seq=-1, time=0.0))
    driver.frames(0, 200)
    driver.run()
    evictions = driver.of(Evicted)
    assert len(evictions) > 3
    assert all(entry.pinned == "Please narrate." for entry in evictions)
    assert all("You cut the onion." in entry.memory for entry in evictions)
    assert session.next_seq == 200
    assert (
        session.context.ids[: len(rendered(user("Please narrate."))) - 1][-8:]
        == rendered(user("Please narrate."))[-9:-1]
    )


def test_the_window_settings_bound_the_context() -> None:
    session = make_session(Limits(4000, memory_tokens=20), window_trigger=300, window_keep=150, max_response_tokens=10)
    driver = Driver(session, speaks=lambda seq: seq % 5 == 0)
    lengths = []
    driver.frames(0, 100)
    while driver.step():
        lengths.append(session.context.length)
    assert max(lengths) <= 300 + 16 + 10


def test_1200_live1plus_frames_fit_without_eviction_when_so_set() -> None:
    driver = Driver(make_session(Limits(13_600)), run=64)
    driver.frames(0, 1200)
    driver.run()
    assert not driver.of(Evicted)
    assert driver.session.context.length == len(rendered(stream(1200))) - 1


def test_duplicates_are_marked_only_when_asked_for_and_never_for_answers() -> None:
    for suppress, reasons in [(False, ["eos"] * 3), (True, ["eos", "duplicate", "eos"])]:
        driver = Driver(make_session(suppress_duplicates=suppress), speaks=lambda seq: seq < 2)
        driver.session.add(Query(query_id="q", text="What now?", after_seq=-1, time=1.0))
        driver.frames(0, 3)
        driver.run()
        assert [entry.reason for entry in driver.of(ResponseEnded)] == reasons
        assert driver.session.suppressed == reasons.count("duplicate")


def test_giving_up_ends_a_response_and_the_session_at_once() -> None:
    driver = Driver(make_session(), speaks=lambda seq: seq == 0)
    driver.frames(0, 9)
    driver.step(), driver.step()
    driver.session.give_up("client_gone")
    driver.run()
    assert [entry.reason for entry in driver.of(ResponseEnded)] == ["interrupted"]
    assert isinstance(driver.log[-1], SessionEnded)
    assert driver.log[-1].reason == "client_gone"
    assert driver.session.next_seq == 1


def test_nearly_equal_ignores_case_and_punctuation_only() -> None:
    assert nearly_equal("You cut the onion.", "you cut the onion")
    assert not nearly_equal("You cut the onion.", "You wash a bowl.")


def test_half_a_character_waits_for_its_rest() -> None:
    ids = [token.id for token in TEMPLATE.plain.encode(" caf\u00e9 \u2603!")]
    driver = Driver(make_session(), speaks=lambda seq: True, reply=[*ids, TEMPLATE.eos_id])
    driver.frames(0, 1)
    driver.run()
    texts = [entry.text for entry in driver.of(ResponseTokens)]
    assert "".join(texts) == "caf\u00e9 \u2603!"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("frames"), st.integers(1, 12)),
        st.tuples(st.just("query"), st.floats(0, 20)),
        st.tuples(st.just("live"), st.integers(0, 3)),
        st.tuples(st.just("interrupt"), st.integers(0, 3)),
        st.tuples(st.just("skip"), st.integers(0, 0)),
        st.tuples(st.just("steps"), st.integers(1, 15)),
        st.tuples(st.just("threshold"), st.sampled_from([0.0, 0.5, 1.0])),
    ),
    max_size=25,
)


def play(ops: list[tuple], speaking: set[int], run: int) -> Driver:
    """A random stream, driven to its end."""
    session = make_session(Limits(420, memory_tokens=20), max_response_tokens=8)
    driver = Driver(session, speaks=lambda seq: seq in speaking, run=run)
    admitted = 0
    for count, (name, value) in enumerate(ops):
        if name == "frames":
            driver.frames(admitted, admitted + value)
            admitted += value
        elif name == "query":
            session.add(Query(query_id=f"q{count}", text="What now?", after_seq=admitted - 1, time=value))
        elif name == "live":
            session.add(Query(query_id=f"q{count}", text="And now?", after_seq=admitted - 1, interrupt=value == 3))
        elif name == "interrupt":
            session.add(Interrupt(after_seq=admitted - 1))
        elif name == "skip":
            session.skip_frame(admitted, admitted / 2, "not an image")
            admitted += 1
        elif name == "threshold":
            session.add(
                SettingsChange(
                    after_seq=admitted - 1, settings=session.settings.model_copy(update={"threshold": value})
                )
            )
        else:
            for _ in range(value):
                driver.step()
    session.add(End(after_seq=admitted - 1))
    driver.run()
    driver.admitted = admitted
    return driver


@settings(max_examples=150, deadline=None)
@given(operations, st.sets(st.integers(0, 150)), st.sampled_from([1, 5, 32]))
def test_every_frame_is_decided_once_in_order_and_every_query_answered(ops: list, speaking: set[int], run: int) -> None:
    driver = play(ops, speaking, run)
    seqs = []
    for entry in driver.log:
        if isinstance(entry, FramesDecided):
            seqs += range(entry.first_seq, entry.last_seq + 1)
        elif isinstance(entry, FrameSkipped):
            seqs.append(entry.seq)
    assert seqs == list(range(driver.admitted))
    asked = sum(name in ("query", "live") for name, _ in ops)
    assert len(driver.of(QueryConsumed)) == asked
    assert len(driver.of(ResponseStarted)) == len(driver.of(ResponseEnded))
    assert isinstance(driver.log[-1], SessionEnded)


@settings(max_examples=100, deadline=None)
@given(operations, st.sets(st.integers(0, 150)), st.data())
def test_a_session_rebuilt_from_its_log_is_the_session(ops: list, speaking: set[int], data: st.DataObject) -> None:
    driver = play(ops, speaking, 5)
    cut = data.draw(st.integers(0, len(driver.log)))
    again = make_session(Limits(420, memory_tokens=20), max_response_tokens=8)
    for seq in range(driver.admitted):
        again.add_frame(seq, seq / 2, FRAME)
    again.restore(driver.log[:cut])
    replayed = make_session(Limits(420, memory_tokens=20), max_response_tokens=8)
    for seq in range(driver.admitted):
        replayed.add_frame(seq, seq / 2, FRAME)
    replayed.restore(driver.log[:cut])
    replayed.restore(driver.log[cut:])
    assert replayed.context.ids == driver.session.context.ids
    assert (replayed.next_seq, replayed.responses, replayed.ended) == (
        driver.session.next_seq,
        driver.session.responses,
        True,
    )
    assert again.context.length <= replayed.limits.capacity


def test_long_texts_are_compared_by_words() -> None:
    words = [f"word{number}" for number in range(1000)]
    assert nearly_equal(" ".join(words), " ".join([*words[:500], "other", *words[501:]]))
    assert not nearly_equal(" ".join(words), " ".join(words[::-1]))


def test_an_interrupt_of_a_response_that_has_ended_cuts_no_other() -> None:
    for named, ends in (("s-0", "eos"), ("s-1", "interrupted"), (None, "interrupted")):
        driver = Driver(make_session())
        for number in (1, 2):
            driver.session.add(Query(query_id=f"q{number}", text="And now?", after_seq=0))
        driver.frames(0, 1)
        while driver.session.response is None or driver.session.response.response_id != "s-1":
            assert driver.step()
        driver.session.add(Interrupt(after_seq=0, response_id=named))
        driver.run()
        assert [entry.reason for entry in driver.of(ResponseEnded)] == ["eos", ends]


def test_a_window_that_would_move_every_few_frames_is_refused() -> None:
    with pytest.raises(SessionError, match=r"window_keep is 290, more than 0.75 of window_trigger \(300\)"):
        make_session(Limits(4000), window_trigger=300, window_keep=290)
