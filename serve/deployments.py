"""What the Ray Serve deployments host: thin shells around the classes that do the work.

Encoder and LLM run their loops as tasks beside Serve's own calls; Serve asks `check_health` now and
then, and a replica whose loop has died answers with the loop's error and is replaced. Replicas get
`__del__` within `graceful_shutdown_timeout_s`: that is where loops are asked to stop.

Model code is imported by the replicas that run it: it takes seconds of CPU time, which the gateway
and the program that starts everything would spend for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.bus import Bus, BusConfig, BusError
from actors.config import Config
from actors.load import Load, measure
from actors.messages import SessionSettings
from actors.redis_server import RedisServer
from serve.api import build_api
from serve.gateway import Gateway, ServeConfig
from serve.keys import ApiKeys
from serve.limits import LimitsConfig
from serve.url_guard import SourcesConfig

log = logging.getLogger(__name__)

RedisAddress = str | DeploymentHandle


class Worker(Protocol):
    """A loop over the bus."""

    async def run(self) -> None:
        """Work until `stop`; an exception ends the replica."""

    def stop(self) -> None:
        """Let `run` return soon."""


class WorkerReplica:
    """What encoder and LLM replicas have in common: one worker, its loop, its health and its end."""

    worker: Worker
    bus: Bus
    _loop: asyncio.Task[None]

    def start(self, worker: Worker, bus: Bus) -> None:
        self.worker = worker
        self.bus = bus
        self._loop = asyncio.create_task(worker.run())

    async def load(self) -> Load:
        """What waits on the bus, as every replica sees it."""
        try:
            return await measure(self.bus)
        except BusError as error:
            log.warning("load not measured: %s", error)
            return Load(0, 0.0)

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError(f"the loop of {type(self.worker).__name__} has ended") from self._loop.exception()

    async def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self.worker.stop()
            await asyncio.wait([self._loop])
            await self.bus.close()


class EncoderReplica(WorkerReplica):
    """Frames to frame tokens, batched across sessions."""

    async def __init__(self, config: Config, redis: RedisAddress) -> None:  # type: ignore[misc]  # Serve awaits it
        name = prepare_replica()
        from actors.encoder import build_encoder_worker

        bus = await connect(config, redis)
        worker = await asyncio.to_thread(build_encoder_worker, config, bus, name)
        self.features_value = worker.encoder.fingerprint
        self._encoder = worker
        self._seen = (time.monotonic(), 0.0)
        self.start(worker, bus)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For autoscaling.py: the age of the oldest waiting frame, and the share of time spent encoding."""
        (before, encoded_before_s), self._seen = self._seen, (time.monotonic(), self._encoder.counts.encode_s)
        now, encoded_s = self._seen
        busy = (encoded_s - encoded_before_s) / max(now - before, 1e-3)
        return {"oldest_frame_s": (await self.load()).oldest_frame_s, "busy": busy}

    async def features(self) -> str:
        """Which encoder the frame tokens come from."""
        return self.features_value


class LLMReplica(WorkerReplica):
    """Sessions held by lease: decisions and responses."""

    async def __init__(self, config: Config, redis: RedisAddress) -> None:  # type: ignore[misc]  # Serve awaits it
        name = prepare_replica()
        from actors.llm import build_llm_worker

        bus = await connect(config, redis)
        worker = await asyncio.to_thread(build_llm_worker, config, bus, name)
        self.fingerprint_value = worker.fingerprint
        self.features_value = worker.features
        self.threshold_value = worker.threshold
        self._llm = worker
        self.start(worker, bus)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For autoscaling.py: KV memory in use, sessions here and room for more, what waits here and on the bus."""
        use, held = self._llm.engine.kv_use, list(self._llm.held.values())
        return {
            "kv_use": use.reserved / use.total if use.total else 0.0,
            "room": self._llm.engine.room,
            "sessions": len(held),
            "waiting_frames": sum(one.session.waiting_frames for one in held),
            "waiting_sessions": (await self.load()).waiting_sessions,
        }

    async def fingerprint(self) -> str:
        """What sessions must be opened for so that this model takes them."""
        return self.fingerprint_value

    async def features(self) -> str:
        """Which encoder the model was trained on."""
        return self.features_value

    async def threshold(self) -> float | None:
        """What sessions use that were given none; None where its checkpoint says nothing about it."""
        return self.threshold_value


@serve.ingress()
class GatewayReplica:
    """Clients' connections."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config, redis: RedisAddress, encoder: DeploymentHandle, llm: DeploymentHandle
    ) -> None:
        name = prepare_replica()
        self._model = config.model
        self._sources = config.section("sources", SourcesConfig)
        made, expected = await encoder.features.remote(), await llm.features.remote()
        if made != expected:
            raise RuntimeError(
                f"the encoder gives frame tokens {made}, the checkpoint was trained on {expected}: "
                "set model.vision and model.frames to those of its training"
            )
        self._bus = await connect(config, redis)
        self._gateway = Gateway(
            self._bus,
            fingerprint=await llm.fingerprint.remote(),
            fit=config.model.frames.fit,
            config=config.section("serve", ServeConfig),
            defaults=config.section("session", SessionSettings).with_threshold_of(await llm.threshold.remote()),
            limits=config.section("limits", LimitsConfig),
            name=name,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._gateway, self._model.frames, ApiKeys.from_environment(), self._sources)

    async def drain(self, notice_s: float | None) -> None:
        """Let all gateways that run now send their clients away after a notice; None calls it off (drain.py)."""
        if notice_s is None:
            await self._bus.stop_draining()
        else:
            await self._bus.drain(notice_s)

    async def connected(self) -> int:
        """Connections of all gateways that were told to let theirs go."""
        return await self._gateway.draining_connections()

    async def __del__(self) -> None:
        if hasattr(self, "_bus"):
            await self._bus.close()


class RedisReplica:
    """The embedded Redis server of an application that was started without an address for one."""

    def __init__(self) -> None:
        prepare_replica()
        self._server = RedisServer()
        self._url = self._server.start()

    async def url(self) -> str:
        """Address of the server, on this node's loopback."""
        return self._url

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()


async def connect(config: Config, redis: RedisAddress) -> Bus:
    """The bus at an address or at the embedded server's."""
    url = redis if isinstance(redis, str) else await redis.url.remote()
    return await Bus.connect(config.section("bus", BusConfig), url)


def prepare_replica() -> str:
    """To be done first in every replica's process; the replica's name, as it is told in leases."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _listen_on_node_address()
    return serve.get_replica_context().replica_id.unique_id


def _listen_on_node_address() -> None:
    """Keep Serve's port between replicas, which unpickles what it gets, off the machine's other interfaces.

    Ray 2.60 binds it to all of them, even on a node that advertises the loopback address only.
    """
    from ray.serve._private import replica

    add_port, host = replica.add_port_to_grpc_server, ray.util.get_node_ip_address()  # type: ignore[attr-defined]
    everywhere, here = "[::]:", f"[{host}]:" if ":" in host else f"{host}:"

    def add_port_here(server: object, address: str) -> int:
        bound: int = add_port(server, address.replace(everywhere, here))
        return bound

    replica.add_port_to_grpc_server = add_port_here  # type: ignore[attr-defined]
