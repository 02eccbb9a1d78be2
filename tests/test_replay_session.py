"""A recorded session goes the same way again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from application import application
from live_client import live, picture

from actors.messages import SessionSettings
from serve.recording import Finished, Opened, Recorder, RecordingError, read
from serve.replay import difference, main, replay
from serve.server_events import FrameDecided, ItemAdded, SessionCreated, SessionUpdated, TextDone


def test_a_recorded_session_is_replayed_to_the_same_events(
    tiny: dict[str, object], redis_url: str, tmp_path: Path
) -> None:
    with application(tiny, redis_url, record=str(tmp_path)) as url, live(url) as client:
        session_id = client.until(SessionCreated).session.id
        sampled = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}
        client.configure(instructions="Be brief.", max_output_tokens=4, video={"drop_policy": "latest"}, **sampled)
        client.ask("What is there?", video_time=1.0)
        for index in range(12):
            client.frame(index / 2, picture(20 * index))
            client.until(FrameDecided)
            if index == 4:
                client.ask("And now?")
            if index == 8:
                client.say({"type": "session.update", "session": {"video": {"threshold": 0.1}}})
        client.end()
    with application(tiny, redis_url) as url:
        recorded, told = asyncio.run(replay(tmp_path / f"{session_id}.jsonl", url))
    assert {FrameDecided, ItemAdded, SessionUpdated, TextDone} <= {type(event) for event in recorded}
    assert len(recorded) == len(client.logged)
    assert difference(recorded, told) is None
    times = [event.video_time for event in told if isinstance(event, FrameDecided)]
    assert times == [index / 2 for index in range(12)]


def test_a_difference_is_shown() -> None:
    one, other = (FrameDecided(position=0, seq=0, video_time=0, p_silent=p) for p in (0.5, 0.6))
    assert difference([one], [one]) is None
    assert "0.6" in str(difference([one], [other]))
    assert "missing" in str(difference([one, one], [one]))
    assert "more" in str(difference([one], [one, one]))


@pytest.mark.parametrize("text", ["{", '{"kind": "what"}', ""])
def test_what_is_no_recording_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(RecordingError, match=r"broken\.jsonl"):
        read(path)
    assert main([str(path)]) == 1
    assert "broken.jsonl" in capsys.readouterr().err


def test_a_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "s")
    recorder.add(Opened(settings=SessionSettings(instructions="first\u2028second\x85third"), include=[]))
    recorder.add(Finished())
    (opened, _) = read(tmp_path / "s.jsonl")
    assert isinstance(opened, Opened)
    assert opened.settings.instructions == "first\u2028second\x85third"
