"""jobs.evaluate: dialogues and frame tokens to a report."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from golden_data import dialogues as golden_dialogues
from training_data import narrated, write_store

from actors import checkpoint
from actors.config import ModelConfig
from actors.messages import SessionSettings
from jobs.dialogue_files import to_line
from jobs.dialogues import Dialogue
from jobs.evaluate import main
from jobs.frame_store import FrameStore
from jobs.grader import Grader
from jobs.lta import read_examples, read_lta, read_lta_test
from jobs.machine import cpu_name
from jobs.public import READERS
from jobs.stream_groups import ALL

VIDEOS = ["kitchen", "garage"]
CONTROLS = ["always silent", "always speaking", "every 10 s", "change of picture", "oracle"]
PICTURES = ["controls.png", "error_in_time.png", "examples.png", "thresholds.png"]


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def features(tiny_configs: dict[str, ModelConfig]) -> str:
    return checkpoint.load(tiny_configs["live1plus"]).features


@pytest.fixture
def store(tiny_configs: dict[str, ModelConfig], features: str, tmp_path: Path) -> FrameStore:
    return write_store(tmp_path / "tokens", tiny_configs["live1plus"].frames, VIDEOS, fingerprint=features)


@pytest.fixture
def trained(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, which was trained on the video tiny_world."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things: pictures take longer than all the rest."""
    monkeypatch.setattr("jobs.evaluate.draw", lambda *_: {})


@pytest.fixture
def evaluate(
    trained: Path, tiny_configs: dict[str, ModelConfig], store: FrameStore, tmp_path: Path
) -> Callable[..., int]:
    """`evaluate(arguments...)` of two dialogues, two thresholds."""
    write_dialogues(tmp_path, [narrated(name) for name in VIDEOS])
    model = tiny_configs["live1plus"].model_copy(update={"checkpoint": str(trained)})
    sections = {
        "model": model.model_dump(mode="json"),
        "engine": {"kv_memory_gb": 0.1},
        "session": {"max_response_tokens": 4},
        "store": {"folder": str(store.path)},
        "evaluation": {
            "dialogues": str(tmp_path / "dialogues.jsonl"),
            "folder": str(tmp_path / "out"),
            "thresholds": [0, 0.9],
            "answer_tokens": 8,
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sections))
    return lambda *arguments: main([str(tmp_path / "tiny.yaml"), *arguments])


def write_dialogues(folder: Path, dialogues: list[Dialogue]) -> None:
    (folder / "dialogues.jsonl").write_text("".join(map(to_line, dialogues)))


def metrics(folder: Path) -> dict:
    return json.loads((folder / "out" / "metrics.json").read_text())


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "predictions.jsonl").read_text().splitlines()]


def test_a_checkpoint_gets_its_numbers_beside_those_of_the_controls(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate() == 0
    values = metrics(tmp_path)
    assert (values["num_dialogues"], values["num_videos"], values["seen_videos"]) == (2, 2, [])
    assert list(values["streams"]) == [ALL]
    group = values["streams"][ALL]
    assert list(group["controls"]) == CONTROLS
    oracle, silent = group["controls"]["oracle"], group["controls"]["always silent"]
    assert (oracle["f1"], oracle["mean_error_s"], oracle["text_similarity"], silent["recall"]) == (1, 0, 1, 0)
    assert group["self_conditioned"]["labelled"] == oracle["labelled"] == 4
    assert group["teacher_forced"]["strict"]["lm_ppl"] > 1
    assert sum(group["teacher_forced"]["strict"]["outcomes"].values()) >= 4
    assert [point["threshold"] for point in values["thresholds"]] == [0, 0.9]
    rows = predictions(tmp_path)
    assert [row["video_id"] for row in rows] == VIDEOS
    assert all(len(row["p_silent"]) == 10 for row in rows)
    assert rows[0]["labels"] == [{"time": 2.5, "text": "You cut " * 6 + "You cut"}, {"time": 4.5, "text": "You stop."}]
    assert sum(row["timing"]["said"] for row in rows) == group["self_conditioned"]["said"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert page in capsys.readouterr().out
    assert "| **model** |" in page
    assert "Trained on" not in page
    assert "names no video" not in page
    assert f"{cpu_name()}, torch" in page
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == PICTURES
    assert all(f"]({name})" in page for name in PICTURES)


@pytest.mark.usefixtures("no_pictures")
def test_what_is_said_does_not_depend_on_how_many_streams_share_an_engine(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    results = []
    for at_once in (1, 2):
        assert evaluate(f"evaluation.at_once={at_once}", f"evaluation.folder={tmp_path / str(at_once)}") == 0
        results.append(json.loads((tmp_path / str(at_once) / "metrics.json").read_text()))
    assert results[0] == results[1]


@pytest.mark.usefixtures("no_pictures")
def test_streams_can_go_on_while_the_model_computes(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate("evaluation.thresholds=[]") == 0
    plain = metrics(tmp_path)["streams"][ALL]
    assert plain.pop("live") is None
    assert evaluate("evaluation.thresholds=[]", "evaluation.live=true") == 0
    group = metrics(tmp_path)["streams"][ALL]
    live = group.pop("live")
    assert group == plain
    assert live["timing"]["labelled"] == plain["self_conditioned"]["labelled"]
    assert 0 < live["lag_p50_s"] <= live["lag_p95_s"]
    assert live["decided"] + live["dropped"] == 20
    rows = [row["live"] for row in predictions(tmp_path)]
    assert sum(len(row["lags_s"]) for row in rows) == live["decided"]
    assert "| **model, live** |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_evaluation_goes_on(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[tuple[str, float]] = []
    play = Grader.play

    def stopped_at(count: int) -> Callable[..., list]:
        def stop(self: Grader, dialogues: list[Dialogue], settings: SessionSettings) -> list:
            if len(played) == count:
                raise KeyboardInterrupt
            played.extend((dialogue.video_id, settings.threshold) for dialogue in dialogues)
            return play(self, dialogues, settings)

        return stop

    for count, status in ((1, 130), (-1, 0)):
        monkeypatch.setattr(Grader, "play", stopped_at(count))
        assert evaluate("evaluation.at_once=1") == status
    assert len(played) == len(set(played))
    stopped, times = metrics(tmp_path), len(played)
    assert evaluate("evaluation.at_once=1", "session.max_response_tokens=3") == 0
    assert len(played) > times
    assert evaluate("evaluation.at_once=1", f"evaluation.folder={tmp_path / 'other'}") == 0
    assert json.loads((tmp_path / "other" / "metrics.json").read_text()) == stopped


@pytest.mark.usefixtures("no_pictures")
def test_the_best_threshold_is_stored_and_used_from_then_on(
    evaluate: Callable[..., int], trained: Path, tmp_path: Path
) -> None:
    assert evaluate("evaluation.calibrate=true") == 0
    first = metrics(tmp_path)
    best = max(first["thresholds"], key=lambda point: (point["f1"] or 0, -point["threshold"]))
    calibration = checkpoint.load(trained).calibration
    assert calibration is not None
    assert calibration.threshold == first["threshold"] == best["threshold"]
    assert calibration.value == round(best["f1"], 4)
    assert first["threshold_chosen_from"] == "these dialogues"
    assert first["streams"][ALL]["self_conditioned"]["f1"] == best["f1"]

    assert evaluate("evaluation.thresholds=[]") == 0
    again = metrics(tmp_path)
    assert again["threshold"] == calibration.threshold
    assert again["threshold_chosen_from"] == f"2 dialogues of {tmp_path}/dialogues.jsonl"
    assert again["streams"] == first["streams"]
    assert evaluate("evaluation.thresholds=[]", "session.threshold=0.1") == 0
    assert (metrics(tmp_path)["threshold"], metrics(tmp_path)["threshold_chosen_from"]) == (0.1, None)


@pytest.mark.usefixtures("no_pictures")
def test_videos_of_the_training_are_refused_unless_allowed(
    evaluate: Callable[..., int], store: FrameStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogue = narrated("kitchen").model_copy(update={"video_id": "tiny_world"})
    write_dialogues(tmp_path, [dialogue, narrated("garage")])
    assert evaluate() == 1
    assert "the checkpoint was trained on tiny_world: grade it on other videos" in capsys.readouterr().err
    with store.locked(), store.writer("tiny_world") as writer:
        writer.append([frame / 2 for frame in range(12)], store.frames("kitchen"))
        writer.commit()
    assert evaluate("--allow-seen") == 0
    assert "**Trained on 1 of these videos: no measure of new ones.**" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_that_names_no_videos_is_graded_and_the_report_says_so(
    evaluate: Callable[..., int], trained: Path, tmp_path: Path
) -> None:
    settings = json.loads((trained / "settings.json").read_text())
    (trained / "settings.json").write_text(json.dumps(settings | {"trained_videos": []}))
    assert evaluate("evaluation.thresholds=[]") == 0
    assert "names no video that it was trained on" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_tasks_are_graded_each_and_beside_the_paper(evaluate: Callable[..., int], tmp_path: Path) -> None:
    kitchen, garage = (narrated(name) for name in VIDEOS)
    write_dialogues(tmp_path, [kitchen, garage.model_copy(update={"task": "ego4d_narration"})])
    assert evaluate("evaluation.thresholds=[]") == 0
    values = metrics(tmp_path)
    assert list(values["streams"]) == [ALL, "ego4d_narration", "narration"]
    assert [group["num_dialogues"] for group in values["streams"].values()] == [2, 1, 1]
    assert values["published"]["ego4d_narration"]["time_diff"]["value"] == 2.05
    fluency = values["streams"]["ego4d_narration"]["teacher_forced"]["paper"]["fluency"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"| ego4d_narration | fluency | {fluency:.3f} | 0.453 | VideoLLM-online-8B-v1+, Table 3 of arXiv" in page


@pytest.fixture
def benchmarks(datasets: Path, ego4d: Path, store: FrameStore, tmp_path: Path) -> list[Dialogue]:
    """Some dialogues of every offline benchmark, over frame tokens that are in the store."""
    coin = [
        golden_dialogues(READERS[kind](datasets / "coin"), datasets, split="validation")[:2]
        for kind in ("coin_step", "coin_next", "coin_task", "coin_procedure", "coin_taskprocedure")
    ]
    lta = golden_dialogues((row for row in read_lta(ego4d) if row.split == "validation"), datasets, split="validation")
    test = golden_dialogues(read_lta_test(ego4d), datasets, split="validation")
    chosen = [dialogue for task in (*coin, lta[:1], test[:1]) for dialogue in task]
    long = {dialogue.video_id: 0 for dialogue in chosen}
    for dialogue in chosen:
        long[dialogue.video_id] = max(long[dialogue.video_id], dialogue.frames[1])
    with store.locked():
        for video_id, count in long.items():
            with store.writer(video_id) as writer:
                tokens = store.frames("kitchen")[[index % 12 for index in range(count)]]
                writer.append([index / 2 for index in range(count)], tokens)
                writer.commit()
    write_dialogues(tmp_path, chosen)
    return chosen


@pytest.mark.usefixtures("no_pictures")
def test_the_offline_benchmarks_are_answered_and_graded(
    evaluate: Callable[..., int], benchmarks: list[Dialogue], datasets: Path, ego4d: Path, tmp_path: Path
) -> None:
    formats = {name: {"format": name, "path": str(ego4d), "videos": str(ego4d)} for name in ("lta", "lta_test")}
    formats["coin"] = {"format": "coin_step", "path": str(datasets / "coin"), "videos": str(datasets)}
    assert evaluate(f"annotations.datasets={json.dumps(formats)}") == 0
    values = metrics(tmp_path)
    assert values["streams"] == {}
    for task in ("coin_step", "coin_next", "coin_task"):
        assert 0 <= values["offline"][task]["values"]["accuracy"] <= 100
    for task in ("coin_procedure", "coin_taskprocedure"):
        assert values["offline"][task]["values"].keys() == {"accuracy", "corrected_accuracy"}
    names = [values["offline"][task]["num_categories"] for task in ("coin_step", "coin_next", "coin_task", "lta")]
    assert names == [12, 12, 4, 0]
    assert values["offline"]["lta"]["num_dialogues"] == 2
    assert values["offline"]["lta"]["values"].keys() == {"verb_aued", "noun_aued", "verb_ed", "noun_ed", "action_ed"}
    rows = {row["dialogue_id"]: row for row in predictions(tmp_path)}
    assert rows.keys() == {dialogue.dialogue_id for dialogue in benchmarks}
    assert all(len(row["answers"]) == (5 if row["task"] == "lta" else 1) for row in rows.values())
    (asked,) = [dialogue for dialogue in benchmarks if dialogue.task == "lta" and not dialogue.labels]
    forecast = json.loads((tmp_path / "out" / "lta_test_predictions.json").read_text())
    assert list(forecast) == [read_examples(ego4d)[asked.dialogue_id, False].name]
    assert [len(beam) for beam in forecast[next(iter(forecast))]["verb"]] == [20] * 5
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| coin_step | accuracy |" in page
    assert "| 0.884 | VideoLLM-online-8B-v1+, Table 2b" in page


@pytest.mark.usefixtures("no_pictures")
def test_no_dialogues_are_no_evaluation(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dialogues(tmp_path, [])
    assert evaluate() == 1
    assert "dialogues.jsonl has no dialogues: give others" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_online_benchmarks_ask_their_questions_in_streams(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = [{"realtime": 1.0, "count": 0}, {"realtime": 4.0, "count": 2}]
    items = [{"task": "REC", "video": "v/kitchen.mp4", "activity": "jump", "test_info": tests}]
    (tmp_path / "ovo.json").write_text(json.dumps(items))
    arguments = [f"evaluation.ovobench={tmp_path / 'ovo.json'}", "evaluation.dialogues=null"]
    for polled in ("false", "true"):
        assert evaluate(*arguments, f"evaluation.polled={polled}") == 0
        values = metrics(tmp_path)
        assert (values["num_dialogues"], values["streams"]) == (0, {})
        assert values["online"]["ovobench"].keys() == {"REC", "forward responding", "all"}
        assert "## ovobench" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "ovo.json").write_text(json.dumps([items[0] | {"video": "v/gone.mp4"}]))
    assert evaluate(*arguments) == 1
    assert "none of the 1 videos of the benchmark is in" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_lta_without_its_annotations_says_what_is_missing(
    evaluate: Callable[..., int], benchmarks: list[Dialogue], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dialogues(tmp_path, [dialogue for dialogue in benchmarks if dialogue.task == "lta"][:1])
    assert evaluate() == 1
    assert "name the dataset in annotations.datasets" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_threshold_cannot_be_chosen_without_a_stream(
    evaluate: Callable[..., int], benchmarks: list[Dialogue], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dialogues(tmp_path, [dialogue for dialogue in benchmarks if dialogue.task == "coin_step"][:1])
    assert evaluate("evaluation.calibrate=true") == 1
    assert f"but {tmp_path}/dialogues.jsonl has no stream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.dialogues=gone.jsonl"], "gone.jsonl"),
        (["store.folder=gone"], "gone is no frame-token store"),
        (["evaluation.folder=."], "holds something else than an evaluation"),
        (["evaluation.windw_s=1"], "unknown key 'evaluation.windw_s'"),
        (["evaluation.calibrate=true", "session.threshold=1"], "leave one of them out"),
        (["evaluation.calibrate=true", "evaluation.thresholds=[]"], "evaluation.thresholds is empty"),
        (["evaluation.calibrate=true", "model.checkpoint=owner/name"], "give the folder of a checkpoint"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
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


@pytest.mark.usefixtures("no_pictures")
def test_where_nothing_is_said_in_time_no_threshold_is_stored(
    evaluate: Callable[..., int], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = [
        dialogue.model_copy(update={"conversation": dialogue.conversation[:4]}) for dialogue in map(narrated, VIDEOS)
    ]
    write_dialogues(tmp_path, [d.model_copy(update={"frames": (1, 2)}) for d in quiet])
    assert evaluate("evaluation.calibrate=true") == 1
    assert "nothing was stored in the checkpoint" in capsys.readouterr().err
    assert checkpoint.load(trained).calibration is None


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_actors_of_a_cluster_give_the_same_numbers(
    ray_cluster: None, evaluate: Callable[..., int], tmp_path: Path
) -> None:
    assert evaluate() == 0
    alone = metrics(tmp_path)
    shutil.rmtree(tmp_path / "out")
    assert evaluate("evaluation.workers=1", "evaluation.at_once=1") == 0
    assert metrics(tmp_path) == alone
    shutil.rmtree(tmp_path / "out")
    assert evaluate("evaluation.workers=1", "store.folder=gone") == 1
