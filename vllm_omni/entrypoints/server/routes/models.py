"""`/v1/models`: what is served, what it reads and what it makes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from vllm_omni.entrypoints.server.context import CallOf

router = APIRouter()


@router.get("/v1/models", tags=["models"])
async def list_models(call: CallOf) -> dict[str, Any]:
    """Every served model."""
    return {"object": "list", "data": [model.describe() for model in call.parts.models]}


@router.get("/v1/models/{model_id}/graph", tags=["models"])
async def retrieve_graph(model_id: str, call: CallOf) -> dict[str, Any]:
    """The stages of a model, and what goes from one to another."""
    return call.parts.models.find(model_id).describe_graph()


@router.get("/v1/models/{model_id:path}", tags=["models"])
async def retrieve_model(model_id: str, call: CallOf) -> dict[str, Any]:
    """One model."""
    return call.parts.models.find(model_id).describe()
