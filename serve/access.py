"""What every route asks for: the gateway behind it, and a client that may use it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from serve.errors import ApiError
from serve.gateway import Gateway
from serve.keys import ApiKeys, Refused


def the_gateway(connection: HTTPConnection) -> Gateway:
    gateway = connection.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


def authorized(connection: HTTPConnection) -> str:
    """The client's name. Refuses with 401, a WebSocket's handshake as well."""
    keys = connection.app.state.keys
    assert isinstance(keys, ApiKeys)
    try:
        return keys.client(connection)
    except Refused as error:
        raise ApiError(401, "unauthorized", str(error)) from None


TheGateway = Annotated[Gateway, Depends(the_gateway)]
Client = Annotated[str, Depends(authorized)]
