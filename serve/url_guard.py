"""Which addresses clients may make the server read: nothing, until the section `sources` names hosts.

A URL is judged by its scheme, host and port, and by every address its name resolves to; what is then
connected to is the judged address itself, so that a name that changes in between gains nothing. Redirects
are judged like the first URL. Nothing of this is left to FFmpeg, which would follow a playlist anywhere.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator

from actors.config import Section
from serve.client_events import ClientError

PORTS = {"https": 443, "http": 80, "rtsp": 554, "rtsps": 322}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNSAFE = re.compile(r"[\x00-\x20\x7f\\]|[^\x00-\x7f]")
SHOWN = 120

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]


class SourcesConfig(Section):
    """What may be read on behalf of clients. Empty lists allow nothing.

    `hosts` are names with their default port, or with `:port` or `:*`; `*.example.org` covers all below
    it, `*` every name. Addresses that are not public are refused unless they lie in `networks`. `folders`
    hold files for server-side streams. A download has `fetch_bytes` and `fetch_s`, and `redirects` at most.
    """

    hosts: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("https",)
    networks: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    fetch_bytes: int = Field(default=256 << 20, ge=1)
    fetch_s: float = Field(default=120.0, gt=0)
    connect_s: float = Field(default=10.0, gt=0)
    redirects: int = Field(default=3, ge=0)
    streams: int = Field(default=8, ge=0)
    reconnects: int = Field(default=20, ge=0)
    stream_s: float = Field(default=24 * 3600.0, gt=0)

    @field_validator("schemes")
    @classmethod
    def _known(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(schemes) - set(PORTS):
            raise ValueError(f"{sorted(unknown)[0]!r} is none of {', '.join(PORTS)}")
        return schemes

    @field_validator("networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks


@dataclass(frozen=True)
class Target:
    """A URL that was judged by its text; `port` is never absent."""

    url: SplitResult
    host: str
    port: int

    @property
    def path(self) -> str:
        """Path and query as they are asked for."""
        return (self.url.path or "/") + (f"?{self.url.query}" if self.url.query else "")

    @property
    def shown(self) -> str:
        """For messages: without a password."""
        return f"{self.url.scheme}://{self.host}:{self.port}{self.url.path}"[:SHOWN]


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a name, each once, in the order in which the system gives them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class UrlGuard:
    """Judges URLs and files by the settings. What it refuses is a ClientError, `url_refused`."""

    def __init__(self, config: SourcesConfig, resolve: Resolve = resolved) -> None:
        self.config = config
        self._resolve = resolve
        self._networks = [ipaddress.ip_network(network) for network in config.networks]

    def check(self, url: str, param: str = "url", schemes: Sequence[str] | None = None) -> Target:
        """The URL in parts, if its scheme, host and port are allowed. Nothing is resolved."""
        allowed = [scheme for scheme in self.config.schemes if schemes is None or scheme in schemes]
        if not self.config.hosts or not allowed:
            raise refused("URLs are not read: the server's settings name no hosts (sources.hosts)", param)
        if UNSAFE.search(url) or len(url) > 4096:
            raise refused("the URL has spaces, backslashes, control or non-ASCII characters: encode them", param)
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise refused(f"{url[:SHOWN]!r} is no URL: {error}", param) from None
        if parts.scheme not in allowed:
            raise refused(f"scheme {parts.scheme[:20]!r} is not read, expected {' or '.join(allowed)}", param)
        if not host:
            raise refused(f"{url[:SHOWN]!r} names no host", param)
        if "@" in parts.netloc and not parts.scheme.startswith("rtsp"):
            raise refused("a user or password in the URL is not sent: leave it out", param)
        target = Target(parts, host, port or PORTS[parts.scheme])
        if not self._listed(target):
            raise refused(f"{host}:{target.port} is not among the hosts that are read (sources.hosts)", param)
        return target

    def addresses(self, target: Target, param: str = "url") -> list[str]:
        """The addresses of a target. One that may not be reached refuses them all."""
        try:
            found = self._resolve(target.host, target.port)
        except (OSError, UnicodeError) as error:  # the latter for what can be no name: an empty or too long part
            why = error.strerror if isinstance(error, OSError) else error
            raise ClientError("url_unreachable", f"{target.host} has no address: {why}", param) from None
        for text in found:
            if not self.reachable(ipaddress.ip_address(text.partition("%")[0])):
                raise refused(f"{target.host} has an address that is not public ({text})", param)
        return list(found)

    def reachable(self, address: Address) -> bool:
        """Whether an address is public or in a network of the settings; IPv4 inside IPv6 counts as what it is."""
        inner = _inner(address)
        if any(inner in network for network in self._networks if network.version == inner.version):
            return True
        return inner.is_global and not (inner.is_multicast or inner.is_reserved or inner.is_unspecified)

    def file(self, name: str, param: str = "source") -> Path:
        """A file within one of the folders of the settings, links followed."""
        if not self.config.folders:
            raise refused("files are not read: the server's settings name no folders (sources.folders)", param)
        try:
            path = Path(name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            path = None
        folders = [Path(folder).resolve() for folder in self.config.folders]
        if path is None or not path.is_file() or not any(path.is_relative_to(folder) for folder in folders):
            raise refused(f"{name[:SHOWN]!r} is no file in the folders that are read (sources.folders)", param)
        return path

    def _listed(self, target: Target) -> bool:
        for entry in self.config.hosts:
            name, colon, port = entry.lower().partition(":")
            if not (target.port == PORTS[target.url.scheme] if not colon else port in ("*", str(target.port))):
                continue
            if name in ("*", target.host) or (name.startswith("*.") and target.host.endswith(name[1:])):
                return True
        return False


def refused(message: str, param: str) -> ClientError:
    return ClientError("url_refused", message, param)


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None:
            return inner
        if int(address) < 1 << 32 and int(address) > 1:  # the old "IPv4-compatible" form
            return ipaddress.IPv4Address(int(address))
    return address
