"""The HTTP face of a gateway, put together: routes, keys, limits, the one form of errors, and the WebSocket.

Without an API key only this machine is served; with one every request must bring it (keys.py), but for
the probes `/health` and `/ready` and the files of the page (site.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket

from actors.config import FrameConfig
from serve import chat, errors, health, schema, site, streams, videos
from serve.access import Client, TheGateway
from serve.bodies import RequestGuard
from serve.chat_request import ChatRequest
from serve.gateway import Gateway
from serve.keys import ApiKeys
from serve.realtime import serve_realtime
from serve.url_guard import SourcesConfig, UrlGuard


def build_api(gateway: Gateway, frames: FrameConfig, keys: ApiKeys, sources: SourcesConfig | None = None) -> FastAPI:
    """The application around one gateway. Recorded frames become what the model sees by `frames`.

    Without `sources` no URL and no file of the server is read.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        async with gateway.reporter.running():
            yield
        await streamed.close()
        await gateway.close()

    api = FastAPI(
        title="videollm-online",
        version="1",
        summary="A language model that watches video and talks about it",
        lifespan=lifespan,
    )
    api.state.gateway = gateway
    api.state.keys = keys
    api.state.frames = frames
    api.state.slots = videos.Slots(gateway.limits.recordings)
    api.state.guard = UrlGuard(sources or SourcesConfig())
    streamed = api.state.streams = streams.Streams(gateway, api.state.guard, frames)
    api.add_middleware(RequestGuard, gateway=gateway, keys=keys)
    errors.install(api)
    api.include_router(site.router)
    for router in (health.open_router, health.router, schema.router, videos.router, chat.router, streams.router):
        api.include_router(router)

    @api.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket, client: Client, the_gateway: TheGateway) -> None:
        await serve_realtime(websocket, the_gateway, client)

    api.openapi = lambda: _described(api)  # type: ignore[method-assign]
    return api


def _described(api: FastAPI) -> dict[str, object]:
    """The OpenAPI document, with the types of bodies that routes read themselves.

    Without the 422 that FastAPI adds wherever a path has a parameter: those are strings, and any will do.
    """
    if api.openapi_schema is None:
        document = FastAPI.openapi(api)
        for route in (route for methods in document["paths"].values() for route in methods.values()):
            if "HTTPValidationError" in str(route["responses"].get("422")):
                del route["responses"]["422"]
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= {**schema.pop("$defs"), "ChatRequest": schema}
        api.openapi_schema = document
    return api.openapi_schema
