"""Dialogues joined with frame tokens: what training reads, and what it refuses to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_data import narrated, write_store

from actors.causal_lm import load_tokenizer
from actors.config import FrameConfig, ModelConfig
from actors.dialogue import Stream, Template
from actors.objective import Objective
from jobs.dataset import DatasetError, TrainingSet, clip
from jobs.dialogues import Dialogue
from jobs.encoding_summary import Summary
from jobs.frame_store import FrameStore
from jobs.plan import Pick
from jobs.validation import Validation

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


def test_a_pack_has_ids_labels_and_frames_one_after_another(store: FrameStore, template: Template) -> None:
    data = TrainingSet([narrated(video) for video in VIDEOS], store, template)
    samples = [data[2], data[0]]
    pack = data.packed([Pick(2, 0), Pick(0, 0)])
    assert pack.dialogue_ids == ("abcdef-narration-0", "ab-narration-0")
    assert torch.equal(pack.frames, torch.cat([sample.frames for sample in samples]))
    row, prefix = pack.packed, pack.packed.prefix
    assert 0 < prefix <= samples[0].rendered.input_ids.index(template.frame_id)
    for name, values in (("input_ids", row.input_ids), ("labels", row.labels)):
        first, second = (getattr(sample.rendered, name) for sample in samples)
        assert values.tolist() == first + second[prefix:]
    one, two = (len(sample.rendered.labels) for sample in samples)
    assert row.positions.tolist() == [*range(one), *range(prefix, two)]
    assert row.dialogue_lengths == (one, two)


def test_measurements_are_what_a_pack_will_have(store: FrameStore, template: Template) -> None:
    data = TrainingSet([narrated(video) for video in VIDEOS], store, template, max_tokens=100)
    for index in range(len(VIDEOS)):
        measured, pack = data.measure(index), data.packed([Pick(index, 0)])
        assert (measured.tokens,) == pack.packed.lengths
        assert measured.tokens <= 100 < measured.tokens + measured.clipped
        assert (measured.text, measured.silent + measured.speaking) == (pack.text_labels, pack.stream_labels)
        assert measured.frames == len(pack.frames)


@pytest.mark.parametrize("limit", range(30, 140, 7))
def test_a_clipped_dialogue_is_its_beginning_without_half_a_frame(
    store: FrameStore, template: Template, limit: int
) -> None:
    (sample,) = TrainingSet([narrated("abcd")], store, template)
    whole, short = sample.rendered, clip(sample.rendered, limit, template.frame_id)
    length = len(short.input_ids)
    assert limit - 10 < length <= limit
    assert (short.input_ids, short.labels) == (whole.input_ids[:length], whole.labels[:length])
    assert short.input_ids.count(template.frame_id) == 10 * short.num_frames
    assert clip(whole, len(whole.input_ids), template.frame_id) is whole


def test_some_silent_frames_are_left_out_others_in_every_epoch(store: FrameStore, template: Template) -> None:
    data = TrainingSet([narrated("abcd")], store, template)
    whole = data.packed([Pick(0, 0)]).packed.labels
    epochs = [data.packed([Pick(0, epoch)], keep_silence=0.5, seed=3) for epoch in range(8)]
    silent = whole == template.silence_id
    for pack in epochs:
        assert torch.equal(pack.packed.labels[~silent], whole[~silent])
        assert pack.text_labels + pack.stream_labels == int((pack.packed.labels != -100).sum())
    kept = [int((pack.packed.labels == template.silence_id).sum()) for pack in epochs]
    assert 0 < sum(kept) < 8 * int(silent.sum())
    assert len({tuple(pack.packed.labels.tolist()) for pack in epochs}) > 1
    again = data.packed([Pick(0, 5)], keep_silence=0.5, seed=3).packed.labels
    assert torch.equal(again, epochs[5].packed.labels)


def test_dialogues_that_teach_nothing_are_not_validated_on(store: FrameStore, template: Template) -> None:
    asked = narrated("abcd").model_copy(update={"dialogue_id": "asked", "frames": (0, 0)}).model_dump()
    blind = Dialogue.model_validate(asked | {"conversation": [{"role": "user", "content": "What?"}]})
    data = TrainingSet([blind, narrated("abcd"), blind, narrated("ab")], store, template)
    assert sorted(Validation(data, 4).share) == [1, 3]
    assert len(Validation(data, 1).share) == 1
    with pytest.raises(DatasetError, match="none of 1 dialogues to validate on"):
        Validation(TrainingSet([blind], store, template), 4)


def test_a_dialogue_of_silence_only_keeps_a_frame_of_it(store: FrameStore, template: Template) -> None:
    """Else a pack of it would have no label, and whether a run goes through would depend on how packs are made."""
    silent = {"role": "stream", "num_frames": 6, "learn": 5}  # what comes after the last one is not known
    quiet = narrated("abcd").model_copy(update={"frames": (0, 6)}).model_dump() | {"conversation": [silent]}
    data = TrainingSet([Dialogue.model_validate(quiet)], store, template)
    packs = [data.packed([Pick(0, epoch)], keep_silence=1e-9).packed.labels for epoch in range(8)]
    assert [int((labels != -100).sum()) for labels in packs] == [1] * 8
    assert len({tuple(labels.tolist()) for labels in packs}) > 1


def test_a_pack_without_a_label_is_refused_by_name(store: FrameStore, template: Template) -> None:
    quiet = narrated("abcd").model_dump() | {"frames": (0, 3), "conversation": [{"role": "stream", "num_frames": 3}]}
    data = TrainingSet([Dialogue.model_validate(quiet)], store, template)
    with pytest.raises(DatasetError, match="nothing is learned in abcd-narration-0"):
        data.packed([Pick(0, 0)])


def test_labels_at_frames_have_the_weight_of_their_kind(store: FrameStore, template: Template) -> None:
    data = TrainingSet([narrated("abcd")], store, template)
    pack, rendered = data.packed([Pick(0, 0)], stream_weights=(0.25, 4)), data[0].rendered
    for label, at_frame, weight in zip(rendered.labels, rendered.at_frame, pack.weights.tolist(), strict=True):
        if label != -100:
            assert weight == ((0.25 if label == template.silence_id else 4) if at_frame else 1)


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


def fail(store: FrameStore, *videos: str) -> None:
    """Leave in the store what jobs.encode_frames says of videos that it cannot encode."""
    Summary(failed={video: f"{video}.mp4: not a readable video" for video in videos}).save(store.path)


def test_videos_that_could_not_be_encoded_are_told_from_those_nobody_encoded(
    store: FrameStore, template: Template, caplog: pytest.LogCaptureFixture
) -> None:
    fail(store, "broken", "ab")  # the second has been encoded since
    data = TrainingSet([narrated(video) for video in ("broken", "absent", "ab")], store, template)
    assert data.video_ids() == ["ab"]
    assert data.left_out == [
        "1 dialogue of 1 video, not in the frame-token store: absent",
        "1 dialogue of 1 video, jobs.encode_frames failed on them: broken",
    ]
    assert all(line in caplog.text for line in data.left_out)


def test_many_videos_left_out_are_counted_and_the_first_named(store: FrameStore, template: Template) -> None:
    videos = [f"broken{number:02}" for number in range(30)]
    fail(store, *videos)
    data = TrainingSet([narrated(video) for video in ("ab", *videos, videos[0])], store, template)
    [line] = data.left_out
    assert line.startswith("31 dialogues of 30 videos, jobs.encode_frames failed on them: broken00, ")
    assert line.endswith("broken19 and 10 more")


def test_no_dialogue_left_says_what_was_wrong_with_the_videos(store: FrameStore, template: Template) -> None:
    fail(store, "broken")
    with pytest.raises(
        DatasetError, match=r"no dialogue is left: 1 dialogue of 1 video, .* failed .*: broken \(broken.mp4: not a"
    ):
        TrainingSet([narrated("broken")], store, template)


def test_a_store_whose_last_run_left_no_report_knows_of_no_failure(store: FrameStore, template: Template) -> None:
    (store.path / "encoding.json").write_text("{")
    with pytest.raises(DatasetError, match="none of the 1 videos in them is in"):
        TrainingSet([narrated("broken")], store, template)


def test_of_a_video_that_is_damaged_at_its_end_only_that_is_left_out(store: FrameStore, template: Template) -> None:
    with store.locked(), store.writer("cut") as writer:
        writer.append([frame / 2 for frame in range(12)], store.frames("ab"))
        writer.commit(damage="cut.mp4: damaged, 12 of its 40 frames can be decoded")
    whole, rest = narrated("cut"), narrated("cut", num_frames=40)
    rest = rest.model_copy(update={"dialogue_id": "cut-narration-1", "frames": (20, 20 + rest.num_frames)})
    data = TrainingSet([whole, rest], store, template)
    assert data.dialogues == [whole]
    assert data.left_out == ["1 dialogue of 1 video, they show frames that are damaged: cut"]
    with pytest.raises(
        DatasetError, match=r"no dialogue is left: .* damaged: cut \(cut.mp4: damaged, 12 of its 40 frames"
    ):
        TrainingSet([rest], store, template)


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
    with pytest.raises(DatasetError, match=r"'ab-narration-0' has nothing to learn: it has no turn with learn: true"):
        data.measure(0)


def test_the_interleaved_objective_learns_nothing_from_a_silent_video(store: FrameStore, template: Template) -> None:
    silent = narrated("ab").model_copy(update={"conversation": (Stream(num_frames=10, learn=True),)})
    for objective in ("streaming", "per_frame"):
        assert TrainingSet([silent], store, template, objective).measure(0).frames == 10
    with pytest.raises(DatasetError, match="it has no response with learn: true, the objective interleaved needs one"):
        TrainingSet([silent], store, template, "interleaved").measure(0)


def test_a_dialogue_without_frames_needs_no_video(store: FrameStore, template: Template) -> None:
    conversation = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!", "learn": True}]
    talk = {"dialogue_id": "talk", "task": "robustness", "video_id": "none", "video": "", "fps": 2, "frames": [0, 0]}
    data = TrainingSet(
        [Dialogue.model_validate(talk | {"conversation": conversation}), narrated("ab")], store, template
    )
    assert data.video_ids() == ["ab"]
    assert data[0].frames.shape == (0, *data[1].frames.shape[1:])
    assert torch.equal(data.packed([Pick(0, 0), Pick(1, 0)]).frames, data[1].frames)
