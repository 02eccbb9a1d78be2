"""Timed chats become streaming dialogues as in the public reference."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from golden_data import extent, learned_frames, samples, scene_text
from golden_files import read_json

from actors.turns import Stream
from jobs.annotations import Moment, VideoAnnotation
from jobs.chat import FILE, read_chats, read_generated_chats, scenes
from jobs.clock import Extent
from jobs.ego4d import known_splits
from jobs.scenes import Scene


def chat(*messages: tuple[str, float, str]) -> VideoAnnotation:
    roles = {"u": "user", "a": "assistant"}
    moments = tuple(Moment(role=roles[role], time=time, text=words) for role, time, words in messages)
    return VideoAnnotation(video_id="v", video="", moments=moments, source="chats.json", kind="chat")


def only(row: VideoAnnotation, fps: float = 2, seed: int = 0) -> Scene:
    (scene,) = scenes(row, Extent(int(100 * fps) + 1, fps, 100), random.Random(seed))
    return scene


def test_samples_match(datasets: Path, ego4d: Path) -> None:
    name = "ego4d_goalstep_livechat_trainval__live1plus"
    # The reference draws the waiting frames of all conversations from one generator, in the order of the file.
    rng = random.Random(read_json("data/samples.json")[name]["init_seed"])
    ours = [(row, s) for row in read_chats(ego4d) for s in scenes(row, extent(datasets, row.video_id), rng)]
    golden = samples(name)
    assert [(row.video_id, scene.frames) for row, scene in ours] == [sample.key for sample in golden]
    assert [scene.turns for _, scene in ours] == [sample.turns for sample in golden]
    for (_, scene), sample in zip(ours, golden, strict=True):
        assert scene_text(scene) == sample.text


def test_the_frame_before_the_first_question_has_nothing_to_learn() -> None:
    for seed in range(50):
        scene = only(chat(("u", 20, "What now?"), ("a", 20, "Cut.")), seed=seed)
        waited = scene.frames[1] - scene.frames[0]
        assert 0 <= waited <= 20
        assert learned_frames(scene.turns) == max(0, waited - 1)
        assert waited == 0 or scene.frames[1] == 41


def test_at_any_rate_streams_reach_the_frame_of_each_message() -> None:
    for fps in (1, 2, 5, 10, 24, 25, 29.97, 30):
        scene = only(chat(("u", 20, "What now?"), ("a", 20, "Cut."), ("a", 20.7, "Boil."), ("a", 61.3, "Serve.")), fps)
        _, *later = (turn.num_frames for turn in reversed(scene.turns) if isinstance(turn, Stream))
        assert scene.frames[1] - 1 == Extent(10000, fps, 1000).at(61.3)
        assert all(count > 0 for count in later)


def test_a_video_is_in_the_split_that_narrations_beside_the_chats_tell(ego4d: Path, tmp_path: Path) -> None:
    told = known_splits(ego4d)
    assert set(told.values()) == {"train", "validation"}
    assert [row.split for row in read_chats(ego4d)] == [told.get(row.video_id) for row in read_chats(ego4d)]
    for name in (FILE, "refined_narration_stream_train.json", "refined_narration_stream_val.json"):
        shutil.copy(ego4d / name, tmp_path / name)
    (chat, *_) = json.loads((tmp_path / FILE).read_text())
    validation = tmp_path / "refined_narration_stream_val.json"
    streams = json.loads(validation.read_text())
    validation.write_text(json.dumps(streams | {chat["video_uid"]: next(iter(streams.values()))}))
    assert {row.split for row in read_chats(tmp_path) if row.video_id == chat["video_uid"]} == {"validation"}
    generated = tmp_path / "generated"
    generated.mkdir()
    held = next(uid for uid, split in known_splits(tmp_path).items() if split == "validation")
    (generated / "one.json").write_text(json.dumps(chat | {"video_uid": held}))
    assert [row.split for row in read_generated_chats(generated)] == ["validation"]
    (generated / "one.json").write_text(json.dumps(chat | {"video_uid": "elsewhere"}))
    assert [row.split for row in read_generated_chats(generated)] == [None]
