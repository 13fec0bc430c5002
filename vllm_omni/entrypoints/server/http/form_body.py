"""Bodies that come as forms with files (`multipart/form-data`), as OpenAI's clients send pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from vllm_omni.entrypoints.server.http.api_error import ApiError, client_gone
from vllm_omni.entrypoints.server.http.json_body import is_json, read_json
from vllm_omni.entrypoints.server.schemas.base import Body

MAX_FILES = 16
MAX_FIELDS = 200
JSON_FIELDS = frozenset({"extra_params", "lora"})  # objects and lists, as text within a form
B = TypeVar("B", bound=Body)


def form_schema(body_type: type[Body], file_fields: Mapping[str, str], or_json: bool = False) -> dict[str, Any]:
    """What OpenAPI says of such a body. or_json: it may come as JSON as well."""
    plain = {"application/json": {"schema": body_type.model_json_schema()}} if or_json else {}
    schema = body_type.model_json_schema(ref_template="#/components/schemas/{model}")
    files = {name: {"type": "string", "format": "binary"} for name in sorted(set(file_fields.values()))}
    schema["properties"] = {**schema["properties"], **files}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}, **plain}}}


async def read_form_or_json(
    request: Request, body_type: type[B], file_fields: Mapping[str, str]
) -> tuple[B, dict[str, list[bytes]]]:
    """As `read_form`, or of JSON, without files."""
    if is_json(request):
        return await read_json(request, body_type), {}
    return await read_form(request, body_type, file_fields)


async def read_form(
    request: Request, body_type: type[B], file_fields: Mapping[str, str]
) -> tuple[B, dict[str, list[bytes]]]:
    """The fields as a body, and the files by the name that `file_fields` gives to theirs (`image[]` and `image` are
    both `image`). ApiError 400 and 415; RequestValidationError as for JSON.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        got = request.headers.get("content-type", "none")
        raise ApiError(
            415, f"content-type: got {got!r:.80}, expected multipart/form-data", code="unsupported_media_type"
        )
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields[name] = _parsed(name, value)
                elif name in file_fields:
                    files.setdefault(file_fields[name], []).append(await value.read())
                else:
                    raise ApiError(400, f"{name:.80}: got a file, expected none", code="invalid_value", param=name[:80])
    except ClientDisconnect:
        raise client_gone() from None
    try:
        return body_type.model_validate(fields), files
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _parsed(name: str, text: str) -> Any:
    if name not in JSON_FIELDS:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, f"{name}: got text that is no JSON", code="invalid_value", param=name) from None
