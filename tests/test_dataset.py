"""Dialogues joined with frame tokens: what training reads, and what it refuses to read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from training_data import narrated, write_store

from actors.causal_lm import load_tokenizer
from actors.config import FrameConfig, ModelConfig
from actors.dialogue import Template
from actors.objective import Objective
from jobs.dataset import DatasetError, TrainingSet, batch_of, step_order
from jobs.dialogues import Dialogue
from jobs.frame_store import FrameStore

VIDEOS = ["ab", "abcd", "abcdef"]


@pytest.fixture
def template(tiny_configs: dict[str, ModelConfig]) -> Template:
    config = tiny_configs["live1plus"]
    return Template(load_tokenizer(Path(config.llm)), config.frames)


@pytest.fixture
def store(tmp_path: Path, template: Template) -> FrameStore:
    return write_store(tmp_path / "store", template.frames, VIDEOS)


def test_a_sample_is_the_rendered_dialogue_with_the_tokens_of_its_frames(store: FrameStore, template: Template) -> None:
    dialogue = narrated("abcd")
    (sample,) = TrainingSet([dialogue], store, template)
    assert sample.rendered == template.render(dialogue.conversation)
    assert torch.equal(sample.frames, store.frames("abcd", 1, 11))
    placeholders = sample.rendered.input_ids.count(template.frame_id)
    assert placeholders == sample.rendered.num_frames * template.frames.num_tokens == sample.frames[..., 0].numel()
    assert sample.num_labels > 0


@pytest.mark.parametrize("objective", ["streaming", "interleaved", "per_frame"])
def test_an_objective_changes_what_is_learned_and_no_frame(
    store: FrameStore, template: Template, objective: Objective
) -> None:
    plain, sample = (TrainingSet([narrated("abcd")], store, template, o)[0] for o in ("streaming", objective))
    assert torch.equal(sample.frames, plain.frames)
    assert sample.rendered.num_frames == len(sample.frames)
    assert (sample.rendered.labels == plain.rendered.labels) == (objective == "streaming")


def test_a_batch_has_all_frames_in_the_order_of_its_rows(store: FrameStore, template: Template) -> None:
    data = TrainingSet([narrated(video) for video in VIDEOS], store, template)
    samples = [data[2], data[0]]
    batch, frames = batch_of(samples, template.eos_id)
    assert torch.equal(frames, torch.cat([samples[0].frames, samples[1].frames]))
    assert batch.attention_mask.sum(1).tolist() == [len(sample.rendered.input_ids) for sample in samples]
    assert (batch.labels != -100).sum(1).tolist() == [sample.num_labels for sample in samples]


def test_dialogues_without_frame_tokens_are_left_out(
    store: FrameStore, template: Template, caplog: pytest.LogCaptureFixture
) -> None:
    data = TrainingSet([narrated("absent"), narrated("ab")], store, template)
    assert data.video_ids() == ["ab"]
    assert "absent" in caplog.text


@pytest.mark.parametrize(
    ("dialogues", "message"),
    [([], "there are no dialogues"), ([narrated("absent")], "none of the 1 videos in them is in .* which has 3")],
)
def test_no_data_says_which_side_is_missing(
    store: FrameStore, template: Template, dialogues: list, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        TrainingSet(dialogues, store, template)


def test_another_rate_than_the_store_is_refused_with_both(tmp_path: Path, template: Template) -> None:
    store = write_store(tmp_path / "fast", template.frames, ["ab"], fps=5)
    with pytest.raises(DatasetError, match=r"'ab-narration-0' counts frames at 2 fps, the store .* has 5 fps"):
        TrainingSet([narrated("ab")], store, template)


def test_other_frame_tokens_than_the_models_are_refused_with_both(tmp_path: Path, template: Template) -> None:
    store = write_store(tmp_path / "small", FrameConfig(resolution_px=32), ["ab"])
    with pytest.raises(DatasetError, match=r"has 1 tokens a frame, model.frames says 10"):
        TrainingSet([narrated("ab")], store, template)


def test_frames_beyond_the_store_are_refused_by_name(store: FrameStore, template: Template) -> None:
    dialogue = narrated("ab", num_frames=40)
    late = dialogue.model_copy(update={"frames": (10, 10 + dialogue.num_frames)})
    with pytest.raises(DatasetError, match=r"'ab-narration-0' shows frames 10..19 of video 'ab', the store has 12"):
        TrainingSet([late], store, template)


def test_a_dialogue_without_anything_to_learn_is_refused(store: FrameStore, template: Template) -> None:
    dialogue = narrated("ab")
    turns = tuple(
        turn.model_copy(update={"learn": False}) if hasattr(turn, "learn") else turn for turn in dialogue.conversation
    )
    data = TrainingSet([dialogue.model_copy(update={"conversation": turns})], store, template)
    with pytest.raises(DatasetError, match="'ab-narration-0' has nothing to learn"):
        data[0]


def test_every_epoch_is_another_permutation_of_all_samples() -> None:
    order = [index for step in range(14) for index in step_order(7, 3, step, seed=0)]
    epochs = [order[start : start + 7] for start in range(0, 42, 7)]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order != [index for step in range(14) for index in step_order(7, 3, step, seed=1)]


def test_an_order_does_not_depend_on_what_was_asked_before() -> None:
    later = step_order(7, 3, 9, seed=0)
    assert [step_order(7, 3, step, seed=0) for step in range(10)][9] == later


def test_a_dialogue_without_frames_needs_no_video(store: FrameStore, template: Template) -> None:
    conversation = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!", "learn": True}]
    talk = {"dialogue_id": "talk", "task": "robustness", "video_id": "none", "video": "", "fps": 2, "frames": [0, 0]}
    data = TrainingSet(
        [Dialogue.model_validate(talk | {"conversation": conversation}), narrated("ab")], store, template
    )
    assert data.video_ids() == ["ab"]
    assert data[0].frames.shape == (0, *data[1].frames.shape[1:])
    batch, frames = batch_of([data[0], data[1]], template.eos_id)
    assert torch.equal(frames, data[1].frames)
    assert batch.at_frame[0].sum() == 0
