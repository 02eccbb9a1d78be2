"""The gateway over HTTP, with the real bus, encoder and LLM around it in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from application import application
from live_client import live, post_video
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from serve.server_events import FrameDecided, ItemAdded, SessionCreated, SessionEnded


@pytest.fixture(scope="module")
def url(tiny: dict[str, object], redis_url: str) -> Iterator[str]:
    with application(tiny, redis_url) as address:
        yield address


def test_a_posted_video_is_watched_to_its_end(url: str, sample_video: Path) -> None:
    events = post_video(
        url,
        sample_video.read_bytes(),
        question="What is this?",
        question_time="2",
        fps="1",
        max_output_tokens="3",
        include="frame_decided",
    )
    assert isinstance(events[0], SessionCreated)
    decided = [event.video_time for event in events if isinstance(event, FrameDecided)]
    assert decided == [float(index) for index in range(len(decided))]
    assert len(decided) > 30
    (asked,) = [event for event in events if isinstance(event, ItemAdded)]
    assert asked.video_time == 2
    assert isinstance(events[-1], SessionEnded)
    assert events[-1].frames.decided == len(decided)


def test_a_question_without_a_time_is_said_before_the_first_frame(url: str, sample_video: Path) -> None:
    events = post_video(
        url,
        sample_video.read_bytes(),
        question=["And then?", "Narrate."],
        question_time="10",
        fps="0.2",
        max_output_tokens="3",
        include="frame_decided",
    )
    asked = [event for event in events if isinstance(event, ItemAdded | FrameDecided)]
    told = [event.item.content[0].text if isinstance(event, ItemAdded) else event.seq for event in asked]
    assert told[:4] == ["Narrate.", 0, 1, 2]
    assert told[4:6] == ["And then?", 3]


@pytest.mark.parametrize(
    ("video", "form", "status", "says"),
    [
        (b"", {}, 422, "clip.mp4"),
        (b"not a video at all", {}, 422, "clip.mp4"),
        (b"x", {"fps": "0"}, 422, "fps"),
        (b"x", {"fps": "nan"}, 422, "fps"),
        (b"x", {"question": "why?", "question_time": "nan"}, 422, "nan"),
        (b"x", {"question_time": "1"}, 422, "1 times for 0 questions"),
        (b"x", {"question": " "}, 422, "empty"),
        (b"x", {"include": "everything"}, 422, "frame_decided"),
        (b"x", {"threshold": "-1"}, 422, "threshold"),
    ],
)
def test_a_bad_post_is_refused_with_what_is_wrong(
    url: str, video: bytes, form: dict[str, str], status: int, says: str
) -> None:
    answer = httpx.post(f"{url}/v1/videos", files={"video": ("clip.mp4", video)}, data=form)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


def test_a_post_without_a_video_is_told_so(url: str) -> None:
    answer = httpx.post(f"{url}/v1/videos", files={"image": ("clip.mp4", b"x")})
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "video is missing")


def test_an_upload_over_the_limit_is_refused_announced_or_not(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, upload_bytes=1000) as url:
        announced = httpx.post(f"{url}/v1/videos", files={"video": ("clip.mp4", bytes(2000))})
        boundary = b"--b\r\nContent-Disposition: form-data; name=video; filename=a.mp4\r\n\r\n"
        chunks = [boundary, *[bytes(500)] * 4, b"\r\n--b--\r\n"]
        unannounced = httpx.post(
            f"{url}/v1/videos", content=iter(chunks), headers={"content-type": "multipart/form-data; boundary=b"}
        )
    assert [answer.status_code for answer in (announced, unannounced)] == [413, 413]
    assert announced.json()["error"]["code"] == "too_big"


def test_errors_look_alike_everywhere(url: str) -> None:
    for answer in (httpx.get(f"{url}/v1/nothing"), httpx.get(f"{url}/v1/videos"), httpx.post(f"{url}/v1/videos")):
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}


def test_with_a_key_only_its_bearers_are_served(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, api_key="secret") as url:
        assert httpx.get(f"{url}/v1/stats").status_code == 401
        assert httpx.get(f"{url}/v1/stats", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(f"{url}/v1/stats", headers={"Authorization": "Bearer secret"}).status_code == 200
        with pytest.raises(InvalidStatus) as refused:
            connect(f"{url.replace('http', 'ws', 1)}/v1/realtime")
        answer = refused.value.response
        assert (answer.status_code, answer.headers["content-type"]) == (401, "application/json")
        assert answer.body is not None
        error = json.loads(answer.body)["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "unauthorized", None)
        assert "Bearer" in error["message"]
        with live(url, Authorization="Bearer secret") as client:
            assert client.until(SessionCreated)


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_without_a_key_pages_of_other_sites_are_not_served(url: str, headers: dict[str, str]) -> None:
    answer = httpx.get(f"{url}/v1/stats", headers=headers)
    assert answer.status_code == 401
    assert "evil.example" in json.dumps(answer.json())
