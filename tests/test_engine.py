"""Both backends: the golden streaming scenarios, and the batched engine against the reference."""

from __future__ import annotations

import lzma
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from golden_files import GOLDEN, read_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor
from transformers import LlamaConfig

from actors import checkpoint
from actors.backends import build_engine
from actors.batched import BatchedEngine
from actors.checkpoint import Loaded
from actors.config import ModelConfig
from actors.encoder import FrameEncoder
from actors.engine import Engine, EngineConfig, EngineError, NoCapacity
from actors.kv import PAGE, KVMemory, Region
from actors.messages import (
    End,
    Evicted,
    FramesDecided,
    FrameSkipped,
    Interrupt,
    LogEntry,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
    SessionEnded,
    SessionSettings,
    SettingsChange,
)
from actors.reference import ReferenceEngine
from actors.sampling import sample
from actors.session import Decision, Session, Work

TIE = 1e-4
BACKENDS = ["reference", "batched"]
CLEAN = [
    "narrate_from_zero_th0.0",
    "narrate_from_zero_th0.3",
    "narrate_from_zero_th0.725",
    "no_query",
    "skipping_video_times",
    "threshold_above_one_always_replies",
]


@pytest.fixture(scope="module")
def loaded(tiny_configs: dict[str, ModelConfig]) -> dict[str, Loaded]:
    return {version: checkpoint.load(config) for version, config in tiny_configs.items()}


@cache
def videos() -> dict[str, Tensor]:
    return load(lzma.open(GOLDEN / "liveinfer/videos.safetensors.xz").read())


Features = Callable[[str, str], Tensor]


@pytest.fixture(scope="module")
def features(tiny_configs: dict[str, ModelConfig]) -> Features:
    """Frame tokens (F, N, 48) of a golden video in fp32."""
    encoders = {version: FrameEncoder(config) for version, config in tiny_configs.items()}

    @cache
    def encode(name: str, version: str) -> Tensor:
        return encoders[version].encode(videos()[name].permute(0, 2, 3, 1).numpy()).clone()

    return encode


class Player:
    """Plays a golden scenario's operations on an engine, fed as fast as the engine goes."""

    def __init__(self, engine: Engine, session: Session, tokens: Tensor, fps: float) -> None:
        self.engine, self.session, self.tokens, self.fps = engine, session, tokens, fps
        self.shown = self.asked = 0
        self.log: list[LogEntry] = []

    def play(self, operation: list) -> None:
        name, *values = operation
        if name == "query":
            text, time = values
            query = Query(query_id=f"q{self.asked}", text=text, after_seq=self.shown - 1, time=time)
            self.session.add(query)
            self.asked += 1
        elif name == "video":
            stop = min(int(values[0] * self.fps) + 1, len(self.tokens))
            for seq in range(self.shown, stop):
                self.session.add_frame(seq, seq / self.fps, self.tokens[seq])
            self.shown = max(self.shown, stop)
        elif name in ("call", "drain"):
            self.log += drain(self.engine)

    def of(self, kind: type) -> list:
        return [entry for entry in self.log if isinstance(entry, kind)]


def drain(engine: Engine) -> list[LogEntry]:
    log: list[LogEntry] = []
    while True:
        for _, entries in engine.step():
            log += entries
        if engine.idle:
            return log


def play_scenario(
    scenario: dict, version: str, backend: str, loaded: dict[str, Loaded], features: Features, fps: float = 2
) -> Player:
    threshold = next((log["op"][1] for log in scenario["log"] if log["op"][0] == "threshold"), 0.725)
    engine = build_engine(
        loaded[version].model,
        loaded[version].template,
        EngineConfig(backend=backend, token_budget=128, max_positions=2048, kv_memory_gb=0.01),
    )
    session = engine.open("s", SessionSettings(threshold=threshold))
    player = Player(engine, session, features(scenario["video_tensor"], version), fps)
    for entry in scenario["log"]:
        player.play(entry["op"])
    player.log += drain(engine)
    return player


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_golden_scenarios_match_exactly(
    name: str, backend: str, loaded: dict[str, Loaded], features: Features
) -> None:
    scenario = read_json("liveinfer/live1plus.json")[name]
    player = play_scenario(scenario, "live1plus", backend, loaded, features)
    expected = scenario["context_ids"]
    assert player.session.context.ids[: len(expected)] == expected
    golden = [frame[0] for frame in scenario["frame_probs__interval__best_other_id__its_prob"]]
    ours = [p for entry in player.of(FramesDecided) for p in entry.p_silent]
    assert ours == pytest.approx(golden, abs=1e-4)
    replies = [r["response"] for log in scenario["log"] for r in log.get("results", []) if r["response"]]
    started = {entry.response_id: entry for entry in player.of(ResponseStarted)}
    assert replies == [
        f"(Video Time = {started[entry.response_id].time}s) Assistant: {entry.text}"
        for entry in player.of(ResponseEnded)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_live_query_scenario_matches_until_its_query(
    backend: str, loaded: dict[str, Loaded], features: Features
) -> None:
    """From there on the reference feeds no eos before the query (finding 5.3)."""
    scenario = read_json("liveinfer/live1plus.json")["live_query_without_time"]
    player = play_scenario(scenario, "live1plus", backend, loaded, features)
    template = loaded["live1plus"].template
    ours, golden = player.session.context.ids, scenario["context_ids"]
    same = next(i for i, (one, other) in enumerate(zip(ours, golden, strict=False)) if one != other)
    assert same > 50
    assert ours[same] == template.eos_id
    assert [entry.text for entry in player.of(ResponseEnded)][:2] == ["You wash a bowl in the sink."] * 2
    assert player.of(QueryConsumed)[0].time == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_live1_streams_where_the_reference_cannot(backend: str, loaded: dict[str, Loaded], features: Features) -> None:
    scenario = read_json("liveinfer/live1.json")["narrate_from_zero_th0.725"]
    assert any("error" in entry for entry in scenario["log"])
    player = play_scenario(scenario, "live1", backend, loaded, features)
    player.play(["video", len(player.tokens) / 2])
    player.log += drain(player.engine)
    template = loaded["live1"].template
    assert template.silence_id == template.eos_id
    assert seqs(player.log) == list(range(len(player.tokens)))
    texts = [entry.text for entry in player.of(ResponseEnded)]
    assert len(texts) > 3
    assert all(text.startswith("You ") and text.endswith(".") for text in texts)


@dataclass
class Trace:
    """What a session decided, with the distance of each choice to a tie.

    Where `oracle` made a choice that was a tie, its choice is taken, so that both go on from there alike.
    """

    steps: list[tuple[str, object, float]] = field(default_factory=list)
    oracle: Trace | None = None
    ties: int = 0

    def settle(self, kind: str, choice: object, margin: float) -> object:
        """The choice to go on with; it is recorded."""
        number = len(self.steps)
        if self.oracle is not None and number < len(self.oracle.steps):
            other_kind, other, other_margin = self.oracle.steps[number]
            if kind == other_kind and choice != other and other_margin < TIE:
                self.ties += 1
                choice = other
        self.steps.append((kind, choice, margin))
        return choice


class Traced(Session):
    """Records decisions and tokens; a choice's margin counts the threshold, too."""

    gap = float("inf")

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.trace = Trace()

    def resolve_frames(self, work: Work, decisions: list[Decision]) -> list[LogEntry]:
        threshold = self.settings.threshold
        settled: list[Decision] = []
        for decision in decisions:
            speaks = decision.p_silent < threshold or not decision.silence_wins
            margin = min(abs(decision.p_silent - threshold), decision.margin if decision.p_silent >= threshold else 1.0)
            taken = self.trace.settle("frame", speaks, margin)
            settled.append(decision if taken == speaks else Decision(0.0 if taken else 1.0, not taken))
            if taken:
                break
        return super().resolve_frames(work, [*settled, *decisions[len(settled) :]])

    def resolve_token(self, work: Work, token_id: int) -> list[LogEntry]:
        taken = self.trace.settle("token", token_id, self.gap)
        assert isinstance(taken, int)
        return super().resolve_token(work, taken)


def gap(logits: Tensor) -> float:
    best = logits.float().topk(2).values
    return float(best[0] - best[1])


class TracedReference(ReferenceEngine):
    session_type = Traced

    def choose(self, session: Session, logits: Tensor) -> int:
        session.gap = gap(logits)
        return super().choose(session, logits)


class TracedBatched(BatchedEngine):
    session_type = Traced

    def choose(self, session: Session, logits: Tensor) -> int:
        session.gap = gap(logits)
        return super().choose(session, logits)


CONFIG = {"max_positions": 700, "memory_tokens": 16, "max_sessions": 8, "kv_memory_gb": 0.05}
VOICE = SessionSettings(threshold=0.5, max_response_tokens=8)
SESSIONS = 4

Input = Query | SettingsChange | tuple[int, Tensor | None]
Event = tuple[int, str, float]
Moment = tuple[int, int, int]

sessions_ = st.integers(0, SESSIONS - 1)
events = st.lists(
    st.tuples(sessions_, st.sampled_from(["frames"] * 4 + ["live", "timed", "threshold", "skip"]), st.floats(0, 1)),
    max_size=12,
)
moments = st.dictionaries(
    st.tuples(sessions_, st.integers(1, 6), st.integers(1, 5)), st.sampled_from(["interrupt", "rebuild"]), max_size=12
)


def scene(session: int, seq: int) -> Tensor:
    """Frame tokens of a world that changes every third frame."""
    base = torch.randn(10, 48, generator=torch.Generator().manual_seed(1000 * session + seq // 3))
    return base + 0.1 * torch.randn(10, 48, generator=torch.Generator().manual_seed(seq))


class World:
    """Sessions on one engine that meet the same input at the same points of their own history.

    A round's input is there before any of it is decided; interrupts and rebuilds strike when a session's
    response of a certain number has said so many tokens (at least one: before that, engines show it at
    different steps). Nothing else may depend on how steps are batched.
    """

    def __init__(self, engine: Engine, moments: dict[Moment, str]) -> None:
        self.engine, self.moments = engine, dict(moments)
        self.sessions = [engine.open(f"s{i}", VOICE) for i in range(SESSIONS)]
        self.inputs: list[list[Input]] = [[] for _ in range(SESSIONS)]
        self.admitted = [0] * SESSIONS
        self.logs: list[list[LogEntry]] = [[] for _ in range(SESSIONS)]
        self.asked = 0
        self.happened = Counter[str]()

    def play(self, rounds: list[list[Event]]) -> None:
        for happening in rounds:
            for index, name, value in happening:
                self.event(index, name, value)
            self.settle()
        for index, session in enumerate(self.sessions):
            session.add(End(after_seq=self.admitted[index] - 1))
        self.settle()

    def settle(self) -> None:
        while True:
            for session_id, entries in self.engine.step():
                self.logs[int(session_id[1:])] += entries
                self.happened["eviction"] += sum(isinstance(entry, Evicted) for entry in entries)
            if self.engine.idle:
                return
            for index, session in enumerate(self.sessions):
                if session.response is not None:
                    self.strike(index, self.moments.pop((index, session.responses, len(session.response.ids)), ""))

    def strike(self, index: int, what: str) -> None:
        self.happened[what] += 1
        if what == "interrupt":
            self.sessions[index].add(Interrupt(after_seq=self.admitted[index] - 1))
        elif what == "rebuild":
            self.rebuild(index)

    def event(self, index: int, name: str, value: float) -> None:
        last = self.admitted[index] - 1
        self.asked += 1
        if name == "frames":
            for seq in range(last + 1, last + 2 + int(value * 12)):
                self.give(index, (seq, scene(index, seq)))
        elif name == "skip":
            self.give(index, (last + 1, None))
        elif name == "live":
            self.give(index, Query(query_id=f"q{self.asked}", text="What now?", after_seq=last))
        elif name == "timed":
            time = last / 2 + value * 10 + 0.6
            self.give(index, Query(query_id=f"q{self.asked}", text="And now?", after_seq=last, time=time))
        else:
            changed = VOICE.model_copy(update={"threshold": value})
            self.give(index, SettingsChange(after_seq=last, settings=changed))

    def give(self, index: int, item: Input) -> None:
        self.inputs[index].append(item)
        self.admitted[index] += isinstance(item, tuple)
        self.deliver(self.sessions[index], item)

    def deliver(self, session: Session, item: Input) -> None:
        if not isinstance(item, tuple):
            session.add(item)
        elif item[1] is None:
            session.skip_frame(item[0], item[0] / 2, "not an image")
        else:
            session.add_frame(item[0], item[0] / 2, item[1])

    def rebuild(self, index: int) -> None:
        """What a takeover does: a new session from the log and from all input, what was consumed included."""
        old, log = self.sessions[index], self.logs[index]
        self.engine.close(old.session_id)
        session = self.engine.open(old.session_id, VOICE)
        for item in self.inputs[index]:
            self.deliver(session, item)
        if old._end is not None:
            session.add(old._end)
        session.restore(log)
        session.trace = old.trace
        self.sessions[index] = session


def compare(reference: Traced, batched: Traced) -> tuple[int, int]:
    """Assert equal choices wherever the reference's was no tie; how many were compared, how many were ties."""
    for number, (one, other) in enumerate(zip(reference.trace.steps, batched.trace.steps, strict=False)):
        assert one[:2] == other[:2], f"choice {number}: reference {one}, batched {other}"
    assert len(reference.trace.steps) == len(batched.trace.steps)
    return len(reference.trace.steps), batched.trace.ties


def check_equivalence(
    rounds: list[list[Event]], struck: dict[Moment, str], budget: int, loaded: Loaded
) -> tuple[int, int, Counter[str]]:
    """Play both engines: how many choices were compared, how many ties were decided otherwise, and what happened."""
    worlds: list[World] = []
    for kind in (TracedReference, TracedBatched):
        engine = kind(loaded.model, loaded.template, EngineConfig(**CONFIG, token_budget=budget))
        world = World(engine, struck)
        if worlds:
            for session, oracle in zip(world.sessions, worlds[0].sessions, strict=True):
                session.trace.oracle = oracle.trace
        world.play(rounds)
        worlds.append(world)
    reference, batched = worlds
    counts = [compare(one, other) for one, other in zip(reference.sessions, batched.sessions, strict=True)]
    for index in range(SESSIONS):
        assert seqs(batched.logs[index]) == list(range(batched.admitted[index]))
        assert isinstance(batched.logs[index][-1], SessionEnded)
        batched.engine.close(batched.sessions[index].session_id)
    assert isinstance(batched.engine, BatchedEngine)
    assert batched.engine.memory.free_positions == batched.engine.memory.positions
    return sum(count for count, _ in counts), sum(tie for _, tie in counts), batched.happened


def test_ties_are_decided_as_the_oracle_did_and_counted() -> None:
    oracle = Trace([("frame", True, TIE / 2), ("token", 5, 1.0), ("token", 6, TIE / 2)])
    trace = Trace(oracle=oracle)
    assert trace.settle("frame", False, 0.0) is True
    assert trace.settle("token", 4, TIE / 2) == 4, "the oracle was sure: the comparison has to fail"
    assert trace.settle("token", 7, TIE / 2) == 6
    assert trace.settle("token", 8, 0.0) == 8, "beyond what the oracle did"
    assert trace.ties == 2


def seqs(log: list[LogEntry]) -> list[int]:
    """Every frame the log settles, decided or skipped, in its order."""
    found: list[int] = []
    for entry in log:
        if isinstance(entry, FramesDecided):
            found += range(entry.first_seq, entry.last_seq + 1)
        elif isinstance(entry, FrameSkipped):
            found.append(entry.seq)
    return found


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(events, min_size=1, max_size=5), struck=moments, budget=st.sampled_from([48, 128, 512]))
def test_the_batched_engine_decides_as_the_reference(
    loaded: dict[str, Loaded], rounds: list[list[Event]], struck: dict[Moment, str], budget: int
) -> None:
    check_equivalence(rounds, struck, budget, loaded["live1plus"])


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(900)
def test_the_batched_engine_decides_as_the_reference_for_long(loaded: dict[str, Loaded]) -> None:
    """Hundreds of random interleavings; ties stay below 0.1 %."""
    compared = ties = 0
    happened = Counter[str]()
    names = ["frames"] * 4 + ["live", "timed", "threshold", "skip"]
    for seed in range(120):
        dice = random.Random(seed)
        rounds = [
            [(dice.randrange(SESSIONS), dice.choice(names), dice.random()) for _ in range(dice.randrange(12))]
            for _ in range(dice.randrange(1, 6))
        ]
        struck = {
            (dice.randrange(SESSIONS), dice.randrange(1, 7), dice.randrange(1, 6)): dice.choice(
                ["interrupt", "rebuild"]
            )
            for _ in range(12)
        }
        count, tied, seen = check_equivalence(rounds, struck, dice.choice([48, 128, 512]), loaded["live1plus"])
        compared, ties, happened = compared + count, ties + tied, happened + seen
    assert compared > 5_000
    assert ties <= compared / 1000
    assert min(happened[what] for what in ("eviction", "interrupt", "rebuild")) > 20, happened


@pytest.mark.parametrize("budget", [32, 512])
def test_no_session_starves_and_no_memory_leaks(budget: int, loaded: dict[str, Loaded]) -> None:
    model = loaded["live1plus"]
    engine = BatchedEngine(model.model, model.template, EngineConfig(**CONFIG, token_budget=budget))
    free = engine.memory.free_positions
    world = World(engine, {})
    dice = random.Random(2)
    world.play([[(dice.randrange(SESSIONS), "frames", 1.0) for _ in range(40)]])
    assert any(isinstance(entry, Evicted) for log in world.logs for entry in log)
    for session in world.sessions:
        engine.close(session.session_id)
    assert engine.memory.free_positions == free
    assert not engine.sessions


def test_speculation_appends_many_frames_in_one_step_and_keeps_up_to_the_first_that_speaks(
    loaded: dict[str, Loaded],
) -> None:
    class Scripted(Session):
        def resolve_frames(self, work: Work, decisions: list[Decision]) -> list[LogEntry]:
            runs.append(len(decisions))
            scripted = [Decision(0.0 if self.next_seq + i == 20 else 0.99, True) for i in range(len(decisions))]
            return super().resolve_frames(work, scripted)

    class Engine(BatchedEngine):
        session_type = Scripted

    runs: list[int] = []
    model = loaded["live1plus"]
    engine = Engine(model.model, model.template, EngineConfig(token_budget=512))
    session = engine.open("s", SessionSettings(max_response_tokens=4))
    for seq in range(40):
        session.add_frame(seq, seq / 2, scene(0, seq))
    log = drain(engine)
    assert max(runs) >= 8
    (started,) = [entry for entry in log if isinstance(entry, ResponseStarted)]
    assert started.seq == 20
    assert session.next_seq == 40
    assert session.fed + session.pending == session.context.length


def test_admission_says_no_before_memory_runs_out(loaded: dict[str, Loaded]) -> None:
    model = loaded["live1plus"]
    each = KVMemory.bytes_per_position(model.model.base_llm.config, torch.float32)
    config = EngineConfig(max_positions=512, kv_memory_gb=2 * 512 * each / 1e9)
    engine = BatchedEngine(model.model, model.template, config)
    engine.open("a", VOICE), engine.open("b", VOICE)
    with pytest.raises(NoCapacity, match="0 of 1024 are free"):
        engine.open("c", VOICE)
    assert set(engine.sessions) == {"a", "b"}
    engine.close("a")
    engine.open("c", VOICE)


def test_a_context_may_be_longer_than_the_model_was_made_for(
    loaded: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference runs 1,200 frames in 13,200 positions on a model made for 8,192."""
    assert EngineConfig(max_positions=13_600).limits(LlamaConfig(max_position_embeddings=8192)).capacity == 13_600
    model = loaded["live1plus"]
    monkeypatch.setattr(model.model.base_llm.config, "max_position_embeddings", 128)
    seen = []
    for kind in (ReferenceEngine, BatchedEngine):
        engine = kind(model.model, model.template, EngineConfig(max_positions=700, kv_memory_gb=0.05))
        engine.session_type = Forced
        session = engine.open("s", VOICE)
        for seq in range(40):
            session.add_frame(seq, seq / 2, scene(2, seq))
        log = drain(engine)
        assert session.context.length > 400
        assert not any(isinstance(entry, Evicted) for entry in log)
        assert isinstance(session, Forced)
        seen.append(session.probabilities)
    assert seen[0] == pytest.approx(seen[1], abs=1e-4)


def test_positions_that_depend_on_the_length_do_not_go_on() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    llm = LlamaConfig(max_position_embeddings=512, rope_parameters=rope)
    with pytest.raises(ValueError, match="max_positions is 513"):
        EngineConfig(max_positions=513).limits(llm)
    assert EngineConfig(max_positions=512).limits(llm).capacity == 512


def test_memory_too_small_for_one_session_is_refused_at_once(loaded: dict[str, Loaded]) -> None:
    model = loaded["live1plus"]
    with pytest.raises(ValueError, match="kv_memory_gb"):
        BatchedEngine(model.model, model.template, EngineConfig(kv_memory_gb=0.0001))


def test_released_neighbours_become_one_region() -> None:
    memory = KVMemory(
        LlamaConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4),
        1024,
        torch.float32,
        torch.device("cpu"),
    )
    regions = [memory.reserve(200) for _ in range(4)]
    for index in (1, 3, 0, 2):
        memory.release(regions[index])
    assert memory.reserve(1024) == Region(0, 1024)
    with pytest.raises(NoCapacity):
        memory.reserve(1)


@pytest.mark.parametrize(
    "voice",
    [{"temperature": 1e-40}, {"temperature": 1, "top_p": 1e-50}, {"temperature": 2e-5, "repetition_penalty": 1e-40}],
)
def test_settings_at_their_edges_choose_a_likely_token(voice: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 5.0, -3.0, 4.0])
    said = [1, 3] if "repetition_penalty" in voice else []
    assert sample(logits, SessionSettings.model_validate(voice), said, (0, 0)) in ((1, 3) if said else (1,))


def test_a_budget_that_holds_no_session_in_whole_pages_is_refused(loaded: dict[str, Loaded]) -> None:
    model = loaded["live1plus"]
    each = KVMemory.bytes_per_position(model.model.base_llm.config, model.model.base_llm.dtype)
    capacity = 2 * PAGE + 1
    for pages, fits in ((3, True), (2.9, False)):
        config = EngineConfig(max_positions=capacity, kv_memory_gb=(pages * PAGE + 0.5) * each / 1e9)
        if fits:
            assert BatchedEngine(model.model, model.template, config).room == 1
        else:
            with pytest.raises(ValueError, match="whole pages"):
                BatchedEngine(model.model, model.template, config)


def test_sessions_that_wait_for_frames_do_not_keep_others_from_theirs(loaded: dict[str, Loaded]) -> None:
    """As many idle sessions as a step has places, all served less lately than the one with frames."""
    model = loaded["live1plus"]
    config = EngineConfig(max_positions=700, kv_memory_gb=0.05, token_budget=40, max_sessions=8)
    engine = BatchedEngine(model.model, model.template, config)
    busy = engine.open("busy", VOICE)
    busy.add_frame(0, 0.0, scene(0, 0))
    drain(engine)
    for number in range(6):
        engine.open(f"idle{number}", VOICE).add_frame(1, 0.5, scene(0, 1))  # its frame 0 has not come
    busy.add_frame(1, 0.5, scene(0, 1))
    drain(engine)
    assert busy.next_seq == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_goes_on_after_a_rebuild_as_it_would_have(temperature: float, loaded: dict[str, Loaded]) -> None:
    model = loaded["live1plus"]
    voice = SessionSettings(threshold=0.0, max_response_tokens=30, temperature=temperature, top_p=0.9, seed=7)

    def speak(stop_after: int | None) -> list[int]:
        engine = BatchedEngine(model.model, model.template, EngineConfig(max_positions=700, kv_memory_gb=0.05))
        session = engine.open("s", voice)
        session.add_frame(0, 0.0, scene(1, 0))
        session.add(Query(query_id="q", text="Tell me a long story.", after_seq=0))
        log: list[LogEntry] = []
        while sum(isinstance(entry, ResponseTokens) for entry in log) != stop_after:
            log += [entry for _, entries in engine.step() for entry in entries]
            if engine.idle:
                return [i for entry in log if isinstance(entry, ResponseTokens) for i in entry.ids]
        engine.close("s")
        session = engine.open("s", voice)
        session.add_frame(0, 0.0, scene(1, 0))
        session.restore(log)
        log += drain(engine)
        return [i for entry in log if isinstance(entry, ResponseTokens) for i in entry.ids]

    whole = speak(None)
    assert len(whole) > 3
    assert speak(2) == whole


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("version", ["live1", "live1plus"])
def test_in_bf16_it_is_no_farther_from_float32_than_the_reference(
    version: str, device: str, tiny_configs: dict[str, ModelConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Teacher-forced: all see the same silent streams; no decision can drift apart."""

    def seen(kind: type[ReferenceEngine] | type[BatchedEngine], dtype: torch.dtype) -> Tensor:
        loaded = checkpoint.load(tiny_configs[version], device, dtype=dtype)
        probabilities = []
        for number in range(4):
            engine = kind(loaded.model, loaded.template, EngineConfig(max_positions=700, kv_memory_gb=0.05))
            engine.session_type = Forced
            session = engine.open("s", VOICE)
            for seq in range(40):
                session.add_frame(seq, seq / 2, scene(number, seq)[: loaded.model.frame_shape[0]])
            drain(engine)
            assert isinstance(session, Forced)
            probabilities += session.probabilities
        assert len(probabilities) == 160
        return torch.tensor(probabilities)

    exact = seen(ReferenceEngine, torch.float32)
    (theirs, right), (ours, also) = (
        ((exact - found).abs(), int(((exact < VOICE.threshold) == (found < VOICE.threshold)).sum()))
        for found in (seen(ReferenceEngine, torch.bfloat16), seen(BatchedEngine, torch.bfloat16))
    )
    with capsys.disabled():
        for name, far, agreed in (("reference", theirs, right), ("batched", ours, also)):
            print(f" {name}: |dP| at most {far.max():.4f}, mean {far.mean():.4f}, {agreed} of 160 agree.", end="")
    assert float(ours.mean()) <= 1.25 * float(theirs.mean())
    assert also >= right - 2


class Forced(Session):
    """Stays silent whatever the model says, and notes what it said."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.probabilities: list[float] = []

    def resolve_frames(self, work: Work, decisions: Sequence[Decision]) -> list[LogEntry]:
        self.probabilities += [decision.p_silent for decision in decisions]
        return super().resolve_frames(work, [Decision(1.0, True) for _ in decisions])


def test_without_a_cut_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    wanted = torch.softmax(logits, -1)
    settings = SessionSettings(temperature=1.0)
    drawn = torch.tensor([sample(logits, settings, [], (0, number)) for number in range(4000)])
    assert torch.bincount(drawn, minlength=4) / 4000 == pytest.approx(wanted, abs=0.03)
    assert sample(logits, settings, [], (1, 5)) == sample(logits, settings, [], (1, 5))


def test_a_window_that_keeps_all_of_itself_is_refused_at_start() -> None:
    llm = LlamaConfig(max_position_embeddings=512)
    with pytest.raises(EngineError, match=r"window_keep is 300, expected less than window_trigger .*\(300\)"):
        EngineConfig(window_trigger=300, window_keep=300).limits(llm)
    with pytest.raises(EngineError, match=r"window_keep is 512, .*\(512\)"):
        EngineConfig(window_keep=512).limits(llm)


def test_positions_that_depend_on_neighbours_are_refused(loaded: dict[str, Loaded]) -> None:
    model = loaded["live1plus"]
    llm = model.model.base_llm
    before = llm.config.rope_parameters
    try:
        llm.config.rope_parameters = {**before, "rope_type": "longrope", "original_max_position_embeddings": 300}
        with pytest.raises(EngineError, match=r"longrope.*set engine.max_positions to 300"):
            BatchedEngine(model.model, model.template, EngineConfig(max_positions=301, kv_memory_gb=0.05))
    finally:
        llm.config.rope_parameters = before
