"""jobs.compare: two evaluations beside each other, and how sure their difference is."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from jobs.compare import main
from jobs.paired_bootstrap import compare
from jobs.timing_metrics import Timing


def timing(matched: int, said: int = 4, labelled: int = 4) -> Timing:
    return Timing(said, labelled, matched, error_s=matched / 2, likeness=matched / 4, quiet_s=10, duration_s=30)


def write(folder: Path, timings: list[Timing], model: str = "m", after_s: float = 3) -> Path:
    """What jobs.evaluate leaves of streams, two of each video."""
    folder.mkdir()
    metrics = {"model": model, "window": {"before_s": 1, "after_s": after_s}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [
        {"dialogue_id": f"d{i}", "video_id": f"v{i // 2}", "labels": [{"time": i, "text": "x"}], "timing": asdict(one)}
        for i, one in enumerate(timings)
    ]
    rows.append({"dialogue_id": "coin", "video_id": "c", "labels": ["cut"], "answers": ["Cut."]})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_numbers_are_those_of_all_streams_together() -> None:
    first, second = [timing(1), timing(3)], [timing(2, said=8), timing(4)]
    found = compare(first, second, ["a", "b"])
    for name in ("precision", "recall", "f1", "mean_error_s", "text_similarity", "false_alarms_per_quiet_hour"):
        assert found[name].first == pytest.approx(getattr(first[0] + first[1], name))
        assert found[name].second == pytest.approx(getattr(second[0] + second[1], name))
    assert found["recall"].difference == pytest.approx(6 / 8 - 4 / 8)


def test_the_same_better_result_everywhere_is_sure() -> None:
    found = compare([timing(1)] * 20, [timing(2)] * 20, [str(i) for i in range(20)])["recall"]
    assert (found.difference, found.low, found.high, found.p) == (0.25, 0.25, 0.25, 0)


def test_a_model_compared_with_itself_differs_in_nothing() -> None:
    timings = [timing(matched) for matched in (0, 1, 2, 3, 4)]
    found = compare(timings, timings, list("abcde"))["f1"]
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_luck_with_the_videos_is_not_sure() -> None:
    drawn = random.Random(0)
    noise = [[timing(drawn.randint(0, 4)) for _ in range(30)] for _ in range(2)]
    found = compare(*noise, videos=[str(i) for i in range(30)])["recall"]
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    drawn = random.Random(1)
    gains = [drawn.choice([0, 1]) for _ in range(200)]
    first, second = [timing(2)] * 200, [timing(2 + gain) for gain in gains]
    found = compare(first, second, [str(i) for i in range(200)])["recall"]
    share = sum(gains) / 200
    width = 2 * 1.96 * (share * (1 - share) / 200) ** 0.5 / 4
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_streams_of_one_video_are_drawn_together() -> None:
    first, second = [timing(1)] * 4, [timing(1), timing(3)] * 2
    assert compare(first, second, list("aabb"))["recall"].low == 0.25
    assert compare(first, second, list("abcd"))["recall"].low == 0


def test_a_model_that_says_nothing_has_no_precision() -> None:
    found = compare([timing(0, said=0)], [timing(1)], ["a"])["precision"]
    assert (found.first, found.second, found.difference, found.p) == (None, 0.25, None, None)


def test_two_folders_give_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [timing(1)] * 6, "first")
    b = write(tmp_path / "b", [timing(2)] * 6, "second")
    assert main([str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "A: `first`, B: `second`; 6 streams of 3 videos" in shown
    assert "| recall | 0.250 | 0.500 | 0.250 | 0.250 to 0.250 | 0.000 |" in shown


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [timing(1)] * 2)
    others = {
        "the windows differ": write(tmp_path / "b", [timing(1)] * 2, after_s=2),
        "'d2' is not the same in both": write(tmp_path / "c", [timing(1)] * 3),
        "is no finished evaluation": tmp_path / "gone",
    }
    for message, other in others.items():
        assert main([str(a), str(other)]) == 1
        assert message in capsys.readouterr().err
    (a / "predictions.jsonl").write_text("notes\n")
    assert main([str(a), str(a)]) == 1
    assert "is no evaluation of this version" in capsys.readouterr().err


def test_an_evaluation_with_an_id_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path / "a", [timing(1), timing(2)]), write(tmp_path / "b", [timing(1), timing(2)])
    predictions = second / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"d1"', '"d0"'))
    assert main([str(first), str(second)]) == 1
    assert "graded 1 dialogue ids twice or more, such as 'd0'" in capsys.readouterr().err


def test_a_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [timing(1)])
    predictions = first / "predictions.jsonl"
    row = json.loads(predictions.read_text().split("\n")[0]) | {"labels": [{"time": 0, "text": "a\u2028b\x85c"}]}
    predictions.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert main([str(first), str(first)]) == 0
