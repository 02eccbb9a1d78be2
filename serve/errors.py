"""Refusals over HTTP: one form for every error, as the OpenAI API has it, and how it is described in OpenAPI."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from actors.bus import BusError
from serve.client_events import ClientError
from serve.gateway import Full

log = logging.getLogger(__name__)

CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "bad_method",
    408: "too_slow",
    413: "too_big",
    422: "bad_value",
    429: "too_many",
    503: "not_ready",
}
RETRY_AFTER_S = 5
REPRESENTATION_CHARS = 80


class ErrorDetail(BaseModel):
    """`code` is for programs, `message` for people, `param` the field that is wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """What every refused request is answered with."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A refused request: HTTP status, `code` for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None)
        self.code = code
        self.param = param

    @property
    def body(self) -> ErrorBody:
        """As it is told."""
        return error_body(self.status_code, self.code, str(self.detail), self.param)


def described(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The error responses of a route for OpenAPI; 401 and 500 belong to every one."""
    return {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
        for status in sorted({401, 500, *statuses})
    }


def error_response(
    status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(status, code, message, param).model_dump(), status, headers)


def error_body(status: int, code: str, message: str, param: str | None = None) -> ErrorBody:
    kind: Literal["invalid_request_error", "rate_limit_error", "server_error"] = "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    return ErrorBody(error=ErrorDetail(message=message, type=kind, code=code, param=param))


def install(api: FastAPI) -> None:
    """Answer every exception in the one form, and count it at the gateway in `api.state`."""
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(ClientError, _on_client_error)
    api.add_exception_handler(RequestValidationError, _on_invalid)
    api.add_exception_handler(Full, _on_full)
    api.add_exception_handler(BusError, _on_bus_error)
    api.add_exception_handler(Exception, _on_any)


def _answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    request.app.state.gateway.meters.error(code)
    return error_response(status, code, message, param, headers)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = error.code if isinstance(error, ApiError) else CODES.get(error.status_code, "error")
    param = getattr(error, "param", None)
    return _answer(request, error.status_code, code, str(error.detail), param, error.headers)


async def _on_client_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ClientError)
    return _answer(request, 422, error.code, str(error), error.param)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", problem["msg"])
        return _answer(request, 422, "bad_json", f"the request body is not valid JSON: {reason}")
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    if problem["type"] == "extra_forbidden":
        return _answer(request, 422, "unknown_field", f"{param} is not a parameter of this request", param)
    if problem["type"] == "missing":
        return _answer(request, 422, "bad_value", f"{param or 'the request body'} is missing", param)
    found = ascii(problem.get("input"))
    found = found if len(found) <= REPRESENTATION_CHARS else found[: REPRESENTATION_CHARS - 3] + "..."
    return _answer(request, 422, "bad_value", f"{param or 'request'} is {found}: {problem['msg']}", param)


async def _on_full(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Full)
    return _answer(request, 429, error.code, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})


async def _on_bus_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BusError)
    log.error("request=%s %s failed: %s", request.method, request.url.path, error)
    return _answer(request, 503, error.code, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})


async def _on_any(request: Request, error: Exception) -> JSONResponse:
    log.error("request=%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(request, 500, "internal", f"{type(error).__name__}: {error}")
