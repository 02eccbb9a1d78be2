import json
from pathlib import Path

import pytest

from actors.config import ConfigError
from jobs.annotations import AnnotationError, VideoAnnotation, find_annotations, read_annotations
from jobs.dataset_files import find_video

SRT = """1
00:00:01,500 --> 00:00:04,000
You cut
the <i>onion</i>.

2
00:01:02,250 --> 00:01:03,000
You wash it.
"""

WEBVTT = """WEBVTT - descriptions

NOTE a note --> that is none

STYLE
::cue { color: red }

first
00:01.100 --> 00:02.000 align:start
<v Ann>Salt &amp; pepper

01:00:00.000 --> 01:00:01.000
An hour later.
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def only(path: Path) -> VideoAnnotation:
    (annotation,) = read_annotations(path)
    return annotation


def said(annotation: VideoAnnotation) -> list[tuple[float, float | None, str]]:
    return [(moment.time, moment.stop, moment.text) for moment in annotation.moments]


def test_srt_cues_become_moments_of_the_video_beside_them(tmp_path: Path) -> None:
    (tmp_path / "kitchen.webm").touch()
    annotation = only(write(tmp_path / "kitchen.srt", SRT))
    assert annotation.video_id == "kitchen"
    assert annotation.video == str(tmp_path / "kitchen.webm")
    assert said(annotation) == [(1.5, 4.0, "You cut the onion."), (62.25, 63.0, "You wash it.")]


def test_a_camera_may_have_named_its_video_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.MOV").touch()
    annotation = only(write(tmp_path / "IMG_0001.srt", SRT))
    assert (annotation.video_id, annotation.video) == ("IMG_0001", str(tmp_path / "IMG_0001.MOV"))
    assert find_video(tmp_path, "IMG_0001") == tmp_path / "IMG_0001.MOV"


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("1\n00", "00"), (",", "."), ("1\n00", "\ufeff1\n00")])
def test_common_variants_of_srt_read_the_same(tmp_path: Path, change: tuple[str, str]) -> None:
    plain = said(only(write(tmp_path / "plain.srt", SRT)))
    (tmp_path / "variant.srt").write_bytes(SRT.replace(*change).encode())
    assert said(only(tmp_path / "variant.srt")) == plain


def test_webvtt_cues_become_moments_without_notes_styles_and_tags(tmp_path: Path) -> None:
    annotation = only(write(tmp_path / "kitchen.vtt", WEBVTT))
    assert said(annotation) == [(1.1, 2.0, "Salt & pepper"), (3600.0, 3601.0, "An hour later.")]


def test_jsonl_rows_are_read_whole_and_put_in_order_of_time(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4", "moments": [{"time": 2, "text": "Then."}, {"time": 1, "text": "First.", "stop": 3}]},
        {"video": "sub/b.mp4", "video_id": "other", "duration": 9.5, "moments": [], "tasks": ["cook"]},
    ]
    path = write(tmp_path / "rows.jsonl", "\n\n".join(map(json.dumps, rows)))
    first, second = read_annotations(path)
    assert (first.video_id, said(first)) == ("a", [(1.0, 3.0, "First."), (2.0, None, "Then.")])
    assert first.video == str(tmp_path / "a.mp4")
    assert (second.video_id, second.duration, second.tasks) == ("other", 9.5, ("cook",))


def test_a_row_in_which_the_user_speaks_is_a_chat(tmp_path: Path) -> None:
    said = [{"time": 1, "text": "What is it?", "role": "user"}, {"time": 1, "text": "A cup."}]
    row = only(write(tmp_path / "rows.jsonl", json.dumps({"video": "a.mp4", "moments": said, "part": "b"})))
    assert (row.kind, row.part, [moment.role for moment in row.moments]) == ("chat", "b", ["user", "assistant"])


def test_characters_that_end_lines_elsewhere_are_text_in_json(tmp_path: Path) -> None:
    texts = ["One\u2028two.", "Next\x85line."]
    moments = [{"time": time, "text": text} for time, text in enumerate(texts)]
    line = json.dumps({"video": "a.mp4", "moments": moments}, ensure_ascii=False)
    assert [moment.text for moment in only(write(tmp_path / "rows.jsonl", line + "\r\n")).moments] == texts


def test_decimal_times_survive_as_they_were_written(tmp_path: Path) -> None:
    text = "".join(f"00:00:00,{ms:03} --> 00:00:01,000\nt\n\n" for ms in range(0, 1000, 7))
    assert [str(m.time) for m in only(write(tmp_path / "a.srt", text)).moments] == [
        str(ms / 1000) for ms in range(0, 1000, 7)
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.srt",
            SRT.replace("00:00:01,500", "one"),
            r"a.srt:2: found 'one --> .*expected a line such as '00:00:01,500",
        ),
        ("a.srt", SRT.replace("00:00:04,000", "00:00:01,000"), r"a.srt:2: found a cue that ends at 1.0 s, before"),
        ("a.srt", "1\n\n" + SRT, r"a.srt:1: found '1', expected"),
        ("a.vtt", SRT, r"a.vtt:1: found '1', expected 'WEBVTT'"),
        ("a.vtt", "", r"a.vtt:1: found '', expected 'WEBVTT'"),
        ("a.jsonl", '{"video": "a.mp4", "moments": []}\n{', r"a.jsonl:2: not JSON .*expected one object a line"),
        ("a.jsonl", '{"moments": []}', r"a.jsonl:1: found .*expected an object with 'video'"),
        ("a.jsonl", '{"video": "a.mp4"}', r"a.jsonl:1: moments: .*[Ff]ield required"),
        ("a.jsonl", '{"video": "a.mp4", "moments": [{"time": -1, "text": "t"}]}', r"a.jsonl:1: moments.0.time: found"),
        ("a.jsonl", '{"video": "a.mp4", "moments": [], "fps": 2}', r"a.jsonl:1: fps: found"),
        ("a.jsonl", '{"video": "a.mp4", "moments": [], "kind": "lta"}', r"a.jsonl:1: kind: found"),
    ],
)
def test_bad_files_name_file_line_found_and_expected(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        list(read_annotations(write(tmp_path / name, text)))


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_bytes(SRT.encode() + b"\n3\n00:00:05,000 --> 00:00:06,000\n\xff\n")
    with pytest.raises(AnnotationError, match=r"a.srt:12: .*UTF-8"):
        list(read_annotations(tmp_path / "a.srt"))


def test_annotation_files_are_found_in_folders_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    files = [write(tmp_path / name, SRT) for name in ("a.srt", "sub/b.SRT", "sub/c.vtt")]
    (tmp_path / "a.mp4").touch()
    assert find_annotations([str(tmp_path), str(files[0])]) == files


@pytest.mark.parametrize(("path", "message"), [("gone", "does not exist"), ("a.txt", "no reader"), (".", "holds no")])
def test_paths_without_annotations_are_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=message):
        find_annotations([str(tmp_path / path)])
