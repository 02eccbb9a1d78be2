"""Who is served: by key, or from this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.requests import HTTPConnection

from serve.keys import LOCAL, ApiKeys, KeysError, Refused, subprotocol

KEYS = ApiKeys(["first", "sécond"])


def connection(
    kind: str = "http", client: str = "192.0.2.1", host: str = "127.0.0.1", **headers: str
) -> HTTPConnection:
    fields = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return HTTPConnection(
        {
            "type": kind,
            "client": (client, 1),
            "headers": [(b"host", host.encode()), *fields],
            "path": "/",
            "scheme": "http",
            "server": ("127.0.0.1", 80),
        }
    )


def test_a_client_is_known_by_its_key_and_the_key_is_not_told() -> None:
    name = KEYS.client(connection(authorization="Bearer first"))
    assert name == KEYS.client(connection("websocket", authorization="bearer first"))
    assert "first" not in name
    assert name != LOCAL


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic first", "first", "Bearer first x", "Bearer \xff"]
)
def test_a_wrong_key_is_refused_even_from_this_machine(header: str) -> None:
    with pytest.raises(Refused, match="Bearer"):
        KEYS.client(connection(client="127.0.0.1", authorization=header))


def test_a_browser_gives_its_key_as_a_protocol_of_the_websocket() -> None:
    offered = connection("websocket", sec_websocket_protocol="realtime, openai-insecure-api-key.first")
    assert KEYS.client(offered) == KEYS.client(connection(authorization="Bearer first"))
    assert subprotocol(offered) == "realtime"
    assert subprotocol(connection("websocket")) is None
    with pytest.raises(Refused):
        KEYS.client(connection("http", sec_websocket_protocol="openai-insecure-api-key.first"))


def test_without_keys_only_this_machine_is_served() -> None:
    nobody = ApiKeys()
    assert nobody.client(connection(client="127.0.0.1")) == LOCAL
    assert nobody.client(connection(client="::1", host="localhost:8000", origin="http://localhost:8000")) == LOCAL
    for foreign in (
        connection(),
        connection(client="127.0.0.1", host="evil.example"),
        connection(client="127.0.0.1", origin="https://evil.example"),
        connection(client="127.0.0.1", origin="null"),
        connection(client="127.0.0.1", origin="http://["),
        connection(client="127.0.0.1", origin=""),
    ):
        with pytest.raises(Refused):
            nobody.client(foreign)


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\n  one \ntwo\n")
    keys = ApiKeys.from_environment({"VIDEOLLM_API_KEY": "three", "VIDEOLLM_API_KEYS_FILE": str(path)})
    assert len({keys.client(connection(authorization=f"Bearer {key}")) for key in ("one", "two", "three")}) == 3
    assert not ApiKeys.from_environment({"VIDEOLLM_API_KEY": " "})


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    for name in ("empty", "missing"):
        with pytest.raises(KeysError, match=name):
            ApiKeys.from_environment({"VIDEOLLM_API_KEYS_FILE": str(tmp_path / name)})
