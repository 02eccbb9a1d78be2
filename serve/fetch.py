"""Reading what a URL names: data URLs, and HTTP by connections that go to judged addresses only (url_guard.py).

Everything here blocks and is called from threads. Sizes and times are bounded; a redirect is judged anew.
"""

from __future__ import annotations

import base64
import binascii
import io
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes, urljoin

import httpcore

from serve.client_events import ClientError
from serve.url_guard import SHOWN, Target, UrlGuard

USER_AGENT = "videollm-online"
REDIRECTS = (301, 302, 303, 307, 308)
HTTP = ("https", "http")


class TimedStream(httpcore.NetworkStream):
    """A connection on which nothing is waited for beyond `deadline`, however little comes at a time."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the time for this URL is over")
        return self._stream.read(max_bytes, left if timeout is None else min(timeout, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return TimedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


class GuardedBackend(httpcore.NetworkBackend):
    """Connects to the addresses that were judged, never to a name."""

    def __init__(self, addresses: list[str], deadline: float) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        problem: Exception | None = None
        for address in self._addresses:
            try:
                stream = self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
                return TimedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        raise problem or httpcore.ConnectError(f"{host} has no address")


@contextmanager
def opened(guard: UrlGuard, url: str, param: str, seconds: float, start: int = 0) -> Iterator[httpcore.Response]:
    """The answer to a GET, redirects followed, from byte `start` on, within `seconds`. Raises ClientError."""
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        for _ in range(guard.config.redirects + 1):
            target = guard.check(url, param, HTTP)
            response = stack.enter_context(_get(guard, target, param, start, deadline))
            if response.status not in REDIRECTS:
                if response.status not in (200, 206):
                    raise unreachable(f"{target.shown} answered with status {response.status}", param)
                yield response
                return
            location = _header(response, b"location").decode("latin-1")
            try:
                url = urljoin(url, location)
            except ValueError:
                raise unreachable(f"{target.shown} redirects to {location[:SHOWN]!r}, which is no URL", param) from None
        raise unreachable(f"{target.shown} redirects more than {guard.config.redirects} times", param)


@contextmanager
def _get(guard: UrlGuard, target: Target, param: str, start: int, deadline: float) -> Iterator[httpcore.Response]:
    limit = guard.config.connect_s
    timeouts = {"connect": limit, "read": limit, "write": limit, "pool": limit}
    host = f"[{target.host}]" if ":" in target.host else target.host
    headers = [("Host", f"{host}:{target.port}"), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity")]
    if start:
        headers.append(("Range", f"bytes={start}-"))
    scheme, host_bytes = target.url.scheme.encode(), target.host.encode()
    url = httpcore.URL(scheme=scheme, host=host_bytes, port=target.port, target=target.path.encode())
    backend = GuardedBackend(guard.addresses(target, param), deadline)
    try:
        with (
            httpcore.ConnectionPool(network_backend=backend, http2=False) as pool,
            pool.stream("GET", url, headers=headers, extensions={"timeout": timeouts}) as response,
        ):
            yield response
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
        raise unreachable(f"{target.shown} cannot be read: {type(error).__name__} {error}".strip(), param) from None


def download(guard: UrlGuard, url: str, path: Path, param: str) -> None:
    """The content of a URL into a file. Raises ClientError when it is refused, too large, or takes too long."""
    size = 0
    with opened(guard, url, param, guard.config.fetch_s) as response, path.open("wb") as file:
        announced = _header(response, b"content-length")
        if announced.isdigit() and int(announced) > guard.config.fetch_bytes:
            raise _too_big(int(announced), guard, param)
        for chunk in response.iter_stream():
            size += len(chunk)
            if size > guard.config.fetch_bytes:
                raise _too_big(size, guard, param)
            file.write(chunk)


class HttpFile(io.RawIOBase):
    """An HTTP resource as a file for PyAV; seeks where the server serves ranges. Raises as `opened` does.

    PyAV may take an error for the end of the file: `broken` says that there was one.
    """

    def __init__(self, guard: UrlGuard, url: str, param: str) -> None:
        self._guard, self._url, self._param = guard, url, param
        self._stack = ExitStack()
        self._position = 0
        self._rest = b""
        self.broken: str | None = None
        self.size: int | None = None  # where the server serves ranges
        self.length: int | None = None  # where it says it
        self._open(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            try:
                self._rest = next(self._chunks, b"")
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
                self.broken = f"{type(error).__name__} {error}".strip()
                raise OSError(self.broken) from None
            if not self._rest and self.length is not None and self._position < self.length:
                self.broken = f"it ended after {self._position} of {self.length} bytes"
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self.size is None:
            raise io.UnsupportedOperation("the server serves no ranges")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset != self._position:
            self._stack.close()
            try:
                self._open(base + offset)
            except ClientError as error:
                self.broken = str(error)
                raise OSError(self.broken) from None
        return self._position

    def close(self) -> None:
        self._stack.close()
        super().close()

    def _open(self, start: int) -> None:
        self._rest, self._position = b"", start
        if self.size is not None and start >= self.size:  # servers answer 416 there
            self._chunks = iter([b""])
            return
        seconds = self._guard.config.stream_s
        response = self._stack.enter_context(opened(self._guard, self._url, self._param, seconds, start))
        if start and response.status != 206:
            raise unreachable("the server ignores the range that was asked for", self._param)
        length, ranges = _header(response, b"content-length"), _header(response, b"accept-ranges")
        self.length = start + int(length) if length.isdigit() else None
        self.size = self.length if ranges == b"bytes" or response.status == 206 else None
        self._chunks = response.iter_stream()


def data_url(url: str, param: str, kinds: tuple[str, ...], most: int) -> bytes:
    """The bytes of a data: URL whose media type begins with one of `kinds`. Raises ClientError."""
    header, comma, body = url.partition(",")
    media = header.removeprefix("data:").removesuffix(";base64")
    if not comma or not media.startswith(kinds):
        expected = " or ".join(f"data:{kind}...;base64,..." for kind in kinds)
        raise ClientError("bad_url", f"{param} is {header[:60]!r}, expected {expected}", param)
    if len(body) > most * 4 // 3 + 4:
        raise ClientError("too_big", f"{param} holds {len(body)} characters, at most {most} bytes are taken", param)
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ClientError("bad_url", f"{param} is not base64: {error}", param) from None


def unreachable(message: str, param: str) -> ClientError:
    return ClientError("url_unreachable", message, param)


def _too_big(size: int, guard: UrlGuard, param: str) -> ClientError:
    most = guard.config.fetch_bytes
    return ClientError("too_big", f"the URL holds {size} bytes or more, at most {most} are read", param)


def _header(response: httpcore.Response, name: bytes) -> bytes:
    return next((value for key, value in response.headers if key.lower() == name), b"")
