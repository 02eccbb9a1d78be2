from __future__ import annotations

from collections.abc import Callable, Collection
from math import exp, log

import pytest
import torch
from golden_files import GOLDEN, read_json, template
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from actors import checkpoint
from actors.config import ModelConfig
from actors.dialogue import Rendered, Template
from actors.turns import Assistant, Stream, System, Turn, User
from jobs.dataset import clip
from jobs.metrics import NOTHING_GRADED, Forward, Reply, evaluate, forward_of, paper_average, paper_row, summarize

VERSIONS = ("live1", "live1plus")
CASES = [(version, case) for version in VERSIONS for case in read_json(f"stream_evaluate/{version}.json")["cases"]]
SYSTEM = System(content="s.")
NAMES = {
    "num_frames": "num_frames",
    "num_learned_stream_tokens": "num_decisions",
    "num_learned_lm_tokens": "num_text",
    "num_lm_correct_tokens": "num_correct",
    "signed_frame_diff": "frame_diff",
    "branch": "outcome",
}


@pytest.fixture(scope="module")
def forwards(tiny_configs: dict[str, ModelConfig]) -> dict[str, Forward]:
    """The reference's tiny models."""
    return {version: forward_of(checkpoint.load(config).model) for version, config in tiny_configs.items()}


@pytest.fixture(scope="module")
def grade(forwards: dict[str, Forward]) -> Callable[..., list[Reply]]:
    """Grades a golden case with the model it was made with."""

    def grade(version: str, case: str, threshold: float, mode: str) -> list[Reply]:
        kind, dialogue, frames = golden_case(version, case)
        return evaluate(forwards[version], kind, dialogue, frames, threshold, mode)

    return grade


def golden_case(version: str, case: str) -> tuple[Template, Rendered, Tensor]:
    kind = template("tiny", version)
    tensors = load_file(GOLDEN / "stream_evaluate" / f"{version}.safetensors")
    dialogue = kind.render(read_json(f"stream_evaluate/{version}.json")["cases"][case]["conversation"])
    assert dialogue.input_ids == tensors[f"{case}/input_ids"][0].tolist()
    assert dialogue.labels == tensors[f"{case}/labels"][0].tolist()
    return kind, dialogue, tensors[f"{case}/frames"].reshape(dialogue.num_frames, kind.frames.num_tokens, 48)


@pytest.mark.parametrize(("version", "case"), CASES)
def test_paper_mode_equals_the_reference_reply_by_reply(
    version: str, case: str, grade: Callable[..., list[Reply]]
) -> None:
    for threshold, golden in read_json(f"stream_evaluate/{version}.json")["cases"][case]["results"].items():
        replies = grade(version, case, float(threshold), "paper")
        expected = golden["lm_ppl__frame_diff__fluency__lm_correctness"]
        assert paper_row(replies) == pytest.approx(expected, abs=1e-4)
        for reply, turn in zip(replies, golden["turns"], strict=True):
            assert [reply.start, reply.stop] == turn["token_range"]
            for theirs, ours in NAMES.items():
                assert getattr(reply, ours) == turn.get(theirs)
            assert reply.lm_ppl == pytest.approx(turn.get("lm_ppl"), abs=1e-4)
            assert reply.fluency == pytest.approx(turn.get("fluency"), abs=1e-4)
            assert reply.p_silent == pytest.approx(turn.get("interval_prob_at_learned_frames", []), abs=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_cases_take_every_branch(version: str) -> None:
    golden = read_json(f"stream_evaluate/{version}.json")
    results = [result for case in golden["cases"].values() for result in case["results"].values()]
    taken = {turn.get("branch") for result in results for turn in result["turns"]} - {None}
    assert taken == {branch for branch, hits in golden["branch_hits"].items() if hits}
    assert len(taken) == 6


def test_paper_averages_dialogues_and_counts_seconds() -> None:
    golden = read_json("metrics/narration.json")
    metrics = paper_average([tuple(row) for row in golden["predictions"]], golden["frame_fps"], {})
    for name, value in golden["result"].items():
        assert getattr(metrics, name) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("version", "case"), [(v, case) for v, case in CASES if case != "learn_int"])
def test_both_modes_agree_on_an_answer_in_time_or_early(
    version: str, case: str, grade: Callable[..., list[Reply]]
) -> None:
    paper = {reply.stop: reply for reply in grade(version, case, 0.725, "paper")}
    for reply in grade(version, case, 0.725, "strict"):
        if reply.outcome in ("early", "on_time"):
            assert (reply.outcome, reply.frame_diff) == (paper[reply.stop].outcome, paper[reply.stop].frame_diff)
        assert reply.p_silent == paper[reply.stop].p_silent if reply.outcome else True


# A scripted model, so that facts do not depend on what a trained one happens to say.
class Scripted:
    """Speaks at the frames in `speaks` (counted from the dialogue's first) and nowhere else.

    Text is said as labelled, but for `mistakes` (positions). Keeps the frames of every call.
    """

    def __init__(
        self, kind: Template, dialogue: Rendered, speaks: Collection[int], mistakes: Collection[int] = ()
    ) -> None:
        self.kind, self.dialogue, self.speaks, self.mistakes = kind, dialogue, set(speaks), set(mistakes)
        self.calls: list[Tensor] = []

    def __call__(self, input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        self.calls.append(frames)
        placeholder = input_ids == self.kind.frame_id
        assert placeholder.sum() == frames.shape[0] * frames.shape[1]
        logits = torch.zeros(len(positions), self.kind.frame_id)
        for row, position in enumerate(positions.tolist()):
            if placeholder[position]:
                frame = int(placeholder[: position + 1].sum()) // self.kind.frames.num_tokens - 1
                said = self.kind.plain.encode("]")[0].id if frame in self.speaks else self.kind.silence_id
            else:
                said = 0 if position in self.mistakes else self.dialogue.labels[position]
            logits[row, said] = 20.0
        return logits


def scripted(
    turns: list[Turn], speaks: Collection[int], version: str = "live1plus", mode: str = "strict"
) -> list[Reply]:
    kind = template("tiny", version)
    dialogue = kind.render(turns)
    frames = torch.arange(dialogue.num_frames).repeat(kind.frames.num_tokens, 1).T[..., None]
    return evaluate(Scripted(kind, dialogue, speaks), kind, dialogue, frames, 0.725, mode)


def stream(num_frames: int, learn: bool | int = True) -> Stream:
    return Stream(num_frames=num_frames, learn=learn)


ANSWER = Assistant(content="You look around.", learn=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_never_speaking_in_the_last_reply_is_rewarded_in_paper_mode_only(version: str) -> None:
    turns = [SYSTEM, stream(4), ANSWER]
    (paper,) = scripted(turns, {}, version, "paper")
    (strict,) = scripted(turns, {}, version)
    assert (paper.outcome, paper.frame_diff, paper.fluency) == ("silent_in_last_turn_counted_as_0", 0, 1.0)
    assert (strict.outcome, strict.frame_diff) == ("never", -4)
    assert strict.fluency == 3 / (4 + strict.num_text)


@pytest.mark.parametrize("version", VERSIONS)
def test_never_speaking_where_no_frame_can_follow_is_rewarded_in_paper_mode_only(version: str) -> None:
    for turns in ([SYSTEM, stream(1), ANSWER, stream(3), ANSWER], [SYSTEM, stream(3), ANSWER, ANSWER]):
        paper, strict = (scripted(turns, {}, version, mode)[0] for mode in ("paper", "strict"))
        assert (paper.outcome, paper.frame_diff, paper.fluency) == ("silent_nothing_to_append_counted_as_0", 0, 1.0)
        assert (strict.outcome, strict.frame_diff) == ("never", -strict.num_decisions)
        assert strict.fluency is not None
        assert strict.fluency < 0.5


def test_never_speaking_costs_more_than_speaking_as_late_as_can_be_seen() -> None:
    turns = [SYSTEM, stream(4), ANSWER, stream(6), ANSWER]
    assert scripted(turns, {6}, mode="paper")[0].frame_diff == scripted(turns, {}, mode="paper")[0].frame_diff == -3
    assert scripted(turns, {6})[0].frame_diff == -3
    assert scripted(turns, {})[0].frame_diff == -4


@pytest.mark.parametrize("version", VERSIONS)
def test_strict_appends_the_frames_that_follow_even_after_a_reply_without_labels(version: str) -> None:
    kind = template("tiny", version)
    unlearned = Assistant(content="You cut the onion.")
    turns = [SYSTEM, stream(5, False), unlearned, stream(3), ANSWER, stream(4), ANSWER]
    dialogue = kind.render(turns)
    frames = torch.arange(12.0).repeat(kind.frames.num_tokens, 1).T[..., None]
    appended = {}
    for mode in ("paper", "strict"):
        model = Scripted(kind, dialogue, range(8, 12))
        evaluate(model, kind, dialogue, frames, 0.725, mode)
        appended[mode] = model.calls[1][8:, 0, 0].tolist()
    assert appended == {"paper": [3.0, 4.0], "strict": [8.0, 9.0]}


def test_a_threshold_alone_stays_silent_where_another_token_is_likelier() -> None:
    kind = template("tiny", "live1plus")
    dialogue = kind.render([SYSTEM, stream(2), ANSWER])
    frames = torch.zeros(2, kind.frames.num_tokens, 1)

    def torn(input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        """Speaking is the likeliest with probability 0.55, silence has 0.44."""
        logits = torch.full((len(positions), kind.frame_id), log(0.01 / (kind.frame_id - 2)))
        logits[:, kind.silence_id], logits[:, kind.plain.encode("]")[0].id] = log(0.44), log(0.55)
        return logits

    def first(threshold: float, by_argmax: bool) -> str | None:
        return evaluate(torn, kind, dialogue, frames, threshold, "strict", by_argmax)[0].outcome

    assert first(0.3, by_argmax=True) == "early"
    assert first(0.3, by_argmax=False) == "never"
    assert first(0.5, by_argmax=False) == "early"


@pytest.mark.parametrize("version", VERSIONS)
def test_strict_compares_only_silence_with_the_threshold(version: str) -> None:
    kind = template("tiny", version)
    dialogue = kind.render([SYSTEM, stream(2), ANSWER])
    frames = torch.zeros(2, kind.frames.num_tokens, 1)

    def unsure(input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        """Silence is the likeliest with probability 0.6."""
        logits = torch.full((len(positions), kind.frame_id), log(0.4 / (kind.frame_id - 1)))
        logits[:, kind.silence_id] = log(0.6)
        return logits

    silent, spoken = (evaluate(unsure, kind, dialogue, frames, threshold)[0] for threshold in (0.59, 0.61))
    assert silent.p_silent == pytest.approx([0.6, 0.6], rel=1e-4)
    assert (silent.outcome, spoken.outcome) == ("never", "early")


@pytest.mark.parametrize("version", VERSIONS)
def test_frames_after_the_last_answer_count_in_strict_mode(version: str) -> None:
    turns = [SYSTEM, stream(2), ANSWER, stream(4)]
    assert len(scripted(turns, {1, 3}, version, "paper")) == 1
    good, bad = scripted(turns, {1}, version)[1], scripted(turns, {1, 3}, version)[1]
    assert (good.outcome, good.fluency, good.num_decisions) == (None, 1.0, 3)
    assert (bad.outcome, bad.fluency, bad.frame_diff) == ("unasked", 1 / 3, None)


def test_strict_finds_a_late_answer_in_frames_after_the_last_answer() -> None:
    turns = [SYSTEM, stream(4), ANSWER, stream(4, False)]
    assert scripted(turns, {5})[0].frame_diff == -2
    assert scripted(turns, {5}, mode="paper")[0].frame_diff == 0


def test_a_dialogue_that_was_clipped_anywhere_is_graded_as_far_as_it_goes() -> None:
    kind = template("tiny", "live1plus")
    whole = kind.render([SYSTEM, stream(2), ANSWER, stream(2), Assistant(content="You", learn=True)])
    graded = set()
    for limit in range(1, len(whole.input_ids) + 1):
        dialogue = clip(whole, limit, kind.frame_id)
        frames = torch.zeros(dialogue.num_frames, 10, 1)
        replies = evaluate(lambda ids, frames, at: torch.zeros(len(at), kind.frame_id), kind, dialogue, frames)
        graded.add(sum(reply.num_text for reply in replies))
    assert graded == set(range(sum(whole.in_answer) + 1))


def test_strict_perplexity_is_that_of_all_answer_tokens() -> None:
    kind = template("tiny", "live1plus")
    turns = [SYSTEM, stream(2), ANSWER, stream(2), Assistant(content="You", learn=True)]
    dialogue = kind.render(turns)
    losses = {False: 0.5, True: 3.0}  # of the first answer's tokens and of the second's

    def forward(input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(len(positions), kind.frame_id)
        for row, position in enumerate(positions.tolist()):
            label = dialogue.labels[position]
            second = sum(dialogue.at_frame[: position + 1]) > 2
            share = exp(-losses[second]) if dialogue.in_answer[min(position + 1, len(dialogue.labels) - 1)] else 1e-6
            logits[row] = log((1 - share) / (kind.frame_id - 1))
            logits[row, label] = log(share)
        return logits

    replies = evaluate(forward, kind, dialogue, torch.zeros(4, 10, 1))
    assert [reply.lm_ppl for reply in replies] == pytest.approx([exp(0.5), exp(3.0)], rel=1e-4)
    long, short = (reply.num_text for reply in replies)
    assert long == sum(dialogue.in_answer) - short
    mean = (long * 0.5 + short * 3.0) / (long + short)
    assert summarize([replies], fps=2).lm_ppl == pytest.approx(exp(mean), rel=1e-4)


def test_correctness_is_the_right_beginning_of_the_answer() -> None:
    kind = template("tiny", "live1plus")
    dialogue = kind.render([SYSTEM, stream(2), ANSWER])
    first = dialogue.in_answer.index(True)
    model = Scripted(kind, dialogue, {1}, mistakes=[first + 1])
    (reply,) = evaluate(model, kind, dialogue, torch.zeros(2, 10, 1))
    assert (reply.num_correct, reply.num_text) == (2, sum(dialogue.in_answer))
    assert reply.fluency == (2 + 2) / (2 + reply.num_text)


@pytest.mark.parametrize("version", VERSIONS)
def test_strict_grades_neither_the_frame_before_a_user_speaks_nor_the_last_of_all(version: str) -> None:
    turns = [SYSTEM, stream(3), User(content="What now?"), stream(2), ANSWER, stream(2)]
    first, after = scripted(turns, {4}, version)
    assert (first.outcome, first.num_decisions, first.fluency) == ("on_time", 4, 1.0)
    assert after.num_decisions == 1
    assert scripted(turns, {2, 4}, version) == scripted(turns, {4}, version)
    assert scripted(turns, {4, 6}, version) == scripted(turns, {4}, version)
    assert scripted(turns, {0, 4}, version)[0].outcome == "early"


def test_strict_expects_no_answer_where_only_silence_is_learned() -> None:
    (reply,) = scripted([SYSTEM, stream(4, 2), ANSWER], {})
    assert (reply.outcome, reply.frame_diff, reply.fluency) == (None, None, 1.0)
    (reply,) = scripted([SYSTEM, stream(4, 2), ANSWER], {1})
    assert (reply.outcome, reply.frame_diff) == ("unasked", None)
    assert scripted([SYSTEM, stream(4, 2), ANSWER], {1}, mode="paper")[0].outcome == "on_time"


@pytest.mark.parametrize("turns", [[SYSTEM, stream(3, False), Assistant(content="x")], [SYSTEM], []])
def test_nothing_graded_is_perfect_in_paper_mode_and_nothing_in_strict(turns: list[Turn]) -> None:
    paper, strict = (scripted(turns, {}, mode=mode) for mode in ("paper", "strict"))
    assert paper_row(paper) == NOTHING_GRADED
    metrics = summarize([strict, []], fps=2)
    assert (metrics.lm_ppl, metrics.time_diff, metrics.fluency, metrics.lm_correctness) == (None, None, None, None)


def test_strict_counts_replies_and_paper_counts_dialogues() -> None:
    long = [SYSTEM, stream(2), ANSWER, stream(2), ANSWER, stream(2), ANSWER]
    short = [SYSTEM, stream(2), ANSWER]
    for mode, seconds in (("strict", (0 + 0 + 0 + 1) / 4 / 2), ("paper", (0 + 1) / 2 / 2)):
        dialogues = [scripted(long, {1, 3, 5}, mode=mode), scripted(short, {0}, mode=mode)]
        metrics = summarize(dialogues, fps=2, mode=mode)
        assert metrics.time_diff == pytest.approx(seconds)
        assert metrics.outcomes == {"on_time": 3, "early": 1}


def test_frames_must_be_those_of_the_dialogue() -> None:
    kind = template("tiny", "live1")
    dialogue = kind.render([SYSTEM, stream(3), ANSWER])
    with pytest.raises(ValueError, match="has 3 frames, 2 were given"):
        evaluate(Scripted(kind, dialogue, {}), kind, dialogue, torch.zeros(2, 1, 1))


replies_of_a_dialogue = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=30, deadline=None)
@given(replies_of_a_dialogue, st.sets(st.integers(0, 25)))
def test_strict_prefers_the_right_time_to_any_and_any_to_silence(
    version: str, lengths: list[int], speaks: set[int]
) -> None:
    turns: list[Turn] = [SYSTEM, *(turn for length in lengths for turn in (stream(length), ANSWER))]
    due = {sum(lengths[: index + 1]) - 1 for index in range(len(lengths))}
    right, some, silent = (scripted(turns, spoken, version) for spoken in (due, speaks, {}))
    for best, other, worst in zip(right, some, silent, strict=True):
        assert (best.frame_diff, best.fluency) == (0, 1.0)
        assert worst.outcome == "never"
        assert 0 <= abs(other.frame_diff) <= abs(worst.frame_diff)
        assert other.outcome == "never" or abs(other.frame_diff) < abs(worst.frame_diff)
        assert 0 <= other.fluency <= 1.0
        assert other.fluency < 1.0 or other.outcome == "on_time"
