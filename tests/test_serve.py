"""The real application, started as a user starts it: Ray Serve, Redis, encoder and LLM in processes of their own.

One instance with the tiny model serves all tests of this module.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from live_client import LiveClient, live, post_video
from processes import Marked
from redis.asyncio import Redis
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from actors.bus import Bus, BusConfig
from actors.calibration import Calibration, write_calibration
from actors.checkpoint import read_settings
from actors.config import ModelConfig
from actors.messages import FrameTokens, encode
from serve.server_events import (
    ErrorEvent,
    FrameDecided,
    GoingAway,
    ItemAdded,
    SessionCreated,
    SessionEnded,
    TextDone,
    VideoStatus,
    parse_event,
)

pytestmark = pytest.mark.alone

START_S = 150
RESUME_S = 10.0
CALIBRATION = Calibration(
    fingerprint="",
    threshold=0.7,
    metric="temporal F1",
    value=0.5,
    before_s=1,
    after_s=3,
    data="validation.jsonl",
    data_digest="0123",
    num_dialogues=1,
    fps=2,
)


@dataclass(frozen=True)
class Server:
    """The running application: its address, its cluster's, and how to reach its Redis."""

    url: str
    cluster: str
    redis_url: str
    bus: BusConfig
    marked: Marked


def start(config: Path, **environment: str) -> tuple[subprocess.Popen[str], str, str]:
    """`python -m serve.app`, its address once it is up, and that of its cluster."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.app", str(config), "serve.port=0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready: "):
            [cluster] = [found for line in lines for found in re.findall(r"RAY_ADDRESS=(\S+)", line)]
            return process, line.split()[1], cluster
    raise AssertionError(f"the application ended with {process.wait()} and said {''.join(lines)}")


def settings_file(folder: Path, model: dict[str, object], **sections: dict[str, object]) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"model": model, **sections}))
    return path


@pytest.fixture(scope="module")
def server(
    tiny_configs: dict[str, ModelConfig],
    tiny_checkpoint: Path,
    redis_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    calibrated = shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    write_calibration(calibrated, CALIBRATION.model_copy(update={"fingerprint": read_settings(calibrated).fingerprint}))
    model = {**tiny_configs["live1plus"].model_dump(mode="json"), "checkpoint": str(calibrated)}
    prefix = f"serve-{secrets.token_hex(4)}:"
    bus = {"prefix": prefix, "resume_s": RESUME_S}
    path = settings_file(folder, model, bus=bus, serve={"gateways": 2}, limits={"headers_s": 5})
    marked = Marked()
    process, url, cluster = start(path, REDIS_URL=redis_url, **marked.environment)
    try:
        yield Server(url, cluster, redis_url, BusConfig(prefix=prefix), marked)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def play(client: LiveClient, frames: int) -> SessionEnded:
    client.configure(video={"drop_policy": "block"})
    for index in range(frames):
        client.frame(index / 2)
    return client.end()


def test_every_admitted_frame_is_decided_once_and_in_order(server: Server) -> None:
    with live(server.url) as client:
        client.configure(video={"drop_policy": "block"})
        client.ask("Please narrate the video in real time.", video_time=0.0)
        for index in range(60):
            client.frame(index / 2)
        ended = client.end()
    assert client.decided() == [(index, index / 2) for index in range(60)]
    assert (ended.frames.admitted, ended.frames.decided, ended.frames.dropped) == (60, 60, 0)
    assert [item.item.content[0].text for item in client.all(ItemAdded)] == ["Please narrate the video in real time."]
    assert client.all(TextDone)[0].video_time == 0.0


def test_sessions_start_at_the_checkpoints_threshold(server: Server) -> None:
    with live(server.url) as client:
        client.end()
    assert client.all(SessionCreated)[0].session.video.threshold == CALIBRATION.threshold


def test_two_sessions_run_at_once_and_do_not_mix(server: Server) -> None:
    with live(server.url) as one, live(server.url) as two:
        for client, step in ((one, 1.0), (two, 0.25)):
            client.configure(video={"drop_policy": "block"})
            for index in range(20):
                client.frame(index * step)
        for client, step in ((one, 1.0), (two, 0.25)):
            client.end()
            assert client.decided() == [(index, index * step) for index in range(20)]


def test_one_clients_bad_input_is_nothing_to_another(server: Server) -> None:
    with live(server.url) as good, live(server.url) as bad:
        good.configure(video={"drop_policy": "block"})
        bad.configure(video={"drop_policy": "block"})
        good.frame(0)
        bad.frame(0, b"this is no picture")
        for message in ("{", '{"type": "what"}', b"\x01short"):
            bad.socket.send(message)
        bad.frame(float("nan"))
        good.frame(1)
        bad.frame(1)
        bad.end()
        good.end()
    assert sorted(event.error.code for event in bad.all(ErrorEvent)) == [
        "bad_frame", "bad_frame", "bad_json", "bad_time", "unknown_type"
    ]  # fmt: skip
    assert bad.decided() == [(0, 1.0)]
    assert good.decided() == [(0, 0.0), (1, 1.0)]
    assert not good.all(ErrorEvent)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.zeros(3, 48, dtype=torch.float16), "shape"),
        (torch.zeros(10, 7, dtype=torch.bfloat16), "shape"),
        (torch.full((10, 48), float("nan"), dtype=torch.float16), "not finite"),
    ],
    ids=["another number of tokens", "another width", "not finite"],
)
def test_frame_tokens_that_the_model_cannot_take_are_skipped(server: Server, tokens: torch.Tensor, says: str) -> None:
    with live(server.url) as other, live(server.url) as client:
        session_id = client.until(SessionCreated).session.id
        other.configure(video={"drop_policy": "block"})
        client.configure(video={"drop_policy": "block"})
        asyncio.run(put_input(server, session_id, b"no message at all"))
        asyncio.run(put_input(server, session_id, encode(FrameTokens.from_tensor(0, 0.0, tokens))))
        client.frame(0)
        client.frame(1)
        client.end()
        assert play(other, 3).frames.decided == 3
    (error,) = client.all(ErrorEvent)
    assert error.error.code == "frame_skipped"
    assert says in error.error.message
    assert client.decided() == [(1, 1.0)]


async def put_input(server: Server, session_id: str, message: bytes) -> None:
    """Put bytes into a session's input, past every check, once the session is there."""
    bus = await Bus.connect(server.bus, server.redis_url)
    redis = Redis.from_url(server.redis_url)
    try:
        async with asyncio.timeout(30):
            while await bus.session_meta(session_id) is None:
                await asyncio.sleep(0.01)
        await redis.xadd(bus.keys.input(bus.partition(session_id), session_id), {"m": message})
    finally:
        await redis.aclose()
        await bus.close()


def test_a_posted_video_is_watched_and_told_as_it_goes(server: Server, sample_video: Path) -> None:
    events = post_video(
        server.url,
        sample_video.read_bytes(),
        question="Please narrate the video in real time.",
        question_time="0",
        max_output_tokens="3",
        include="frame_decided",
    )
    decided = [(event.seq, event.video_time) for event in events if isinstance(event, FrameDecided)]
    assert decided == [(index, index / 2) for index in range(len(decided))]
    ended = events[-1]
    assert isinstance(ended, SessionEnded)
    assert ended.frames.decided == ended.frames.received == len(decided) > 100
    assert any(isinstance(event, TextDone) for event in events)


def test_a_posted_text_is_no_video(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/videos", files={"video": ("notes.mp4", b"just words")})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "bad_video"


def test_encoder_llm_and_gateway_are_processes_of_their_own(server: Server) -> None:
    stats = httpx.get(f"{server.url}/v1/stats", timeout=30).json()
    assert len({replica["pid"] for part in ("gateways", "encoders", "llms") for replica in stats[part]}) == 4
    assert stats["encoders"][0]["encoded"] > 0
    assert stats["llms"][0]["frames_decided"] > 0


def test_only_this_machine_can_reach_any_port(server: Server) -> None:
    listening = server.marked.listening()
    assert len(listening) > 5
    assert [address for address, loopback in listening.items() if not loopback] == []


def test_a_client_that_goes_away_leaves_nothing_running(server: Server) -> None:
    with live(server.url) as client:
        client.configure(max_output_tokens=4096)
        client.ask("Tell me everything.", video_time=0.0)
        client.frame(0)
        session_id = client.until(SessionCreated).session.id
        client.until(FrameDecided)
    assert asyncio.run(state_when_over(server, session_id)) == "ended"


def test_who_hangs_up_on_a_posted_video_ends_its_session(server: Server, sample_video: Path) -> None:
    with httpx.stream(
        "POST", f"{server.url}/v1/videos", files={"video": sample_video.read_bytes()}, timeout=60
    ) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        created = parse_event(next(lines).removeprefix("data: "))
        assert isinstance(created, SessionCreated)
        next(lines)
    assert asyncio.run(state_when_over(server, created.session.id)) == "ended"


async def stay_known(server: Server, session_id: str, process: subprocess.Popen[bytes]) -> None:
    """Say that the client is there until a process has ended."""
    bus = await Bus.connect(server.bus, server.redis_url)
    try:
        async with asyncio.timeout(120):
            while process.poll() is None:
                await bus.touch(session_id)
                await asyncio.sleep(0.2)
    finally:
        await bus.close()


async def state_when_over(server: Server, session_id: str) -> str:
    """The state of a session once it is no longer open. Fails after a minute."""
    bus = await Bus.connect(server.bus, server.redis_url)
    try:
        async with asyncio.timeout(60):
            while (meta := await bus.session_meta(session_id)) and meta.state != "ended":
                await asyncio.sleep(0.05)
        return meta.state if meta else "gone"
    finally:
        await bus.close()


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["encoder", "llm"])
def test_a_killed_replica_is_replaced_and_its_sessions_go_on(server: Server, worker: str) -> None:
    """The client notices nothing but a pause: every frame is decided once, in order."""
    with live(server.url) as client:
        client.configure(video={"drop_policy": "block"})
        for index in range(10):
            client.frame(index / 2)
        while len(client.decided()) < 10:
            client.until(FrameDecided)
        pid = httpx.get(f"{server.url}/v1/stats", timeout=30).json()[f"{worker}s"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        for index in range(10, 20):
            client.frame(index / 2)
        client.end()
    assert client.decided() == [(index, index / 2) for index in range(20)]
    assert not client.all(ErrorEvent)


@pytest.mark.slow
def test_a_killed_gateway_costs_its_client_a_new_connection_and_nothing_else(server: Server) -> None:
    """No event is missing, none comes twice, and no frame that was acknowledged is lost."""
    with live(server.url) as first:
        session_id = first.until(SessionCreated).session.id
        first.configure(video={"drop_policy": "block"})
        first.ask("What happens?", video_time=2.0)
        for index in range(10):
            first.frame(index / 2)
        acknowledged = first.until(VideoStatus).frames
        while len(first.decided()) < 5:
            first.until(FrameDecided)
        for gateway in gateways_with_clients(server):
            os.kill(gateway, signal.SIGKILL)
        killed = time.monotonic()
        assert first.closed()[0] == 1006
    last = first.logged[-1].position
    assert last is not None
    with resumed(server.url, session_id, last - 1) as second:  # not all events of the last entry may have come
        print(f"resumed {time.monotonic() - killed:.2f} s after the gateway was killed")
        frames = second.until(VideoStatus).frames
        assert frames.received >= acknowledged.received
        for index in range(frames.received, 30):
            second.frame(index / 2)
        second.end()
    told = {event.event_id: event for event in [*first.logged, *second.logged]}
    again = len(first.logged) + len(second.logged) - len(told)
    assert again == sum(event.position == last for event in first.logged)
    decided = [event for event in told.values() if isinstance(event, FrameDecided)]
    assert [(event.seq, event.video_time) for event in decided] == [(index, index / 2) for index in range(30)]
    with resumed(server.url, session_id, -1) as whole:
        whole.until(SessionEnded)
    assert [event.event_id for event in whole.logged] == list(told)


def gateways_with_clients(server: Server) -> list[int]:
    """Processes of the gateways that show a session, once one says so."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        gateways = httpx.get(f"{server.url}/v1/stats", timeout=30).json()["gateways"]
        if found := [gateway["pid"] for gateway in gateways if gateway["sessions"]]:
            return found
    raise AssertionError("no gateway reports a session")


@contextmanager
def resumed(url: str, session_id: str, after: int | None) -> Iterator[LiveClient]:
    """The session at whichever gateway answers; the proxy may still offer the dead one for a moment."""
    deadline = time.monotonic() + 60
    with ExitStack() as stack:
        while True:
            try:
                client = stack.enter_context(live(url, session_id, after))
                client.until(SessionCreated)
                break
            except (ConnectionClosed, InvalidHandshake, InvalidStatus, OSError):
                if time.monotonic() > deadline:
                    raise
        yield client


@pytest.mark.slow
def test_the_drain_command_sends_clients_away_and_they_go_on_when_it_is_called_off(server: Server) -> None:
    command = [sys.executable, "-m", "serve.drain"]
    environment = {**os.environ, "RAY_ADDRESS": server.cluster}
    with live(server.url) as client:
        session_id = client.until(SessionCreated).session.id
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        draining = subprocess.Popen([*command, "--notice", "10"], env=environment, stdout=subprocess.DEVNULL)
        assert client.until(GoingAway).seconds > 5
        client.frame(1)
        client.until(FrameDecided)
        assert client.closed() == (1012, "going_away")
    assert draining.wait(timeout=120) == 0
    cancelling = subprocess.Popen([*command, "--cancel"], env=environment)
    asyncio.run(stay_known(server, session_id, cancelling))  # on a busy machine it takes longer than RESUME_S
    assert cancelling.returncode == 0
    with resumed(server.url, session_id, client.logged[-1].position) as again:
        again.frame(2)
        again.end()
    assert [*client.decided(), *again.decided()] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_refused_handshake_says_why_through_serves_proxy(server: Server) -> None:
    with pytest.raises(InvalidStatus) as refused, live(server.url, Origin="https://evil.example"):
        pass
    answer = refused.value.response
    assert answer.status_code == 401
    error = json.loads(answer.body or b"")["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "unauthorized", None)
    assert "evil.example" in error["message"]


def test_headers_that_drip_are_given_up_by_serves_proxy(server: Server) -> None:
    address = httpx.URL(server.url)
    with live(server.url) as other, socket.create_connection((address.host, address.port or 80), timeout=60) as slow:
        other.until(SessionCreated)
        slow.sendall(b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        answer = b"".join(iter(lambda: slow.recv(4096), b""))
        assert play(other, 3).frames.decided == 3
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"
