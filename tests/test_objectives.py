"""The objectives are compared on the same dialogues, each in the form in which its model learned them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_data import narrated, untrained_config, write_store

from actors import checkpoint
from actors.config import Config, ModelConfig
from actors.dialogue import Stream, Template
from actors.objective import STOCK_REPLY, Objective, taught
from jobs.dataset import DatasetError
from jobs.dialogue_files import to_line
from jobs.objectives import compare
from jobs.objectives_report import ObjectivesReport, Outcome
from jobs.per_frame import PerFrameForward


@pytest.fixture(scope="module")
def template(tiny_configs: dict[str, ModelConfig]) -> Template:
    return checkpoint.untrained(untrained_config(tiny_configs["live1plus"])).template


class _Seen:
    """A model whose logits say where they were asked for."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, input_ids: torch.Tensor, frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.ids = input_ids.tolist()
        return positions[:, None].float() + torch.arange(len(self.ids)) / 1000


def test_a_streaming_dialogue_is_read_as_per_frame_models_learn_it(template: Template) -> None:
    conversation = narrated("abcd").conversation
    streaming = template.render(conversation)
    read = PerFrameForward(_Seen(), template).read(streaming.input_ids)
    learned = template.render(taught(conversation, "per_frame"))
    stops_at_a_frame = learned.turns[-1].role == "assistant" and streaming.turns[-1].role == "stream"
    assert read.ids == learned.input_ids[: len(read.ids)]
    assert len(read.ids) == len(learned.input_ids) or stops_at_a_frame


def test_a_decision_is_read_where_the_reply_begins(template: Template) -> None:
    streaming = template.render(narrated("abcd").conversation)
    forward = PerFrameForward(_Seen(), template)
    read = forward.read(streaming.input_ids)
    silent = [i for i, label in enumerate(streaming.labels) if label == template.silence_id]
    assert silent
    for position in silent:
        assert template.decode(read.ids[: read.decided[position] + 1]).endswith("]\nAssistant:")


def test_a_frame_at_the_end_is_decided_there(template: Template) -> None:
    frame = [template.frame_id] * template.frames.num_tokens
    read = PerFrameForward(_Seen(), template).read([7, *frame])
    assert read.decided == {len(frame): len(read.ids) - 1}
    assert template.decode(read.ids).endswith("]\nAssistant:")


def test_whoever_speaks_does_not_begin_with_the_stock_reply(template: Template) -> None:
    def stock_is_likeliest(input_ids: torch.Tensor, frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(positions), template.frame_id)
        logits[:, stock] = 3.0
        return logits

    forward = PerFrameForward(stock_is_likeliest, template)
    [stock, *_] = forward._ids(" " + STOCK_REPLY)
    streaming = template.render(narrated("abcd").conversation)
    decided = forward.read(streaming.input_ids).decided
    begin = [i for i, inside in enumerate(streaming.in_answer) if inside and not streaming.in_answer[i - 1]]
    positions = torch.tensor([*decided, *(first - 1 for first in begin)])
    logits = forward(torch.tensor(streaming.input_ids), torch.zeros(0), positions)
    at_frames, at_answers = logits[: len(decided)], logits[len(decided) :]
    assert (at_frames[:, template.silence_id] == 3.0).all()
    spoken_at_a_frame = at_answers[:, stock] == -torch.inf
    assert spoken_at_a_frame.any()
    assert (at_answers[~spoken_at_a_frame, stock] == 3.0).all()  # to a question: no decision was due


def test_all_objectives_are_trained_and_graded(tiny_configs: dict[str, ModelConfig], tmp_path: Path) -> None:
    model = untrained_config(tiny_configs["live1plus"])
    fingerprint = checkpoint.untrained(model).features
    write_store(tmp_path / "tokens", model.frames, ["ab", "abcd", "abcdef", "badc"], fingerprint)
    for split, videos in (("train", ["ab", "abcd"]), ("validation", ["badc", "abcdef"])):
        (tmp_path / "dialogues").mkdir(exist_ok=True)
        silent = narrated("ab").model_copy(update={"conversation": (Stream(num_frames=10, learn=True),)})
        said = [narrated(video) for video in videos]
        lines = "".join(to_line(one) for one in ([silent] if split == "train" else []) + said)
        (tmp_path / "dialogues" / f"{split}.jsonl").write_text(lines)
    sections = {
        "model": model.model_dump(mode="json"),
        "data": {"folder": str(tmp_path / "dialogues")},
        "store": {"folder": str(tmp_path / "tokens")},
        "training": {"adapter": {"rank": 2, "alpha": 4}, "max_steps": 1, "batch_size": 2},
        "objectives": {"seeds": [0], "folder": str(tmp_path / "found")},
    }
    report = compare(Config(sections, "test"))
    assert [one.objective for one in report.outcomes] == ["per_frame", "interleaved", "streaming"]
    assert {(one.dialogues, one.left_out, len(one.losses)) for one in report.outcomes} == {(1, 1, 1)}
    assert {sum(one.outcomes.values()) for one in report.outcomes} == {2}  # the first of three answers a question
    (saved,) = (tmp_path / "found").glob("*-objectives.json")
    assert len(json.loads(saved.read_text())["outcomes"]) == 3
    assert saved.with_suffix(".png").is_file()
    told = saved.with_suffix(".md").read_text()
    assert "1 steps of 2 dialogues" in told
    assert "1 training dialogues in which nothing is said left out" in told
    assert "streaming is better than per_frame in" in told

    seen = to_line(narrated("abcd"))
    (tmp_path / "dialogues" / "validation.jsonl").write_text(seen)
    with pytest.raises(DatasetError, match="1 videos are in training and validation, such as 'abcd'"):
        compare(Config(sections, "test"))


def outcome(objective: Objective, seed: int, time_diff: float | None) -> Outcome:
    return Outcome(objective, seed, 0.5, time_diff, 0.5, None, 0.5, {"late": 2}, 3, 0, 100, 1.5, [2.0, 1.0])


def test_a_win_needs_both_values_and_may_be_counted_before_all_are_trained(tmp_path: Path) -> None:
    found = [
        outcome("per_frame", 0, 2.0),
        outcome("interleaved", 0, None),
        outcome("streaming", 0, 1.0),
        outcome("per_frame", 1, 0.5),
        outcome("streaming", 1, 1.0),
        outcome("per_frame", 2, 9.0),
    ]
    report = ObjectivesReport("2026-01-02", "a processor", "m", "s", "d", 4, 3, found)
    assert report.wins("time_diff") == {"per_frame": 1, "interleaved": 0}
    assert report.wins("fluency") == {"per_frame": 0, "interleaved": 0}
    assert "| streaming | 1 ± 0 | 0.5 ± 0 | none | 0.5 ± 0 |" in report.table()
    report.save(str(tmp_path))
    assert json.loads((tmp_path / "2026-01-02-objectives.json").read_text())["steps"] == 2
    assert found[1].line().startswith("objective=interleaved seed=0 time_diff=none fluency=0.5")
