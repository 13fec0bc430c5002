"""What goes wrong, in the shape that OpenAI's clients read: {"error": {message, type, param, code}} and a status.

Texts name no file of this machine and no address in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from vllm_omni.errors import (
    ConfigError,
    InvalidRequestError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    ResourceError,
    SchedulerError,
)
from vllm_omni.request import OmniOutput, RequestStatus

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_S = 1.0
ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
FOLDERS = re.compile(r"(?<![\w:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|:,;()]+[/\\])+")
FIELD = re.compile(r"^(?:stage '[^']*': )?([a-z_][\w.]*(?:\[[^\]]{1,40}\])*(?:\.[a-z_]\w*)*): ")


class ApiError(Exception):
    """An answer that is an error. `retry_s`: when the client should try again; None tells it not to."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = scrubbed(message)
        self.code = code
        self.param = param
        self.retry_s = retry_s

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Clients repeat 408, 409, 429 and 5xx by themselves, so each says whether that makes sense."""
        if self.retry_s is None:
            return {"x-should-retry": "false"} if self.status in (408, 409, 429) or self.status >= 500 else {}
        milliseconds = max(1, round(self.retry_s * 1000))
        return {
            "retry-after": str(math.ceil(self.retry_s)),
            "retry-after-ms": str(milliseconds),
            "x-should-retry": "true",
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(self.headers))


def unsupported(field: str, why: str) -> ApiError:
    """A field that this model cannot honour."""
    return ApiError(400, f"{field}: {why}", code="unsupported_parameter", param=field)


def error_of(output: OmniOutput) -> ApiError | None:
    """What a final output that has an error is answered with."""
    if output.error is None:
        return None
    return as_api_error(output.error, was_admitted=output.status is not RequestStatus.REJECTED)


def as_api_error(error: Exception, *, was_admitted: bool = False) -> ApiError:
    """The answer that says what went wrong. was_admitted: whether work had begun."""
    message = str(error) or type(error).__name__
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, message, code="invalid_value", param=_field_of(message))
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", retry_s=RETRY_S)
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, message, code="deadline_exceeded")
    if isinstance(error, RequestAbortedError):
        return ApiError(499, message, code="request_aborted")
    if isinstance(error, ResourceError) and not was_admitted:
        return ApiError(400, message, code="too_large", param=_field_of(message))
    if isinstance(error, SchedulerError):
        is_callers = "priority:" in message or "request_id" in message
        return ApiError(400, message, code="invalid_value") if is_callers else _unavailable(message)
    if isinstance(error, ConfigError):
        return ApiError(400, message, code="unsupported_by_model")
    if isinstance(error, OmniError):
        return _unavailable(message) if not was_admitted else ApiError(500, message, code="stage_failed")
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


def scrubbed(message: str) -> str:
    """Without addresses in memory, and of paths only the last part."""
    return FOLDERS.sub("", ADDRESS.sub("0x...", message)).encode("utf-8", "backslashreplace").decode()


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", retry_s=RETRY_S)


def _field_of(message: str) -> str | None:
    """The field that an error of ours begins with: 'max_tokens: got ...'."""
    found = FIELD.match(message)
    return found.group(1) if found else None
