"""Redis servers as a fleet has them, made of the packaged one: clusters, Sentinels, TLS in front of a server."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.backoff import NoBackoff
from redis.retry import Retry

from actors.redis_server import RedisServer, server_binary

PASSWORD = "p@ss/word:1"  # every character that an address must escape
ESCAPED = "p%40ss%2Fword%3A1"
DEADLINE_S = 30.0
NODE_TIMEOUT_MS = "1000"
DOWN_AFTER_MS = "500"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(fact: Callable[[], bool], what: str) -> None:
    """Return when `fact` holds; servers that are not there yet do not count as an answer."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            if fact():
                return
        except redis.RedisError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {DEADLINE_S} s")


def client(port: int, password: str | None = PASSWORD) -> redis.Redis:
    return redis.Redis(port=port, password=password, retry=Retry(NoBackoff(), 0))


class Cluster:
    """Masters, each with as many replicas as wanted, on loopback."""

    def __init__(self, stack: ExitStack, masters: int, replicas: int) -> None:
        self.servers = [cluster_node() for _ in range(masters * (1 + replicas))]
        for server in self.servers:
            server.start()
            stack.callback(server.stop)
        self.masters = self.servers[:masters]
        self.replicas = self.servers[masters:]
        slots = [16384 * number // masters for number in range(masters + 1)]
        first = self.masters[0]
        for number, server in enumerate(self.servers):
            with client(server.port) as node:
                node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                node.execute_command("CLUSTER MEET", "127.0.0.1", first.port, int(first.settings["cluster-port"]))
                if number < masters:
                    node.execute_command("CLUSTER ADDSLOTSRANGE", slots[number], slots[number + 1] - 1)
        wait_for(lambda: all(self._knows_all(server) for server in self.servers), "the cluster's nodes meet")
        for number, server in enumerate(self.replicas):
            with client(server.port) as node, client(self.masters[number % masters].port) as master:
                node.execute_command("CLUSTER REPLICATE", master.execute_command("CLUSTER MYID"))
        wait_for(lambda: all(self._is_ready(server) for server in self.servers), "the cluster is up")

    @property
    def url(self) -> str:
        return f"redis+cluster://:{ESCAPED}@127.0.0.1:{self.masters[0].port},127.0.0.1:{self.masters[1].port}"

    def _knows_all(self, server: RedisServer) -> bool:
        with client(server.port) as node:
            return node.execute_command("CLUSTER INFO")["cluster_known_nodes"] == str(len(self.servers))

    def _is_ready(self, server: RedisServer) -> bool:
        with client(server.port) as node:
            linked = server in self.masters or node.info("replication").get("master_link_status") == "up"
            return node.execute_command("CLUSTER INFO")["cluster_state"] == "ok" and linked


@contextmanager
def redis_cluster(masters: int = 3, replicas: int = 0) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack, masters, replicas)


def cluster_node() -> RedisServer:
    settings = {
        "cluster-enabled": "yes",
        "cluster-config-file": "nodes.conf",
        "cluster-node-timeout": NODE_TIMEOUT_MS,
        "cluster-port": str(free_port()),
        "masterauth": PASSWORD,
        "maxmemory": "200mb",
        "repl-diskless-sync-delay": "0",
    }
    return RedisServer(settings, password=PASSWORD)


@contextmanager
def sentinel(folder: Path, master: RedisServer, name: str, password: str) -> Iterator[int]:
    """One Sentinel that watches `master`; its port."""
    port = free_port()
    lines = [
        f"port {port}",
        "bind 127.0.0.1",
        f"dir {folder}",
        f"requirepass {password}",
        f"sentinel monitor {name} 127.0.0.1 {master.port} 1",
        f"sentinel auth-pass {name} {PASSWORD}",
        f"sentinel down-after-milliseconds {name} {DOWN_AFTER_MS}",
        f"sentinel failover-timeout {name} 5000",
    ]
    settings = folder / "sentinel.conf"
    settings.write_text("\n".join(lines) + "\n")
    with (folder / "sentinel.log").open("wb") as log:
        process = subprocess.Popen([server_binary(), settings, "--sentinel"], stdout=log, stderr=log)
    try:
        with client(port, password) as asked:
            wait_for(lambda: asked.execute_command("SENTINEL REPLICAS", name) != [], "the Sentinel finds the replica")
        yield port
    finally:
        process.terminate()
        process.wait()


def replica_of(master: RedisServer) -> RedisServer:
    settings = {"replicaof": f"127.0.0.1 {master.port}", "masterauth": PASSWORD}
    return RedisServer(settings, password=PASSWORD)


def in_step(master: RedisServer) -> bool:
    """Whether the one replica of `master` has all that was written."""
    with client(master.port) as asked:
        state = asked.info("replication")
    return state["connected_slaves"] == 1 and state["slave0"].get("offset") == state["master_repl_offset"]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine's loopback address that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of a test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "redis.crt", folder / "redis.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


@asynccontextmanager
async def tls_in_front(port: int, certificate: Path, key: Path) -> AsyncIterator[int]:
    """What ends TLS before a server that speaks none (the packaged one is built without); its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, inner_writer), pass_on(inner_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
