"""Routes that read their body themselves, and those that are left to FastAPI."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI
from starlette.requests import Request

from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.schemas.base import Body

router = APIRouter(route_class=JsonRoute)


@router.post("/own", status_code=202)
async def own(body: Body, request: Request) -> dict[str, Any]:
    return {"model": body.model, "path": request.url.path}


@router.post("/frameworks/{name}", status_code=202)
async def frameworks(body: Body, name: str) -> dict[str, Any]:
    return {"model": body.model, "name": name}


def post(path: str) -> tuple[int, Any]:
    app = FastAPI()
    app.include_router(router)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(path, json={"model": "m"})

    answer = asyncio.run(ask())
    return answer.status_code, answer.json()


def test_a_route_is_given_what_it_takes_and_answers_with_its_status() -> None:
    assert post("/own") == (202, {"model": "m", "path": "/own"})


def test_a_route_that_takes_more_than_a_body_is_given_it_too() -> None:
    assert post("/frameworks/x") == (202, {"model": "m", "name": "x"})
