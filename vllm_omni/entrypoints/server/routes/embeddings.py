"""`/v1/embeddings`: texts as vectors, pooled of an encoder's hidden states."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from vllm_omni.entrypoints.server.answers.usage import num_read
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.client import all_of, while_connected
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, require
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.embeddings import EmbeddingBody

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings", tags=["embeddings"])
async def create_embeddings(body: EmbeddingBody, call: CallOf, request: Request) -> Response:
    """One vector for each input."""
    model = call.parts.models.find(body.model)
    port = model.abilities.embeddings
    require(model, "embeddings", [] if port is None else [port])
    runs = [_run(body, text, index, model, call) for index, text in enumerate(body.inputs)]
    outputs = await while_connected(request, all_of([call.parts.runs.final(run) for run in runs]))
    vectors = await asyncio.to_thread(lambda: [_pooled(output.tensors[port or ""], body) for output in outputs])
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    read = sum(num_read(model, output) for output in outputs)
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JSONResponse({"object": "list", "model": model.name, "data": data, "usage": usage})


def _run(body: EmbeddingBody, text: Any, index: int, model: ServedModel, call: Call) -> Run:
    key = "prompt" if isinstance(text, str) else "prompt_token_ids"
    made = build_request(call, model, body, {key: text}, [model.abilities.embeddings or ""])
    made = dataclasses.replace(made, request_id=f"{call.run_id}-{index}")
    return call.begin(made, model, wants_parts=False)


def _pooled(states: Tensor, body: EmbeddingBody) -> Tensor:
    """states: [T, D], any device -> float32 [D]."""
    states = states.detach().to("cpu", torch.float32)
    vector = states[-1] if body.pooling == "last" else states.mean(dim=0)
    if body.dimensions is not None:
        if body.dimensions > len(vector):
            raise ApiError(
                400,
                f"dimensions: got {body.dimensions}, expected at most {len(vector)}",
                code="invalid_value",
                param="dimensions",
            )
        vector = vector[: body.dimensions]
    return torch.nn.functional.normalize(vector, dim=0) if body.normalize else vector


def _encoded(vector: Tensor, encoding: str) -> Any:
    """base64: little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
