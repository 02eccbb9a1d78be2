"""What the server tells of itself: whether it is alive and ready, its models, its statistics and metrics."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from actors.bus import BusError
from serve.access import TheGateway, authorized
from serve.errors import ApiError, described
from serve.gateway import Gateway
from serve.metrics import CONTENT_TYPE, exposition

ALIAS = "videollm-online"
READY_S = 2.0

router = APIRouter(tags=["server"])
open_router = APIRouter(tags=["server"])  # for probes, which bring no key and learn nothing but this


class Health(BaseModel):
    status: Literal["ok", "ready"]


class Model(BaseModel):
    """A model that can be asked for; `root` is the fingerprint of what answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = ALIAS
    root: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def models(gateway: Gateway) -> list[Model]:
    """The served model under its short name and under its fingerprint."""
    return [Model(id=name, created=gateway.created, root=gateway.fingerprint) for name in (ALIAS, gateway.fingerprint)]


def check_model(gateway: Gateway, name: str) -> Model:
    """The model of that name. Raises ApiError (404)."""
    served = models(gateway)
    for model in served:
        if model.id == name:
            return model
    names = " or ".join(repr(model.id) for model in served)
    raise ApiError(404, "model_not_found", f"model {name!r:.200} is not served here, expected {names}", "model")


async def missing(gateway: Gateway) -> list[str]:
    """What must be there before a session can run and is not."""
    try:
        async with asyncio.timeout(READY_S):
            reports = await gateway.bus.reports()
    except (TimeoutError, BusError) as error:
        return [f"Redis does not answer ({type(error).__name__})"]
    lacking = []
    if not any(report.role == "encoder" for report in reports):
        lacking.append("no encoder replica reports")
    if not any(report.role == "llm" and report.model == gateway.fingerprint for report in reports):
        lacking.append(f"no LLM replica of {gateway.fingerprint} reports")
    return lacking


@open_router.get("/health", responses=described())
async def health() -> Health:
    """Whether this gateway runs."""
    return Health(status="ok")


@open_router.get("/ready", responses=described(503))
async def ready(gateway: TheGateway) -> Health:
    """Whether sessions can run: Redis answers, an encoder and an LLM replica are alive. 503 says what is missing."""
    if lacking := await missing(gateway):
        raise ApiError(503, "not_ready", "; ".join(lacking))
    return Health(status="ready")


@router.get("/metrics", responses=described(503), dependencies=[Depends(authorized)], response_class=Response)
async def metrics(gateway: TheGateway) -> Response:
    """The metrics of all replicas as Prometheus text."""
    return Response(exposition(await gateway.reports()), media_type=CONTENT_TYPE)


@router.get("/v1/stats", responses=described(422, 503), dependencies=[Depends(authorized)])
async def stats(gateway: TheGateway, timeline: bool = False) -> dict[str, list[dict[str, object]]]:
    """Every replica's counts and rates, by role; with `timeline` also the latest `steps` of encoders and LLMs."""
    found = await gateway.stats()
    if timeline:
        found["steps"] = [
            {"role": role, "step": step} for role, steps in (await gateway.bus.steps()).items() for step in steps
        ]
    return found


@router.get("/v1/models", responses=described(), dependencies=[Depends(authorized)])
async def list_models(gateway: TheGateway) -> ModelList:
    """The served model, by its short name and by its fingerprint."""
    return ModelList(data=models(gateway))


@router.get("/v1/models/{name:path}", responses=described(404), dependencies=[Depends(authorized)])
async def get_model(gateway: TheGateway, name: str) -> Model:
    """One model."""
    return check_model(gateway, name)
