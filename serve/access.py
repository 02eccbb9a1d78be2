"""What every route asks for: the gateway behind it, and a client that may use it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.exceptions import WebSocketException
from starlette.requests import HTTPConnection

from serve.errors import ApiError
from serve.gateway import Gateway
from serve.keys import ApiKeys, Refused
from serve.realtime import POLICY

DENIAL = "websocket.http.response"  # the ASGI extension by which a handshake is answered as a request is


def the_gateway(connection: HTTPConnection) -> Gateway:
    gateway = connection.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


def authorized(connection: HTTPConnection) -> str:
    """The client's name. Refuses with 401, a WebSocket's handshake too: with 1008 where the server cannot answer it."""
    keys = connection.app.state.keys
    assert isinstance(keys, ApiKeys)
    try:
        return keys.client(connection)
    except Refused as error:
        if connection.scope["type"] == "websocket" and DENIAL not in (connection.scope.get("extensions") or {}):
            raise WebSocketException(POLICY, str(error)) from None
        raise ApiError(401, "unauthorized", str(error)) from None


TheGateway = Annotated[Gateway, Depends(the_gateway)]
Client = Annotated[str, Depends(authorized)]
