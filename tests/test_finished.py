"""Results that outlive the program that made them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.finished import Finished, FinishedError, key_of


def test_what_is_kept_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "finished.jsonl"
    with Finished(path) as finished:
        assert finished.get("a") is None
        finished.add("a", {"said": ["Grüße"]})
        finished.add("b", [1.5])
        assert finished.get("b") == [1.5]
    with Finished(path) as finished:
        assert (finished.get("a"), finished.get("b"), len(finished)) == ({"said": ["Grüße"]}, [1.5], 2)


def test_half_a_line_is_dropped_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "finished.jsonl"
    with Finished(path) as finished:
        finished.add("a", 1)
    path.write_bytes(path.read_bytes() + b'{"key": "b", "resu')
    with Finished(path) as finished:
        assert len(finished) == 1
        finished.add("c", 3)
    with Finished(path) as finished:
        assert (finished.get("a"), finished.get("b"), finished.get("c")) == (1, None, 3)


def test_two_programs_do_not_write_at_once(tmp_path: Path) -> None:
    with Finished(tmp_path / "f"), pytest.raises(FinishedError, match="another evaluation is writing"):
        Finished(tmp_path / "f")


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("my notes\n")
    with pytest.raises(FinishedError, match="holds no results of ours"):
        Finished(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "my notes\n"


def test_keys_differ_with_every_part_and_not_with_the_order_of_names() -> None:
    keys = {key_of("stream", 0.5, {"a": 1}), key_of("stream", 0.6, {"a": 1}), key_of("stream", 0.5, {"a": 2})}
    assert len(keys) == 3
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
