"""Where Redis is: the forms of an address, and as much of it as may be shown.

    redis://user:password@host:6379/0                    one server; rediss:// for TLS
    unix:///path/of/socket?db=0                          one server on this machine
    redis+sentinel://user:password@host:26379,host:26379/master/0
    redis+cluster://user:password@host:6379,host:6379    some of a cluster's nodes; they name the others

`rediss+sentinel` and `rediss+cluster` speak TLS to every node. docs/clusters.md has the options behind `?`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

REDIS_PORT = 6379
SENTINEL_PORT = 26379
FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
SWITCHES = ("ssl_check_hostname",)
CERT_REQS = ("required", "none")
SENTINEL_USERS = ("sentinel_user", "sentinel_password")

Kind = Literal["single", "sentinel", "cluster"]


class AddressError(ValueError):
    """The address cannot be used; the text holds no password."""


@dataclass(frozen=True)
class TLS:
    """How the servers' certificates are checked, and which one of our own they are shown; files are paths."""

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    check_hostname: bool = True
    verify: bool = True


@dataclass(frozen=True)
class RedisAddress:
    """An address taken apart. `shown` is what messages may print of it."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    socket: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    master: str = ""
    sentinel_user: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: TLS | None = None

    @property
    def shown(self) -> str:
        hosts = self.socket or ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        return f"master {self.master!r} of Sentinel {hosts}" if self.kind == "sentinel" else hosts


def parse(url: str) -> RedisAddress:
    """The parts of an address. Raises AddressError."""
    try:
        netloc, parts = _split(url)
        kind, tls = _scheme(parts.scheme)
        if parts.fragment:
            raise ValueError("fragment")
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        userinfo, _, hosts = netloc.rpartition("@")
        user, _, password = userinfo.partition(":")
        login = unquote(user) or None, unquote(password) or None
        database = int(options.pop("db", "0"))
        if parts.scheme == "unix":
            if not parts.path:
                raise ValueError("no path")
            address = RedisAddress("single", (), unquote(parts.path), *login, database)
        else:
            master, database = _path(kind, parts.path.strip("/"), database)
            port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
            address = RedisAddress(
                kind,
                tuple(_host(host, port) for host in hosts.split(",")),
                None,
                *login,
                database,
                master=master,
                sentinel_user=options.pop("sentinel_user", None) if kind == "sentinel" else None,
                sentinel_password=options.pop("sentinel_password", None) if kind == "sentinel" else None,
                tls=_tls(options) if tls else None,
            )
            if kind == "single" and len(address.hosts) > 1:
                raise ValueError("several hosts")
    except AddressError:
        raise
    except ValueError:
        raise AddressError(
            "the Redis address is not of the form redis[s]://[user:password@]host:port[/db], "
            "redis[s]+sentinel://[user:password@]host:port,host:port/master[/db] or "
            "redis[s]+cluster://[user:password@]host:port,host:port "
            "(special characters of a password are written as %XX)"
        ) from None
    _refuse_rest(options, tls)
    return address


def _split(url: str) -> tuple[str, SplitResult]:
    """Login and hosts, and the rest of the address: urlsplit takes one host, and some versions refuse `h,[::1]:2`."""
    scheme, colon, rest = url.partition("://")
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    return rest[:end], urlsplit(f"{scheme}{colon}{rest[end:]}")


def _scheme(scheme: str) -> tuple[Kind, bool]:
    transport, plus, kind = scheme.partition("+")
    if scheme == "unix":
        return "single", False
    if transport not in ("redis", "rediss") or (plus and kind not in ("sentinel", "cluster")):
        raise ValueError(scheme)
    chosen: Kind = "sentinel" if kind == "sentinel" else "cluster" if kind == "cluster" else "single"
    return chosen, transport == "rediss"


def _path(kind: Kind, path: str, database: int) -> tuple[str, int]:
    """Name of the Sentinel's master and number of the database."""
    if kind == "sentinel":
        master, _, number = path.partition("/")
        if not master:
            raise AddressError(
                "a Sentinel address ends in the name of the master it watches: redis+sentinel://host:26379/mymaster"
            )
        return unquote(master), int(number or database)
    number_in_path = int(path or database)
    if kind == "cluster" and number_in_path:
        raise AddressError(f"a Redis Cluster has database 0 only, the address asks for {number_in_path}: leave it out")
    return "", number_in_path


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    port = parts.port
    if not text or parts.path:
        raise ValueError(text)
    return parts.hostname or "localhost", default_port if port is None else port


def _tls(options: dict[str, str]) -> TLS:
    """Takes what concerns TLS out of `options`."""
    files = {name: options.pop(name, None) for name in FILES}
    for name, path in files.items():
        if path is not None and not Path(path).is_file():
            raise AddressError(f"{name} of the Redis address is {path}: no such file on this machine")
    required = options.pop("ssl_cert_reqs", "required")
    if required not in CERT_REQS:
        raise AddressError(f"ssl_cert_reqs of the Redis address is {required}, expected one of {', '.join(CERT_REQS)}")
    check = options.pop("ssl_check_hostname", "true").lower()
    if check not in ("true", "false"):
        raise AddressError(f"ssl_check_hostname of the Redis address is {check}, expected true or false")
    return TLS(
        files["ssl_ca_certs"],
        files["ssl_certfile"],
        files["ssl_keyfile"],
        check_hostname=check == "true",
        verify=required == "required",
    )


def _refuse_rest(options: dict[str, str], tls: bool) -> None:
    if not options:
        return
    names = ", ".join(sorted(options))
    if not tls and any(name.startswith("ssl_") for name in options):
        raise AddressError(f"{names} in a Redis address without TLS: begin it with rediss")
    known = ", ".join((*FILES, *SWITCHES, "ssl_cert_reqs", *SENTINEL_USERS, "db"))
    raise AddressError(f"the Redis address has options that are not known here: {names}; known are {known}")
