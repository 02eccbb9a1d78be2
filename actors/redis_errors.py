"""What Redis or the way to it has against a call: whether to try again, and words for people."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from redis import exceptions
from redis.asyncio.sentinel import MasterNotFoundError

from actors.redis_address import RedisAddress
from actors.session_log import BusError

# redis-py's own exceptions of a cluster stand outside RedisError.
FAILURES = (exceptions.RedisError, exceptions.RedisClusterException)

CLUSTER_CHANGES = (
    exceptions.ClusterError,
    exceptions.RedisClusterException,
    exceptions.TryAgainError,
    exceptions.AskError,
)
AWAY = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, *CLUSTER_CHANGES)


@dataclass(frozen=True)
class Failure:
    """Why a call failed. `passing`: the same call may succeed later."""

    passing: bool
    code: str
    text: str

    def raised(self) -> BusError:
        return BusError(self.code, self.text)


def is_away(error: object) -> bool:
    """Whether the server that was asked is gone for now, rather than of another opinion."""
    return isinstance(error, AWAY) and not isinstance(error, exceptions.AuthenticationError)


def failure(error: Exception, address: RedisAddress) -> Failure:
    """`error` explained to someone who can change the address or the server."""
    where = f"Redis at {address.shown}"
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, exceptions.AuthenticationError | exceptions.AuthenticationWrongNumberOfArgsError):
            return Failure(False, "redis_auth", f"{where} refuses the user or password in its address ({cause})")
        if isinstance(cause, exceptions.NoPermissionError) or "ACL failure in script" in str(cause):
            text = f"{where} does not let the user in its address do this ({cause}): docs/clusters.md lists the rights"
            return Failure(False, "redis_auth", text)
    if isinstance(error, exceptions.MovedError) and address.kind == "single":
        text = f"{address.shown} is a node of a Redis Cluster: give its address as redis+cluster://host:port"
        return Failure(False, "redis_address", text)
    if address.kind == "cluster" and any("cluster support disabled" in str(cause) for cause in causes):
        text = f"{address.shown} is no node of a Redis Cluster: give its address as redis://host:port"
        return Failure(False, "redis_address", text)
    if any(isinstance(cause, exceptions.OutOfMemoryError) or "OOM command" in str(cause) for cause in causes):
        text = f"{where} is full (maxmemory): give it more memory or fewer sessions"
        return Failure(False, "redis_full", text)
    if isinstance(error, AWAY):
        return Failure(True, "redis_unreachable", _away(error, causes, address))
    return Failure(False, "redis_error", f"{where}: {error}")


def _away(error: Exception, causes: list[BaseException], address: RedisAddress) -> str:
    where = f"Redis at {address.shown}"
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {where} is not trusted ({cause.verify_message}): name the authority's file with "
                "?ssl_ca_certs=FILE, or the host as the certificate does"
            )
        if isinstance(cause, ssl.SSLError):
            return f"{where} and this program do not agree on TLS ({cause.reason}): rediss for a TLS port, else redis"
    if isinstance(error, exceptions.ReadOnlyError):
        return f"{where} is a replica that takes no writes: give the address of its master, or of its Sentinels"
    if isinstance(error, MasterNotFoundError):
        return f"no Sentinel knows a healthy master for {where}: is the name right, and do they run?"
    if isinstance(error, CLUSTER_CHANGES) and not any(isinstance(cause, OSError) for cause in causes):
        return (
            f"the Redis Cluster at {address.shown} cannot serve all keys ({type(error).__name__}): are its masters up?"
        )
    hint = ""
    if address.tls is not None:
        hint = " And does it speak TLS there? Else the address begins with redis."
    elif "closed by server" in str(error):
        hint = " And does it expect TLS? Then the address begins with rediss."
    return f"no answer from {where} ({type(error).__name__}): is it running?{hint}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what lies behind it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
