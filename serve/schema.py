"""The JSON Schema of everything that is said on `/v1/realtime`: `python -m serve.schema`, `GET /v1/realtime/schema`.

`client` describes the text messages of clients, `server` those of the server; `binary` is the header of
a frame that is sent as one binary message.
"""

from __future__ import annotations

import json
import sys

from fastapi import APIRouter
from pydantic import TypeAdapter

from serve.client_events import BINARY_HEADER, BINARY_VERSION, AnyClientEvent
from serve.errors import described
from serve.server_events import AnyServerEvent

router = APIRouter(tags=["realtime"])


def realtime_schema() -> dict[str, object]:
    """Both directions, each a schema of its own (draft 2020-12)."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    client: TypeAdapter[AnyClientEvent] = TypeAdapter(AnyClientEvent)
    server: TypeAdapter[AnyServerEvent] = TypeAdapter(AnyServerEvent)
    return {
        "client": dialect | client.json_schema(),
        "server": dialect | server.json_schema(),
        "binary": {
            "version": BINARY_VERSION,
            "header": BINARY_HEADER.format,
            "fields": ["version", "video_time"],
            "body": "a JPEG, PNG or WebP picture",
        },
    }


@router.get("/v1/realtime/schema", responses=described())
async def schema() -> dict[str, object]:
    """JSON Schema of the messages of the WebSocket `/v1/realtime`."""
    return realtime_schema()


if __name__ == "__main__":
    json.dump(realtime_schema(), sys.stdout, indent=2)
    print()
