"""Redis as a fleet runs it: a cluster of masters, a Sentinel's failover, TLS, and a user with few rights."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from redis import exceptions
from redis.crc import key_slot
from redis_servers import (
    ESCAPED,
    PASSWORD,
    Cluster,
    client,
    in_step,
    redis_cluster,
    replica_of,
    self_signed,
    sentinel,
    tls_in_front,
    wait_for,
)

from actors import load, scripts
from actors.bus import Bus, BusConfig, BusError
from actors.messages import FramesDecided, FrameSkipped, Interrupt, SessionEnded, SessionSettings
from actors.redis_server import RedisServer
from actors.replicas import ReplicaReport

pytestmark = pytest.mark.anyio

PARTITIONS = 8
DOCS = Path(__file__).parents[1] / "docs" / "clusters.md"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting gives up at once where it is refused."""
    monkeypatch.setattr("actors.bus.CONNECT_RETRY_S", 0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with redis_cluster(masters=3) as cluster:
        yield cluster


@pytest.fixture
def server() -> Iterator[RedisServer]:
    server = RedisServer(password=PASSWORD)
    server.start()
    yield server
    server.stop()


def settings(**values: object) -> BusConfig:
    """Of a test's own session log, whose frames go to another encoder after a moment."""
    own = {"prefix": f"test-{secrets.token_hex(4)}:", "partitions": PARTITIONS, "reclaim_idle_ms": 20}
    return BusConfig.model_validate(own | values)


def decided(seq: int) -> FramesDecided:
    return FramesDecided(first_seq=seq, times=[seq / 2], p_silent=[0.9])


async def live_through(bus: Bus) -> None:
    """All that a bus goes through: every script, stream and group, the announcements and the wake-ups."""
    ran = {"REGISTER"}  # by `connect`
    run = bus.script

    async def noted(name: str, keys: Sequence[str], args: Sequence[str | int | float | bytes]) -> object:
        ran.add(name)
        return await run(name, keys, args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bus, "script", noted)
        patched.setattr(bus, "_next_forget", 0.0)
        await sessions_live(bus)
        await clients_come_and_go(bus)
        await replicas_report(bus)
    assert ran == set(scripts.texts())


async def clients_come_and_go(bus: Bus) -> None:
    await bus.open_session("guest", "model-a", SessionSettings(), client="key")
    meta = await bus.attach("guest", "key")
    assert await bus.note("guest", meta.connection, "preferences", "{}")
    with pytest.raises(BusError, match="session_expired"):
        await bus.attach("guest", "another key")
    await bus.take_place("key", "guest", 1, 9, 60)
    with pytest.raises(BusError, match="too_many_sessions"):
        await bus.take_place("key", "other", 1, 9, 60)
    with pytest.raises(BusError, match="sessions_full"):
        await bus.take_place("another key", "other", 1, 1, 60)
    await bus.free_place("key", "guest")
    assert (await load.measure(bus)).waiting_sessions >= 1
    since_ms = await bus.clock_ms()
    await bus.drain(60)
    assert 0 < (await bus.draining(since_ms) or 0) <= 60
    await bus.stop_draining()
    assert await bus.draining(since_ms) is None


async def replicas_report(bus: Bus) -> None:
    report = ReplicaReport(role="llm", name="replica", pid=1, at=0.0, model="model-a", stats={}, metrics="")
    await bus.report(report, [[1, 2]])
    assert await bus.reports() == [report]
    assert await bus.steps() == {"llm": [[1, 2]]}
    await bus.retire("replica")
    assert await bus.reports() == []


async def sessions_live(bus: Bus) -> None:
    names = [f"session-{number}" for number in range(2 * PARTITIONS)]
    partitions = range(bus.config.partitions)
    waiting = asyncio.create_task(bus.read_frames("encoder", 3, 20_000))
    for name in names:
        await bus.open_session(name, "model-a", SessionSettings())
        await bus.admit_frame(name, 0.0, b"jpeg", bulk=name == names[0])
        await bus.admit_frame(name, 0.5, b"jpeg")
        await bus.send(name, Interrupt(after_seq=1))
    taken = await waiting
    assert taken, "an encoder that waits hears of new frames"
    assert await bus.hold("encoder", taken) == len(taken)
    published = set[tuple[str, int]]()
    async with asyncio.timeout(30):
        while len(published) < 2 * len(names):
            for pending in taken:
                if pending.deliveries > 1:
                    skipped = FrameSkipped(seq=pending.frame.seq, time=pending.frame.time, reason="test")
                    await bus.publish(pending, skipped)
                    published.add((pending.frame.session_id, pending.frame.seq))
            taken = await bus.read_frames("encoder", 3, 100)
    leases = [lease for part in partitions for lease in await bus.claim("replica", "model-a", part, 99)]
    assert sorted(lease.session_id for lease in leases) == sorted(names)
    assert await bus.renew(leases) == []
    for lease in leases:
        name, partition = lease.session_id, bus.partition(lease.session_id)
        assert len(await bus.read_all_inputs(name)) == 3
        assert len(await bus.read_inputs({name: "0-0"}, 0, partition)) == 3
        following = asyncio.create_task(follow(bus, name))
        assert await bus.append(lease, 0, [decided(0), SessionEnded(reason="done")], 1) == "ok"
        assert await following == [0, 1]
        assert [position for position, _ in await bus.read_log(name)] == [0, 1]
        assert await bus.trim(lease, b"", "0-0", 1)
        await bus.touch(name)
    assert await bus.release(leases[0])
    assert await bus.abandon(leases[0].session_id, "test")
    assert [await bus.end_session(lease) for lease in leases[1:]] == [True] * (len(names) - 1)


async def follow(bus: Bus, name: str) -> list[int]:
    return [position async for position, _ in bus.tail(name)]


async def refusal(url: str) -> str:
    with pytest.raises(BusError) as error:
        await Bus.connect(settings(), url)
    assert PASSWORD not in str(error.value)
    assert ESCAPED not in str(error.value)
    return str(error.value)


async def test_sessions_live_on_three_masters(cluster: Cluster) -> None:
    bus = await Bus.connect(settings(), cluster.url)
    await live_through(bus)
    await bus.close()
    for server in cluster.masters:
        with client(server.port) as node:
            assert node.dbsize() > 0


async def test_two_processes_meet_on_a_cluster(cluster: Cluster) -> None:
    one = await Bus.connect(config := settings(), cluster.url)
    other = await Bus.connect(config, cluster.url)
    for number in range(PARTITIONS):
        name = f"session-{number}"
        waiting = asyncio.create_task(other.read_inputs({}, 5000, one.partition(name)))
        await asyncio.sleep(0)
        await one.open_session(name, "model-a", SessionSettings())
        async with asyncio.timeout(4):
            assert await waiting == []
    assert await other.generation() == await one.generation()
    await one.close()
    await other.close()


async def test_nothing_is_lost_while_a_slot_moves_to_another_master(cluster: Cluster) -> None:
    bus = await Bus.connect(config := settings(partitions=1), cluster.url)
    await bus.open_session("a", "model-a", SessionSettings())
    slot = key_slot(bus.keys.wake(0).encode())
    source = next(server for server in cluster.masters if holds(server, bus.keys.wake(0)))
    target = next(server for server in cluster.masters if server is not source)
    with client(source.port) as old, client(target.port) as new:
        ids = {node: node.execute_command("CLUSTER MYID") for node in (old, new)}
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[old])
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[new])
        keys = old.execute_command("CLUSTER GETKEYSINSLOT", slot, 100)
        old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *keys)
        await bus.wake(0)
        assert len((await bus.read({bus.keys.wake(0): "0-0"}, 9))[bus.keys.wake(0)]) == 2
        admitting = asyncio.create_task(bus.admit_frame("a", 0.0, b"jpeg"))
        await asyncio.wait([admitting], timeout=0.2)
        assert not admitting.done(), "of its keys some exist, at either master: it can only wait"
        for node in (new, old):
            node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[new])
    assert await admitting == 0
    [pending] = await bus.read_frames("encoder", 1, 5000)
    assert await bus.publish(pending, FrameSkipped(seq=0, time=0.0, reason="test")) == "ok"
    assert await bus.admit_frame("a", 0.5, b"jpeg") == 1
    assert [pending.frame.seq for pending in await bus.read_frames("encoder", 1, 5000)] == [1]
    late = await Bus.connect(config, cluster.url)
    assert (await late.session_meta("a")).admitted == 2
    await late.close()
    await bus.close()


def holds(server: RedisServer, key: str) -> bool:
    slot = key_slot(key.encode())
    with client(server.port) as node:
        ranges = node.execute_command("CLUSTER SLOTS")
    return any(first <= slot <= last and master[1] == server.port for first, last, master, *_ in ranges)


@pytest.mark.slow
async def test_a_master_that_dies_is_replaced_and_the_others_are_not_held_up() -> None:
    with redis_cluster(masters=3, replicas=1) as cluster:
        bus = await Bus.connect(settings(retry_s=30.0, lease_ms=600_000), cluster.url)
        names = [f"session-{number}" for number in range(4 * PARTITIONS)]
        for name in names:
            await bus.open_session(name, "model-a", SessionSettings())
        leases = [lease for part in range(PARTITIONS) for lease in await bus.claim("replica", "model-a", part, 99)]
        victim = cluster.masters[0]
        wait_for(lambda: in_step(victim), "the replica has all that was written")
        dead = {name for name in names if holds(victim, bus.keys.wake(bus.partition(name)))}
        assert 0 < len(dead) < len(names)
        victim.stop()
        async with asyncio.timeout(5):  # less than the failover takes
            living = [name for name in names if name not in dead]
            await asyncio.gather(*(bus.admit_frame(name, 0.0, b"jpeg") for name in living))
            assert await bus.renew(leases) == []
        assert await asyncio.gather(*(bus.admit_frame(name, 0.0, b"jpeg") for name in dead)) == [0] * len(dead)
        assert await bus.renew(leases) == []
        seen = set[str]()
        async with asyncio.timeout(30):
            while seen != set(names):
                seen |= {pending.frame.session_id for pending in await bus.read_frames("encoder", 9, 500)}
        await bus.close()


@pytest.mark.slow
async def test_after_a_sentinels_failover_sessions_go_on_at_the_new_master(server: RedisServer, tmp_path: Path) -> None:
    heir = replica_of(server)
    heir.start()
    try:
        with client(server.port) as master:
            master.config_set("masterauth", PASSWORD)
        with sentinel(tmp_path, server, "main", "sentinel/secret") as port:
            url = f"redis+sentinel://:{ESCAPED}@127.0.0.1:1,127.0.0.1:{port}/main?sentinel_password=sentinel%2Fsecret"
            bus = await Bus.connect(settings(retry_s=30.0), url)
            await bus.open_session("a", "model-a", SessionSettings())
            assert await bus.admit_frame("a", 0.0, b"jpeg") == 0
            wait_for(lambda: in_step(server), "the replica has all that was written")
            server.stop()
            assert await bus.admit_frame("a", 0.5, b"jpeg") == 1
            with client(heir.port) as new_master:
                assert new_master.info("replication")["role"] == "master"
            await bus.close()
            late = await Bus.connect(settings(), url)
            await live_through(late)
            await late.close()
            said = await refusal(url.replace("/main", "/other"))
            assert "no Sentinel knows a healthy master for Redis at master 'other' of Sentinel" in said
            said = await refusal(f"redis://:sentinel%2Fsecret@127.0.0.1:{port}")
            assert "is a Sentinel: give its address as redis+sentinel://host:port/name-of-its-master" in said
    finally:
        heir.stop()


async def test_tls_is_spoken_and_the_certificate_checked(server: RedisServer, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    async with tls_in_front(server.port, certificate, key) as port:
        bus = await Bus.connect(settings(), f"rediss://:{ESCAPED}@127.0.0.1:{port}?ssl_ca_certs={certificate}")
        await live_through(bus)
        await bus.close()
        unchecked = await Bus.connect(settings(), f"rediss://:{ESCAPED}@127.0.0.1:{port}?ssl_cert_reqs=none")
        await unchecked.close()
        said = await refusal(f"rediss://:{ESCAPED}@127.0.0.1:{port}")
        assert "is not trusted (self-signed certificate" in said
        assert "?ssl_ca_certs=FILE" in said
        said = await refusal(f"rediss://:{ESCAPED}@localhost:{port}?ssl_ca_certs={certificate}")
        assert "is not trusted (Hostname mismatch" in said
        assert "begins with rediss" in await refusal(f"redis://:{ESCAPED}@127.0.0.1:{port}")
    said = await refusal(f"rediss://:{ESCAPED}@127.0.0.1:{server.port}")
    assert "does it speak TLS there? Else the address begins with redis." in said


async def test_the_documented_rights_are_enough_and_no_more(server: RedisServer) -> None:
    [rights] = re.findall(r"^    ACL SETUSER videollm (.*)$", DOCS.read_text(), re.MULTILINE)
    with client(server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "videollm", *rights.replace("PASSWORD", PASSWORD).split())
    bus = await Bus.connect(settings(prefix=""), url := f"redis://videollm:{ESCAPED}@127.0.0.1:{server.port}")
    await live_through(bus)
    for command in ("FLUSHALL", "KEYS *", "CONFIG GET requirepass", "SHUTDOWN", "ACL LIST", "SUBSCRIBE other"):
        with pytest.raises(exceptions.NoPermissionError):
            await bus.client.run("", command.split())
    with client(server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "videollm", "-xadd")
    with pytest.raises(BusError, match=r"redis_auth: .*does not let the user .*docs/clusters.md lists the rights"):
        await bus.open_session("a", "model-a", SessionSettings())
    await bus.close()
    assert (await refusal(url.replace("videollm", "stranger"))).startswith("redis_auth")


async def test_the_wrong_kind_of_address_is_explained(cluster: Cluster, server: RedisServer) -> None:
    elsewhere = next(node for node in cluster.masters if not holds(node, "bus"))
    own = settings(prefix="")
    with pytest.raises(BusError, match=r"is a node of a Redis Cluster: give its address as redis\+cluster://host:port"):
        await Bus.connect(own, f"redis://:{ESCAPED}@127.0.0.1:{elsewhere.port}")
    said = await refusal(f"redis+cluster://:{ESCAPED}@127.0.0.1:{server.port}")
    assert "is no node of a Redis Cluster: give its address as redis://host:port" in said
    said = await refusal(f"redis+cluster://:wrong@127.0.0.1:{cluster.masters[0].port}")
    assert said.startswith("redis_auth")
    said = await refusal("redis+cluster://:wrong@127.0.0.1:1,127.0.0.1:2")
    assert "no answer from Redis at 127.0.0.1:1,127.0.0.1:2" in said
    said = await refusal("redis+sentinel://:wrong@127.0.0.1:1,127.0.0.1:2/main")
    assert "no Sentinel knows a healthy master" in said


async def test_a_replica_is_no_place_to_write(server: RedisServer) -> None:
    replica = replica_of(server)
    url = replica.start()
    try:
        assert "is a replica that takes no writes" in await refusal(url)
    finally:
        replica.stop()
