import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.dialogue import Assistant, Stream, System, User
from jobs.annotations import Moment, VideoAnnotation
from jobs.clock import exact, frame_at
from jobs.dialogues import (
    DataConfig,
    Dialogue,
    Narration,
    narrate,
    split_of,
)

FPS = 2.0


def annotated(*moments: tuple[float, str]) -> VideoAnnotation:
    rows = tuple(Moment(time=time, text=text) for time, text in moments)
    return VideoAnnotation(video_id="v", video="v.mp4", moments=rows, source="v.srt")


def narrated(*moments: tuple[float, str], num_frames: int = 40, config: DataConfig | None = None) -> Narration:
    config = config or DataConfig(fps=FPS)
    return narrate(annotated(*moments), num_frames, duration=num_frames / config.fps, config=config)


def spoken_after(dialogue: Dialogue) -> dict[int, str]:
    """Read back from the conversation: after which frame which text is said."""
    frame = dialogue.frames[0] - 1
    said = {}
    for turn in dialogue.conversation:
        if isinstance(turn, Stream):
            frame += turn.num_frames
        elif isinstance(turn, Assistant):
            said[frame] = turn.content
    return said


def test_a_narration_asks_at_its_first_frame_and_learns_everything_after_it() -> None:
    (dialogue,) = narrated((1.2, "You cut."), (3.0, "You wash.")).dialogues
    system, first, user, *rest = dialogue.conversation
    assert isinstance(system, System)
    assert first == Stream(num_frames=1, learn=False)
    assert isinstance(user, User)
    assert user.content in DataConfig().instructions
    assert rest == [
        Assistant(content="You cut.", learn=True),
        Stream(num_frames=3, learn=True),
        Assistant(content="You wash.", learn=True),
    ]
    assert dialogue.frames == (3, 7)


@given(st.decimals(0, 10_000, places=3), st.sampled_from([1, 2, 2.5, 5, 8, 10, 24, 25, 29.97, 30, 60]))
def test_a_frame_is_the_first_at_or_after_the_time(time: object, fps: float) -> None:
    frame = frame_at(float(str(time)), fps)
    assert Fraction(frame) / exact(fps) >= Fraction(str(time))
    assert frame == 0 or Fraction(frame - 1) / exact(fps) < Fraction(str(time))


def test_one_frame_gaps_stay_one_frame_where_floats_would_lose_them() -> None:
    frames = [frame_at(i / 10, 10) for i in range(100)]
    assert frames == list(range(100))
    assert [math.ceil(i * 0.1 * 10) for i in range(100)] != frames


@given(
    st.lists(st.tuples(st.floats(0, 25, allow_nan=False), st.sampled_from(["a", "b", "c", " "])), max_size=12),
    st.integers(1, 30),
    st.sampled_from(["clip", "split"]),
)
def test_stream_turns_cover_the_frames_and_every_text_is_said_or_counted(
    moments: list[tuple[float, str]], max_frames: int, longer: str
) -> None:
    config = DataConfig(fps=FPS, max_frames=max_frames, longer=longer)
    narration = narrated(*sorted(moments), config=config)
    for dialogue in narration.dialogues:
        streams = [turn for turn in dialogue.conversation if isinstance(turn, Stream)]
        assert sum(turn.num_frames for turn in streams) == dialogue.num_frames <= max_frames
        assert all(turn.num_frames > 0 for turn in streams)
    assert narration.used == sum(len(spoken_after(dialogue)) for dialogue in narration.dialogues)
    assert narration.used + narration.dropped.total() == len(moments)
    if longer == "split":
        frames = [frame for dialogue in narration.dialogues for frame in range(*dialogue.frames)]
        assert frames == sorted(set(frames))


def test_of_two_texts_at_one_frame_the_later_is_said() -> None:
    narration = narrated((1.1, "Early."), (1.4, "Late."), (2.0, "Next."))
    assert spoken_after(narration.dialogues[0]) == {3: "Late.", 4: "Next."}
    assert narration.dropped == {"a later text at the same frame": 1}


def test_texts_that_cannot_be_said_are_counted_by_reason() -> None:
    narration = narrated((0, " \n"), (1, "Same."), (2, "Same."), (19.9, "Last."), (20.1, "Too late."))
    assert spoken_after(narration.dialogues[0]) == {2: "Same.", 39: "Last."}
    assert narration.dropped == {"no text": 1, "same text as before": 1, "after the end of the video": 1}


def test_a_long_narration_is_clipped_or_goes_on_in_further_dialogues() -> None:
    moments = [(0.0, "a"), (2.0, "b"), (4.5, "c"), (10.0, "d")]
    clipped = narrated(*moments, config=DataConfig(fps=FPS, max_frames=5))
    assert [spoken_after(dialogue) for dialogue in clipped.dialogues] == [{0: "a", 4: "b"}]
    assert clipped.dropped == {"beyond max_frames": 2}
    split = narrated(*moments, config=DataConfig(fps=FPS, max_frames=5, longer="split"))
    assert [spoken_after(dialogue) for dialogue in split.dialogues] == [{0: "a", 4: "b"}, {9: "c"}, {20: "d"}]
    assert len({dialogue.dialogue_id for dialogue in split.dialogues}) == 3


def test_the_seed_alone_decides_the_instruction() -> None:
    def instructions(seed: int) -> list[object]:
        config = DataConfig(fps=FPS, max_frames=1, longer="split", seed=seed)
        dialogues = narrated(*((float(i), str(i)) for i in range(12)), config=config).dialogues
        return [dialogue.conversation[2] for dialogue in dialogues]

    assert instructions(0) == instructions(0) != instructions(1)


def test_a_video_is_in_one_split_whatever_the_seed_and_more_validation_only_adds() -> None:
    ids = [f"video-{i}" for i in range(500)]
    small, large = ({i for i in ids if split_of(i, share) == "validation"} for share in (0.1, 0.3))
    assert small < large
    assert 25 <= len(small) <= 75
    assert all(split_of(i, 0) == "train" and split_of(i, 1) == "validation" for i in ids)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError):
        DataConfig(frames_per_second=2)  # type: ignore[call-arg]
