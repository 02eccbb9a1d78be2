"""Dialogues in files: what is written is what is read, in Parquet and in JSONL."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import Assistant, Stream, System, Turn, User
from jobs.dialogue_files import DialogueFileError, Origin, read_dialogues, read_provenance, to_line, write_parquet
from jobs.dialogues import Dialogue

ORIGIN = Origin(dataset="", part="", source="v.srt", source_sha256="ab")


def dialogue(*turns: Turn, number: int = 0, video_id: str = "v") -> Dialogue:
    shown = sum(turn.num_frames for turn in turns if isinstance(turn, Stream))
    return Dialogue(
        dialogue_id=f"{video_id}-{number}",
        task="narration",
        video_id=video_id,
        video="",
        fps=2,
        frames=(3, 3 + shown),
        conversation=turns,
    )


def streams() -> st.SearchStrategy[Stream]:
    learned = st.booleans() | st.integers(0, 9)
    pairs = st.tuples(st.integers(0, 9), learned).filter(lambda pair: int(pair[1]) <= pair[0] or pair[1] is True)
    return pairs.map(lambda pair: Stream(num_frames=pair[0], learn=pair[1]))


TURNS = st.one_of(
    streams(),
    st.builds(User, content=st.text()),
    st.builds(System, content=st.text()),
    st.builds(Assistant, content=st.text(), learn=st.booleans()),
)


@given(st.lists(TURNS))
def test_any_dialogue_comes_back_from_parquet_teaching_the_same(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Turn]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    write_parquet(path, [(dialogue(*turns), ORIGIN, 0)], {})
    [read] = read_dialogues(path)
    assert list(map(taught, read.conversation)) == list(map(taught, turns))


def taught(turn: Turn) -> tuple[object, ...]:
    if isinstance(turn, Stream):
        return turn.num_frames, turn.num_learned
    return turn.role, turn.content, isinstance(turn, Assistant) and turn.learn


def test_dialogues_come_back_from_both_forms(tmp_path: Path) -> None:
    one = dialogue(System(content="Be brief."), Stream(num_frames=3, learn=2), User(content="Öl?"))
    two = dialogue(Stream(num_frames=2, learn=True), Assistant(content="No.", learn=True), number=1)
    (tmp_path / "train.jsonl").write_text(to_line(one) + to_line(two))
    write_parquet(tmp_path / "file.parquet", [(one, ORIGIN, 0), (two, ORIGIN, 1)], {"seed": 1})
    assert read_dialogues(tmp_path / "train.jsonl") == [one, two]
    assert read_dialogues(tmp_path / "train") == [one, two]
    assert read_dialogues(tmp_path / "file.parquet") == [one, two]
    assert read_provenance(tmp_path / "file.parquet") == {"seed": 1}


def test_the_order_is_not_that_of_the_files(tmp_path: Path) -> None:
    a, b = (dialogue(Stream(num_frames=1), video_id=name) for name in "ab")
    more = dialogue(Stream(num_frames=2), video_id="a", number=1)
    for folder, files in (("one", [[a, more, b]]), ("two", [[b], [more], [a]])):
        (tmp_path / folder).mkdir()
        for number, dialogues in enumerate(files):
            rows = [(d, ORIGIN, int(d is more)) for d in dialogues]
            write_parquet(tmp_path / folder / f"part-{number}.parquet", rows, {})
    assert read_dialogues(tmp_path / "one") == read_dialogues(tmp_path / "two") == [a, more, b]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(DialogueFileError, match=r"train: no such dialogue file.*jobs.build_dialogues"):
        read_dialogues(tmp_path / "train")
    line = to_line(dialogue(Stream(num_frames=1)))
    path.write_text(line + line.replace('"frames": [3, 4]', '"frames": [3, 5]'))
    with pytest.raises(DialogueFileError, match=r"train.jsonl:2: .*frames is \[3, 5\], but the stream turns have 1"):
        read_dialogues(path)


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DialogueFileError, match=r"train holds no .parquet file"):
        read_dialogues(tmp_path / "train")
    (tmp_path / "train" / "part-00000.parquet").write_bytes(b"no table")
    with pytest.raises(DialogueFileError, match=r"part-00000.parquet: not dialogues in Parquet"):
        read_dialogues(tmp_path / "train")
    pq.write_table(pa.table({"dialogue_id": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DialogueFileError, match=r"other.parquet: not dialogues in Parquet"):
        read_dialogues(tmp_path / "other.parquet")


def test_two_forms_of_one_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DialogueFileError, match=r"both .*train and .*train.jsonl hold dialogues: remove one"):
        read_dialogues(tmp_path / "train")
