"""jobs.subtitles: cues, the two text formats, and pictures with text in them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from actors.video import VideoError, probe, read_frames
from jobs.annotations import read_srt, read_webvtt
from jobs.replay import Utterance
from jobs.subtitles import Cue, burn, cues_of, srt, webvtt


def test_a_cue_ends_when_it_is_read_or_the_next_begins() -> None:
    long = "x" * 60
    assert cues_of([Utterance(0.0, "Hello."), Utterance(1.5, long), Utterance(20.0, "End.")]) == [
        Cue(0.0, 1.5, "Hello."),
        Cue(1.5, 6.5, long),
        Cue(20.0, 22.0, "End."),
    ]
    assert cues_of([]) == []


def test_what_is_said_at_one_time_is_one_cue() -> None:
    assert cues_of([Utterance(3.0, "Two\n\nlines.", "a?"), Utterance(3.0, " And more.", "b?")]) == [
        Cue(3.0, 5.0, "Two lines. And more.")
    ]


def test_srt_is_written_as_players_expect() -> None:
    cues = [Cue(0.0, 1.5, "Hello."), Cue(3599.9996, 3601.25, "x" * 30 + " " + "y" * 30)]
    assert srt(cues) == (
        f"1\n00:00:00,000 --> 00:00:01,500\nHello.\n\n2\n01:00:00,000 --> 01:00:01,250\n{'x' * 30}\n{'y' * 30}\n"
    )


def test_webvtt_is_written_as_browsers_expect() -> None:
    assert webvtt([Cue(0.0, 1.5, "A <b> & C")]) == "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nA &lt;b&gt; &amp; C\n"
    assert webvtt([]) == "WEBVTT\n"


@pytest.mark.parametrize(("suffix", "write", "read"), [(".srt", srt, read_srt), (".vtt", webvtt, read_webvtt)])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str, write, read) -> None:
    cues = [Cue(0.5, 1.25, "One 00:00:01 -> two."), Cue(2.0, 4.0, "Übung – 1 < 2 & 3\N{SNOWMAN}"), Cue(5.0, 7.0, "3")]
    file = tmp_path / f"clip{suffix}"
    file.write_text(write(cues), encoding="utf-8")
    (row,) = read(file)
    assert [(moment.time, moment.stop, moment.text) for moment in row.moments] == [
        (cue.start, cue.stop, cue.text) for cue in cues
    ]


def test_an_arrow_in_the_text_is_no_timing(tmp_path: Path) -> None:
    file = tmp_path / "clip.vtt"
    file.write_text(webvtt([Cue(0.0, 1.0, "--> x")]))
    assert [moment.text for moment in next(read_webvtt(file)).moments] == ["-> x"]


def write_clip(path: Path, width: int = 320, height: int = 181, sound: bool = True) -> Path:
    """Two seconds of grey at 10 frames a second, with a tone."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("ffv1", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "bgr0"
        tone = container.add_stream("aac", rate=16000) if sound else None
        for _ in range(20):
            grey = np.full((height, width, 3), 90, np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(pictures.encode())
        if tone is not None:
            samples = np.sin(np.arange(32000) / 20, dtype=np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(tone.encode(frame))
            container.mux(tone.encode())
    return path


def test_subtitles_are_in_the_pictures_at_their_times_only(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    burn(write_clip(tmp_path / "clip.mkv"), target, [Cue(0.5, 1.5, "Something is said here, rather long.")])
    info = probe(target)
    assert (info.width, info.height, info.frames) == (320, 180, 20)
    assert info.duration == pytest.approx(2.0, abs=0.11)
    white = {frame.time: int((frame.image > 200).sum()) for frame in read_frames(target, 2.0, 320, "pad")}
    assert {time for time, count in white.items() if count > 100} == {0.5, 1.0}
    with av.open(str(target)) as container:
        assert len(container.streams.audio) == 1
        assert sum(packet.size > 0 for packet in container.demux(audio=0)) > 10


def test_a_video_without_sound_stays_without(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    burn(write_clip(tmp_path / "clip.mkv", sound=False), target, [])
    with av.open(str(target)) as container:
        assert len(container.streams.audio) == 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".mkv"] == ["out.mp4"]


def test_a_video_that_breaks_off_is_kept_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "clip.mkv", sound=False).read_bytes()
    (tmp_path / "broken.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    burn(tmp_path / "broken.mkv", tmp_path / "out.mp4", [Cue(0, 1, "It breaks off.")])
    assert 3 < probe(tmp_path / "out.mp4").frames < probe(tmp_path / "clip.mkv").frames


def test_a_file_that_is_no_video_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"clip\.mp4: subtitles cannot be burnt in"):
        burn(tmp_path / "clip.mp4", tmp_path / "out.mp4", [])
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
