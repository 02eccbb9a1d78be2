"""The gateway with the real bus, encoder and LLM around it in one process, for tests."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import uvicorn

from actors.bus import Bus, BusConfig
from actors.config import Config
from actors.encoder import build_encoder_worker
from actors.llm import build_llm_worker
from serve.api import build_api
from serve.gateway import Gateway, ServeConfig
from serve.keys import ApiKeys
from serve.limits import LimitsConfig
from serve.url_guard import SourcesConfig

T = TypeVar("T")


class Application:
    """Everything but Ray on one event loop in a thread; `urls`, one a gateway, answer when it is made."""

    def __init__(
        self, config: Config, redis: str, keys: Sequence[str] = (), workers: bool = True, gateways: int = 1
    ) -> None:
        self.config = config
        self.redis = redis
        self.keys = ApiKeys(keys)
        self.workers = workers
        self.gateways: list[Gateway] = []
        self._wanted = gateways
        self._servers: list[uvicorn.Server] = []
        self._loops: list[asyncio.Task[None]] = []
        self._started: Future[list[str]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self.urls = self._started.result(timeout=60)
        self.url = self.urls[0]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=60)

    def call(self, work: Coroutine[object, object, T]) -> T:
        """Run something on the application's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    async def work(self) -> None:
        """Start encoder and LLM of an application that was made without."""
        self._loops = [asyncio.create_task(worker.run()) for worker in (self._encoder, self._llm)]

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            bus = self.config.section("bus", BusConfig)
            buses = [await Bus.connect(bus, self.redis) for _ in range(2 + self._wanted)]
            self._encoder = build_encoder_worker(self.config, buses[0], "encoder")
            self._llm = build_llm_worker(self.config, buses[1], "llm")
            if self.workers:
                await self.work()
            serving = [await self._serve(own, self._llm.fingerprint) for own in buses[2:]]
            self._started.set_result(
                [f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}" for server in self._servers]
            )
        except BaseException as error:
            self._started.set_exception(error)
            return
        await self._stop.wait()
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        if self._loops:
            self._encoder.stop()
            self._llm.stop()
        await asyncio.gather(*self._loops)
        for own in buses:
            await own.close()

    async def _serve(self, bus: Bus, fingerprint: str) -> asyncio.Task[None]:
        gateway = Gateway(
            bus,
            fingerprint,
            self.config.model.frames.fit,
            self.config.section("serve", ServeConfig),
            limits=self.config.section("limits", LimitsConfig),
        )
        self.gateways.append(gateway)
        sources = self.config.section("sources", SourcesConfig)
        api = build_api(gateway, self.config.model.frames, self.keys, sources)
        server = uvicorn.Server(
            uvicorn.Config(api, port=0, log_level="warning", timeout_graceful_shutdown=2, ws_max_size=16 << 20)
        )
        self._servers.append(server)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        return serving


@contextmanager
def running(
    tiny: dict[str, object],
    redis_url: str,
    keys: Sequence[str] = (),
    workers: bool = True,
    gateways: int = 1,
    **settings: object,
) -> Iterator[Application]:
    """An application of its own, with `settings` of bus, limits and serve; without `workers` nobody takes sessions."""
    owners = {"bus": BusConfig, "limits": LimitsConfig, "serve": ServeConfig, "sources": SourcesConfig}
    sections = {
        section: {name: settings.pop(name) for name in list(settings) if name in owner.model_fields}
        for section, owner in owners.items()
    }
    assert not settings, f"no such settings: {settings}"
    sections["bus"].setdefault("prefix", f"test-{uuid.uuid4().hex}:")
    sections["serve"].setdefault("status_interval_s", 0.05)
    app = Application(Config({"model": tiny, **sections}), redis_url, keys, workers, gateways)
    try:
        yield app
    finally:
        app.close()


@contextmanager
def application(
    tiny: dict[str, object], redis_url: str, api_key: str | None = None, workers: bool = True, **settings: object
) -> Iterator[str]:
    """The address of an application of its own with one gateway."""
    with running(tiny, redis_url, [api_key] if api_key else [], workers, **settings) as app:
        yield app.url
