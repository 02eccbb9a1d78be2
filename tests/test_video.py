"""The clock, both decoders and the errors of actors/video.py, on the samples and on small made-up videos."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from actors import video
from actors.video import VideoError, encode_jpeg, fit_square, probe, read_frames
from jobs.extents import frames_in

SAMPLE_NAMES = ("big_buck_bunny_trailer", "hands_and_objects")
RATES = (0.5, 1, 2, 5, 8, 10, 24000 / 1001, 24, 25, 29.97, 30, 60)
needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")
each_backend = pytest.mark.parametrize("backend", [pytest.param("decord", marks=needs_decord), "pyav"])


def grey(level: int, size: tuple[int, int] = (64, 32)) -> av.VideoFrame:
    """A frame whose number can be read off its brightness."""
    return av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")


def write_video(
    path: Path,
    stamps: list[int],
    time_base: Fraction,
    size: tuple[int, int] = (64, 32),
    rotation: int = 0,
    gop: int = 8,
) -> Path:
    """Frame k is a flat grey of level 8 + 4k, shown from stamps[k] on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "g": str(gop)})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, stamp in enumerate(stamps):
            frame = grey(8 + 4 * number, size)
            frame.pts, frame.time_base = stamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damage(path: Path, packets: slice) -> Path:
    """Overwrite some of the video packets in a file with zeros."""
    with av.open(str(path)) as container:
        bodies = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    for body in bodies[packets]:
        assert data.count(body) == 1
        data = data.replace(body, bytes(len(body)))
    path.write_bytes(data)
    return path


def levels(path: Path, fps: float, **options: object) -> list[int]:
    """Numbers of the frames shown at each tick of a video by `write_video`."""
    return [round((int(frame.image[32, 32, 0]) - 8) / 4) for frame in read_frames(path, fps, 64, "pad", **options)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Fraction]]:
    """A video with uneven frame times, and those times in seconds."""
    gaps = [1001, 2002, 500, 1502, 9009, 1001, 3003, 1, 1000, 15015, 1001, 7, 1994, 1001, 4004]
    stamps = [0, *np.cumsum(gaps * 3).tolist()]
    path = tmp_path_factory.mktemp("video") / "uneven.mp4"
    return write_video(path, stamps, Fraction(1, 30000)), [Fraction(stamp, 30000) for stamp in stamps]


@each_backend
@pytest.mark.parametrize("fps", RATES)
def test_a_tick_shows_the_first_frame_not_before_it(
    uneven: tuple[Path, list[Fraction]], fps: float, backend: str
) -> None:
    path, times = uneven
    rate = Fraction(fps).limit_denominator(10_000)
    expected, tick = [], 0
    while Fraction(tick) / rate <= times[-1]:
        expected.append(next(number for number, time in enumerate(times) if time >= tick / rate))
        tick += 1
    assert levels(path, fps, backend=backend) == expected


def test_times_lie_on_the_grid(sample_video: Path) -> None:
    frames = list(read_frames(sample_video, 29.97, 16, "pad", stop=9))
    assert [frame.tick for frame in frames] == list(range(len(frames)))
    assert [frame.time for frame in frames] == [float(tick / Fraction(2997, 100)) for tick in range(len(frames))]


@needs_decord
@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_both_decoders_yield_the_same_frames(samples: Path, name: str) -> None:
    path = samples / f"{name}.mp4"
    pairs = zip(
        read_frames(path, 2, 224, "pad", backend="decord"),
        read_frames(path, 2, 224, "pad", backend="pyav"),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.tick, ours.time) == (theirs.tick, theirs.time)
        assert np.array_equal(ours.image, theirs.image)


@each_backend
def test_a_part_of_a_video_equals_that_part_of_the_whole(sample_video: Path, backend: str) -> None:
    whole = list(read_frames(sample_video, 3, 32, "pad", backend=backend))
    part = list(read_frames(sample_video, 3, 32, "pad", start=20.1, stop=24, backend=backend))
    assert [frame.tick for frame in part] == list(range(61, 72))
    for frame in part:
        assert frame.time == whole[frame.tick].time
        assert np.array_equal(frame.image, whole[frame.tick].image)


@needs_decord
def test_pyav_goes_on_where_decord_stops_and_the_log_says_so(
    sample_video: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import decord

    class FailsHalfWay(decord.VideoReader):
        def __getitem__(self, position: int) -> object:
            if position > 100:
                raise decord.DECORDError("Error sending packet.")
            return super().__getitem__(position)

    whole = list(read_frames(sample_video, 2, 32, "pad", backend="pyav"))
    monkeypatch.setattr(decord, "VideoReader", FailsHalfWay)
    with caplog.at_level(logging.INFO, logger="actors"):
        rescued = list(read_frames(sample_video, 2, 32, "pad"))
    assert re.search(r"tick=\d+ PyAV takes over: Error sending packet", caplog.text)
    assert [frame.tick for frame in rescued] == [frame.tick for frame in whole]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(rescued, whole, strict=True))
    with pytest.raises(VideoError, match="decord cannot read it: Error sending packet"):
        list(read_frames(sample_video, 2, 32, "pad", backend="decord"))


def write_moving(path: Path, codec: str) -> Path:
    """Sixty frames of a moving bar, with key frames 12 apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(60):
            picture = np.zeros((64, 64, 3), np.uint8)
            picture[:, number : number + 4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@needs_decord
@pytest.mark.parametrize(("name", "codec"), [("a.mpg", "mpeg2video"), ("a.avi", "mpeg4"), ("a.ts", "libx264")])
def test_decord_is_kept_from_formats_in_which_it_is_not_exact(tmp_path: Path, name: str, codec: str) -> None:
    path = write_moving(tmp_path / name, codec)
    with pytest.raises(VideoError, match="is not exact with it"):
        next(read_frames(path, 5, 64, "pad", backend="decord"))
    bars = [int(np.argmax(frame.image[32, :, 0] > 128)) for frame in read_frames(path, 5, 64, "pad")]
    assert bars == list(range(0, 60, 5))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mpg", "mpeg2video"), ("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.mkv", "libx264")]
)
def test_any_start_shows_the_frames_of_the_whole(tmp_path: Path, name: str, codec: str) -> None:
    path = write_moving(tmp_path / name, codec)
    whole = list(read_frames(path, 25, 32, "pad", backend="pyav"))
    assert len(whole) == 60
    for start in range(1, 60, 7):
        part = list(read_frames(path, 25, 32, "pad", start=start / 25, backend="pyav"))
        assert [frame.tick for frame in part] == list(range(start, 60))
        assert all(np.array_equal(frame.image, whole[frame.tick].image) for frame in part)


@needs_decord
@pytest.mark.parametrize("width", [2, 16, 48, 64])
def test_narrow_pictures_are_read(tmp_path: Path, width: int) -> None:
    write_video(tmp_path / "v.mp4", [0, 1, 2], Fraction(1, 2), size=(width, 48))
    image = next(read_frames(tmp_path / "v.mp4", 2, 32, "pad")).image
    assert image.shape == (32, 32, 3)
    assert probe(tmp_path / "v.mp4").width == width


def test_decord_is_kept_from_videos_that_do_not_fit_in_memory(
    sample_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "DECORD_MAX_BYTES", 1 << 20)
    with pytest.raises(VideoError, match="may keep all 1323 frames of 480x270 in memory"):
        next(read_frames(sample_video, 2, 32, "pad", backend="decord"))
    assert next(read_frames(sample_video, 2, 32, "pad")).tick == 0


def test_a_video_that_starts_late_starts_at_tick_zero(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mkv", [5000 + 100 * k for k in range(20)], Fraction(1, 1000))
    assert levels(path, 10) == list(range(20))


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_samples_last_over_thirty_seconds_and_their_narration_fits(samples: Path, name: str) -> None:
    info = probe(samples / f"{name}.mp4")
    assert info.duration > 30
    ends = [line.split(" --> ")[1] for line in (samples / f"{name}.srt").read_text().splitlines() if " --> " in line]
    hours, minutes, seconds = ends[-1].replace(",", ".").split(":")
    assert len(ends) >= 8
    assert int(hours) * 3600 + int(minutes) * 60 + float(seconds) <= info.duration


@pytest.mark.parametrize("fps", [1, 2, 10])
@pytest.mark.parametrize("stamps", [[0, 40, 80, 1500], [0, 900, 940, 980, 2600], [0, 3000]])
def test_of_a_video_whose_rate_varies_no_frame_is_promised_that_it_has_not(
    tmp_path: Path, fps: float, stamps: list[int]
) -> None:
    path = write_video(tmp_path / "clip.mp4", stamps, Fraction(1, 1000))
    there = sum(1 for _ in read_frames(path, fps, 32, "pad"))
    assert there - 1 <= frames_in(probe(path), fps) <= there


def test_probe_tells_size_rate_and_length(sample_video: Path) -> None:
    info = probe(sample_video)
    assert (info.width, info.height, info.frames) == (480, 270, 1323)
    assert info.fps == pytest.approx(24)
    assert info.duration == pytest.approx(1323 / 24)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(90, 160, 14, 0), (160, 90, 0, 14), (50, 50, 0, 0), (1, 640, 31, 0)]
)
def test_the_aspect_is_kept_and_the_rest_is_black(height: int, width: int, top: int, left: int) -> None:
    square = fit_square(np.full((height, width, 3), 255, np.uint8), 64, "pad")
    assert square.shape == (64, 64, 3)
    shown = np.argwhere(square[:, :, 0] == 255)
    assert shown.min(axis=0).tolist() == [top, left]
    assert square.max(axis=2).sum() == len(shown) * 255


def test_a_long_pause_and_a_clock_that_jumps_back_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    even = write_video(tmp_path / "even.ts", list(range(0, 100, 10)), Fraction(1, 10))
    assert len(list(read_frames(even, 1, 32, "pad"))) == 10
    assert not caplog.records
    paused = write_video(tmp_path / "paused.mp4", [0, 10, 20, 900, 910], Fraction(1, 10))
    assert len(list(read_frames(paused, 1, 32, "pad"))) == 92
    assert "pause_s=88.0" in caplog.text
    caplog.clear()
    twice = tmp_path / "twice.ts"
    twice.write_bytes(even.read_bytes() * 2)
    assert len(list(read_frames(twice, 1, 32, "pad"))) == 10
    assert "clock_back_s=9.0" in caplog.text


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (64, 65)])
def test_cropped_the_middle_fills_the_square(height: int, width: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    side, top, left = min(height, width), (height - min(height, width)) // 2, (width - min(height, width)) // 2
    picture[top : top + side, left : left + side] = 200
    square = fit_square(picture, 64, "crop")
    assert square.shape == (64, 64, 3)
    assert (square[3:-3, 3:-3] == 200).all()
    assert square.min() > 90  # at an edge half a pixel may be of the rest


def test_frames_are_read_as_the_picture_is_fitted(sample_video: Path) -> None:
    padded, cropped = (next(read_frames(sample_video, 1, 64, fit, start=12)).image for fit in ("pad", "crop"))
    assert padded[:13].max() == 0  # 480 x 270: bars above and below
    assert cropped[:13].max() > 0


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", [0, 1, 2], Fraction(1, 10), rotation=90)
    info = probe(path)
    assert (info.width, info.height) == (32, 64)
    image = next(iter(read_frames(path, 2, 64, "pad"))).image
    assert image[:, 32].min() > 0
    assert image[32, :16].max() == 0


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 20), "red").save(path)
    (frame,) = read_frames(path, 2, 20, "pad")
    assert frame.time == 0
    assert frame.image[10, 10].tolist() == [255, 0, 0]


def test_jpeg_keeps_the_picture(sample_video: Path) -> None:
    frame = next(read_frames(sample_video, 1, 224, "pad", start=12))
    decoded = np.asarray(Image.open(io.BytesIO(encode_jpeg(frame.image))))
    assert np.abs(decoded.astype(int) - frame.image).mean() < 4


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(sample_video: Path, fps: float) -> None:
    with pytest.raises(ValueError, match=r"fps is .* expected both above 0"):
        next(read_frames(sample_video, fps, 224, "pad"))


def bad_file(kind: str, folder: Path, sample: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path = path.with_suffix(".txt")
        path.write_text("not a video\n" * 100)
    elif kind == "playlist":
        path = path.with_suffix(".m3u8")
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{sample}\n#EXT-X-ENDLIST\n")
    elif kind == "cut":
        write_video(path, list(range(20)), Fraction(1, 10))
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind == "no_frames":
        path = path.with_suffix(".mkv")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            container.start_encoding()
    elif kind == "zeros":
        path = damage(write_video(path.with_suffix(".mkv"), [0, 1, 2], Fraction(1, 10), gop=1), slice(None))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "not a file, expected one video file"),
        ("empty", "empty (0 bytes), expected a video file"),
        ("text", "not a readable video"),
        ("playlist", "not a readable video"),
        ("cut", "not a readable video"),
        ("audio", "holds no video stream (found: audio)"),
        ("no_frames", "not a readable video"),
        ("zeros", "none of its 3 video packets can be decoded"),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path: Path, sample_video: Path, kind: str, message: str) -> None:
    path = bad_file(kind, tmp_path, sample_video)
    for attempt in (lambda: probe(path), lambda: next(read_frames(path, 2, 32, "pad"))):
        with pytest.raises(VideoError) as raised:
            attempt()
        assert str(path) in str(raised.value)
        assert message in str(raised.value)


def test_a_truncated_video_yields_what_it_has(
    sample_video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = sample_video.read_bytes()
    path = tmp_path / "truncated.mp4"
    path.write_bytes(data[: len(data) * 6 // 10])
    whole = list(read_frames(sample_video, 2, 32, "pad"))
    with caplog.at_level(logging.WARNING, logger="actors"):
        part = list(read_frames(path, 2, 32, "pad"))
    assert 20 < len(part) < len(whole)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(part[:-2], whole, strict=False))
    assert "truncated frames=" in caplog.text


def test_damage_in_the_middle_leaves_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = damage(write_video(tmp_path / "damaged.mkv", list(range(40)), Fraction(1, 10), gop=1), slice(16, 24))
    with caplog.at_level(logging.WARNING, logger="actors"):
        shown = levels(path, 10, backend="pyav")
    assert shown[:16] == list(range(16))
    assert shown[16:24] == [24] * 8
    assert shown[24:] == list(range(24, 40))
    assert "damaged_packets=8 frames_read=32" in caplog.text
