"""What is wrong with a body or an event, in the shape of our errors: clients of OpenAI's know no 422."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.utils.checks import brief

WORDS = {
    "extra_forbidden": "unknown, or not supported by this server",
    "missing": "missing",
}
CODES = {"extra_forbidden": "unsupported_parameter", "missing": "missing_required_parameter"}


def invalid_field(error: Mapping[str, Any]) -> ApiError:
    """error: one of pydantic's."""
    kind = error["type"]
    where = [part for part in error["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    words = WORDS.get(kind, error["msg"].removeprefix("Value error, "))  # of checks of ours
    got = "" if kind == "missing" else f"got {brief(error.get('input'))}; "
    return ApiError(400, f"{param or 'body'}: {got}{words}", code=CODES.get(kind, "invalid_value"), param=param or None)
