"""Chat completions about recorded video, with the stock `openai` client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from application import application
from live_client import picture
from test_url_guard import Server

from serve.chat_request import ChatRequest, understood

MODEL = "videollm-online"
WORDS = {"role": "user", "content": [{"type": "text", "text": "What is there?"}]}


@pytest.fixture(scope="module")
def url(tiny: dict[str, object], redis_url: str) -> Iterator[str]:
    with application(tiny, redis_url) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Five seconds at 10 frames a second."""
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 50)


def make_clip(path: Path, frames: int, side: int = 64) -> bytes:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = side
        for index in range(frames):
            pixels = np.full((side, side, 3), (index * 5) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def shown(video: bytes) -> dict[str, object]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(video).decode()}"}}


def asked(text: str, video_time: float | None = None) -> dict[str, object]:
    return {"type": "text", "text": text} | ({} if video_time is None else {"video_time": video_time})


def image_part(shade: int = 128, data: bytes | None = None) -> dict[str, object]:
    encoded = base64.b64encode(picture(shade) if data is None else data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}


def user(*parts: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


def post(url: str, **request: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": MODEL, **request}, timeout=120)


def test_the_stock_client_gets_a_message_about_a_video(client: openai.OpenAI, clip: bytes) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user(shown(clip), asked("What happened?")), max_tokens=3, extra_body={"video": {"fps": 2}}
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    segments = choice.message.model_extra["segments"]
    assert choice.message.content == "\n".join(segment["text"] for segment in segments)
    assert segments[-1]["question"] == "What happened?"
    assert segments[-1]["video_time"] == 4.5  # the last of ten frames at 2 a second
    usage = answer.usage
    assert usage.model_extra["frames"] == 10
    assert usage.prompt_tokens >= 10 * 10
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 3 * len(segments)


def test_the_stock_client_streams_chunks_with_video_times(client: openai.OpenAI, clip: bytes) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user(asked("Narrate."), shown(clip), asked("And now?", 2.2), asked("What was it?")),
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    times = [chunk.model_extra["video_time"] for chunk in chunks if "video_time" in (chunk.model_extra or {})]
    assert times == sorted(times)
    assert {0.0, 2.5, 4.5} <= set(times)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_extra["frames"] == 10


def test_streamed_and_whole_are_the_same_message(client: openai.OpenAI, clip: bytes) -> None:
    request = {"model": MODEL, "messages": user(shown(clip), asked("What?")), "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(pieces).strip() == whole.strip()


def test_order_in_the_messages_is_order_in_time() -> None:
    image, video = image_part(10), {"type": "video"}

    def moments(*parts: dict[str, object]) -> list[float | str]:
        request = ChatRequest(model=MODEL, messages=user(*parts))
        return [question.time for question in understood(request).questions]

    assert moments(asked("Narrate."), video, asked("What was it?")) == ["before", "after"]
    assert moments(asked("At once", 0.0), asked("Later", 7.0), video, asked("Then", 2.5)) == [0.0, 7.0, 2.5]
    assert moments(asked("What is it?"), image) == [0.0]
    assert moments(image, asked("And?"), image, image, asked("Well?"), asked("Early", 0.0)) == [0.0, 1.0, 0.0]


def test_images_are_frames_in_order(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief."},
            *user(image_part(10), asked("First?"), image_part(200), asked("Second?")),
        ],
        max_tokens=2,
        extra_body={"video": {"fps": 1, "spontaneous": False}},
    )
    segments = answer.choices[0].message.model_extra["segments"]
    assert [(segment["question"], segment["video_time"]) for segment in segments] == [("First?", 0.0), ("Second?", 1.0)]
    assert answer.usage.model_extra["frames"] == 2


def test_a_file_may_come_with_the_request(url: str, clip: bytes) -> None:
    request = {"model": MODEL, "messages": user({"type": "video"}, asked("What?")), "max_tokens": 2}
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        data={"request": json.dumps(request)},
        files={"video": ("clip.mp4", clip)},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["frames"] == 10


def test_an_allowed_url_is_read_and_others_are_not(tiny: dict[str, object], redis_url: str, clip: bytes) -> None:
    server = Server()
    server.content("/clip.mp4", clip)
    server.redirect("/away", "http://127.0.0.1:1/secret")
    try:
        allowed = {"hosts": [f"localhost:{server.port}"], "schemes": ["http"], "networks": ["127.0.0.0/8", "::1/128"]}
        with application(tiny, redis_url, **allowed) as url:
            base = f"http://localhost:{server.port}"
            answers = {
                path: post(url, messages=user({"type": "video_url", "video_url": {"url": path}}), max_tokens=1)
                for path in (f"{base}/clip.mp4", f"{base}/away", "http://127.0.0.1:6379/", "file:///etc/passwd")
            }
    finally:
        server.close()
    statuses = [answer.status_code for answer in answers.values()]
    assert statuses == [200, 422, 422, 422]
    assert {answer.json()["error"]["code"] for answer in list(answers.values())[1:]} == {"url_refused"}


def test_urls_are_not_read_unless_the_settings_say_so(url: str) -> None:
    for part in (
        {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}},
    ):
        error = post(url, messages=user(part)).json()["error"]
        assert error["code"] == "url_refused"
        assert "sources.hosts" in error["message"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "gpt-4o"}, "model_not_found", "model"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"wings": 2}, "unsupported_parameter", "wings"),
        ({"temperature": 3}, "bad_value", "temperature"),
        ({"max_tokens": 0}, "bad_value", "max_tokens"),
        ({"video": {"fps": 0}}, "bad_value", "video.fps"),
        ({"video": {"speed": 2}}, "unknown_field", "video.speed"),
        ({"messages": []}, "bad_value", "messages"),
        ({"messages": [WORDS]}, "bad_value", "messages"),
        ({"messages": [{"role": "assistant", "content": "I saw it."}]}, "bad_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": " "}]}, "bad_value", "messages"),
        ({"messages": user(shown(b"just words"))}, "bad_video", "video"),
        ({"messages": user(shown(b""))}, "bad_video", "video"),
        ({"messages": user(image_part(data=b"just words"))}, "bad_image", "image_url"),
        ({"messages": user(image_part(), shown(b"x"))}, "bad_value", "messages.0.content.1"),
        ({"messages": user({"type": "video"})}, "bad_value", "video"),
        ({"messages": user({"type": "image_url", "image_url": {"url": "data:text/html,x"}})}, "bad_url", "image_url"),
        ({"messages": user(*[image_part()] * 65)}, "bad_value", "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(url: str, change: dict[str, object], code: str, param: str) -> None:
    answer = post(url, **{"messages": user(image_part()), **change})
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert answer.status_code in (404, 422)
    assert error["type"] == "invalid_request_error"


def test_parameters_that_ask_for_nothing_are_let_through(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user(image_part()), n=1, presence_penalty=0, user="somebody", max_completion_tokens=1
    )
    assert answer.usage.model_extra["frames"] == 1


def test_a_wrong_key_is_the_clients_authentication_error(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, api_key="secret") as url:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            wrong.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as right:
            assert next(iter(right.models.list())).id == MODEL


def test_a_full_server_says_when_to_try_again(tiny: dict[str, object], redis_url: str) -> None:
    with application(tiny, redis_url, recordings=1, workers=False, admission_timeout_s=30) as url:
        body = {"model": MODEL, "messages": user(image_part()), "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as first:
            lines = first.iter_lines()  # kept: a dropped iterator closes the stream
            next(lines)
            second = post(url, messages=user(image_part()))
    assert second.status_code == 429, second.text
    assert second.headers["retry-after"] == "5"
    assert second.json()["error"]["code"] == "too_many_recordings"
    assert second.json()["error"]["type"] == "rate_limit_error"


def test_nobody_there_is_an_error_in_the_stream_too(tiny: dict[str, object], redis_url: str) -> None:
    with (
        application(tiny, redis_url, workers=False, admission_timeout_s=0.2) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="no model replica"):
            client.chat.completions.create(model=MODEL, messages=user(image_part()))
        with pytest.raises(openai.APIError, match="no model replica"):
            list(client.chat.completions.create(model=MODEL, messages=user(image_part()), stream=True))
