"""jobs.evaluate: dialogues and frame tokens to a report."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from training_data import narrated, write_store

from actors import checkpoint
from actors.config import ModelConfig
from actors.turns import Assistant, Stream, System, User
from jobs.annotations import Moment
from jobs.dialogue_files import to_line
from jobs.dialogues import Dialogue
from jobs.evaluate import main, play_of
from jobs.frame_store import FrameStore
from jobs.replay import Question

VIDEOS = ["kitchen", "garage"]
CONTROLS = ["always silent", "always speaking", "every 10 s", "change of picture", "oracle"]


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def store(tiny_configs: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    config = tiny_configs["live1plus"]
    features = checkpoint.load(config).features
    return write_store(tmp_path_factory.mktemp("store") / "tokens", config.frames, VIDEOS, fingerprint=features)


@pytest.fixture
def evaluate(
    tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig], store: FrameStore, tmp_path: Path
) -> Callable[..., int]:
    """`evaluate(arguments...)` with the tiny checkpoint, which was trained on the video tiny_world."""
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text("".join(to_line(narrated(name)) for name in VIDEOS))
    model = tiny_configs["live1plus"].model_copy(update={"checkpoint": str(tiny_checkpoint)})
    sections = {
        "model": model.model_dump(mode="json"),
        "engine": {"kv_memory_gb": 0.1},
        "session": {"max_response_tokens": 4},
        "store": {"folder": str(store.path)},
        "evaluation": {"dialogues": str(dialogues), "folder": str(tmp_path / "out")},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sections))
    return lambda *arguments: main([str(tmp_path / "tiny.yaml"), *arguments])


def test_a_checkpoint_gets_its_numbers_beside_those_of_the_controls(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate() == 0
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (values["num_dialogues"], values["num_videos"], values["seen_videos"]) == (2, 2, [])
    assert list(values["controls"]) == CONTROLS
    oracle, silent = values["controls"]["oracle"], values["controls"]["always silent"]
    assert (oracle["f1"], oracle["mean_error_s"], silent["recall"]) == (1, 0, 0)
    assert values["self_conditioned"]["labelled"] == oracle["labelled"] == 4
    assert values["teacher_forced"]["strict"]["lm_ppl"] > 1
    assert sum(values["teacher_forced"]["strict"]["outcomes"].values()) >= 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["video_id"] for row in rows] == VIDEOS
    assert all(len(row["p_silent"]) == 10 for row in rows)
    assert rows[0]["labels"] == [{"time": 2.5, "text": "You cut " * 6 + "You cut"}, {"time": 4.5, "text": "You stop."}]
    page = (tmp_path / "out" / "report.md").read_text()
    assert page in capsys.readouterr().out
    assert "| **model** |" in page
    assert "Trained on" not in page


def test_a_second_run_replaces_the_first_and_says_the_same(evaluate: Callable[..., int], tmp_path: Path) -> None:
    results = []
    for at_once in (1, 2):
        assert evaluate(f"evaluation.at_once={at_once}") == 0
        results.append(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert results[0] == results[1]


def test_videos_of_the_training_are_refused_unless_allowed(
    evaluate: Callable[..., int], store: FrameStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogue = narrated("kitchen").model_copy(update={"video_id": "tiny_world"})
    (tmp_path / "dialogues.jsonl").write_text(to_line(dialogue) + to_line(narrated("garage")))
    assert evaluate() == 1
    assert "the checkpoint was trained on tiny_world: grade it on other videos" in capsys.readouterr().err
    with store.locked(), store.writer("tiny_world") as writer:
        writer.append([frame / 2 for frame in range(12)], store.frames("kitchen"))
        writer.commit()
    assert evaluate("--allow-seen") == 0
    assert "**Trained on 1 of these videos: no measure of new ones.**" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.dialogues=gone.jsonl"], "gone.jsonl: no such dialogue file"),
        (["store.folder=gone"], "gone is no frame-token store"),
        (["evaluation.folder=."], "holds something else than an evaluation"),
        (["evaluation.windw_s=1"], "unknown key 'evaluation.windw_s'"),
    ],
)
def test_a_users_mistake_ends_in_one_line(
    arguments: list[str],
    message: str,
    evaluate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(*arguments) == 1
    assert message in capsys.readouterr().err


def test_labels_are_what_is_said_of_its_own_accord(store: FrameStore) -> None:
    conversation = (
        System(content="s."),
        User(content="First?"),
        Assistant(content="Answer."),
        Stream(num_frames=3),
        User(content="Narrate."),
        Assistant(content="Now."),
        Stream(num_frames=4, learn=True),
        Assistant(content="Later.", learn=True),
        Stream(num_frames=2),
    )
    dialogue = Dialogue(
        dialogue_id="d", task="t", video_id="kitchen", video="", fps=2, frames=(1, 10), conversation=conversation
    )
    played = play_of(dialogue, store)
    assert played.questions == [Question("First?", 0.0), Question("Narrate.", 1.0)]
    assert played.stream.labels == [Moment(time=3.0, text="Later.")]
    assert played.stream.times == [index / 2 for index in range(9)]
    assert played.stream.tokens.equal(store.frames("kitchen", 1, 10))
    assert played.stream.duration_s == 4.5
