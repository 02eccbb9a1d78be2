"""Who a client is: by its API key, or by calling from this machine where no key is set.

Keys come from the environment or from a file, never from the settings. A client is known by a digest
of its key, which may be logged, counted and kept in Redis. Without keys only this machine is served.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

API_KEY_VARIABLE = "VIDEOLLM_API_KEY"
API_KEYS_FILE_VARIABLE = "VIDEOLLM_API_KEYS_FILE"
LOCAL = "local"
PROTOCOL = "realtime"  # of WebSockets whose client, as every browser, cannot send an Authorization header
KEY_PROTOCOL = "openai-insecure-api-key."


class Refused(Exception):
    """A client that may not use the server; the message says why."""


class KeysError(ValueError):
    """The keys cannot be read; says which and why."""


class ApiKeys:
    """The keys that are served; none means that only this machine is."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._names = {_digest(key): f"key_{_digest(key)[:16]}" for key in keys}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ApiKeys:
        """The key in VIDEOLLM_API_KEY and those in the file VIDEOLLM_API_KEYS_FILE names, one a line.

        Empty lines and those that begin with # are skipped. Raises KeysError for a file that is not
        there or holds no key: an empty list would mean that no key is needed.
        """
        given = os.environ if environment is None else environment
        keys = [given[API_KEY_VARIABLE].strip()] if given.get(API_KEY_VARIABLE, "").strip() else []
        if path := given.get(API_KEYS_FILE_VARIABLE):
            try:
                lines = [line.strip() for line in Path(path).read_text().splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise KeysError(f"{API_KEYS_FILE_VARIABLE} is {path}, which cannot be read: {error}") from None
            listed = [line for line in lines if line and not line.startswith("#")]
            if not listed:
                raise KeysError(f"{API_KEYS_FILE_VARIABLE} is {path}, which holds no key: write one a line")
            keys += listed
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._names)

    def client(self, connection: HTTPConnection) -> str:
        """The client's name. Raises Refused for a wrong key, and without keys for all but programs and pages of here.

        Every key is compared, each in constant time: how long it takes tells nothing about any.
        """
        if not self._names:
            _check_local(connection)
            return LOCAL
        given = _digest(_given_key(connection))
        found = [name for digest, name in self._names.items() if hmac.compare_digest(digest, given)]
        if not found:
            raise Refused("the request has no valid key, expected 'Authorization: Bearer <key>'")
        return found[0]


def subprotocol(connection: HTTPConnection) -> str | None:
    """What a WebSocket must be accepted with: a browser that offers protocols wants one of them."""
    return PROTOCOL if PROTOCOL in _protocols(connection) else None


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _given_key(connection: HTTPConnection) -> str:
    """The key of the Authorization header or of a WebSocket protocol, "" without."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    if connection.scope["type"] == "websocket":
        keys = [name.removeprefix(KEY_PROTOCOL) for name in _protocols(connection) if name.startswith(KEY_PROTOCOL)]
        return keys[0] if keys else ""
    return ""


def _protocols(connection: HTTPConnection) -> list[str]:
    return [name.strip() for name in connection.headers.get("sec-websocket-protocol", "").split(",")]


def _check_local(connection: HTTPConnection) -> None:
    how = f"set {API_KEY_VARIABLE} or {API_KEYS_FILE_VARIABLE}"
    client = connection.client.host if connection.client else ""
    if not is_loopback(client):
        raise Refused(f"requests from {client or 'unknown'} need an API key: the server's owner has to {how}")
    # A page of another site, or a foreign name that resolves to this machine, must not reach the server by the browser.
    # That of a page without an origin of its own, such as a sandboxed frame of any site, is "null".
    origin = connection.headers.get("origin")
    names = [connection.url.hostname] if connection.url.hostname else []
    for name in [*names, *([] if origin is None else [_host_of(origin)])]:
        if not is_loopback(name):
            shown = name or f"a page with the origin {origin!r:.60}"
            raise Refused(f"{shown} is not this machine: open the server by its loopback address, or {how}")


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
