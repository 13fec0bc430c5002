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
    StageError,
    StageUnavailableError,
    UnreadableMediaError,
)
from vllm_omni.request import OmniOutput, RequestStatus

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_S = 1.0
MIN_RETRY_S = 0.5  # sooner, and a client has used its tries up before a stage is rebuilt
# error -> status, code, when to try again; the first that fits
ANSWERS: tuple[tuple[type[OmniError], int, str, float | None], ...] = (
    (UnreadableMediaError, 400, "invalid_media", None),
    (InvalidRequestError, 400, "invalid_value", None),
    (ConfigError, 400, "unsupported_by_model", None),
    (ResourceError, 400, "too_large", None),
    (QueueFullError, 429, "queue_full", RETRY_S),
    (RequestTimeoutError, 504, "deadline_exceeded", None),
    (RequestAbortedError, 499, "request_aborted", None),
    (SchedulerError, 503, "unavailable", RETRY_S),
)
BEFORE_WORK = frozenset({ResourceError})  # once work has begun it is the server's fault
ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
FOLDERS = re.compile(r"(?<![\w:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|:,;()]+[/\\])+")
FIELD = re.compile(r"^(?:stage '[^']*': )?([a-z_]\w*(?:\.[a-z_]\w*|\[[^\]]{1,40}\])*): ")


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


def client_gone() -> ApiError:
    """What is raised in place of an answer: nobody reads it but the log."""
    return ApiError(499, "the client closed the connection", code="request_aborted")


def error_of(output: OmniOutput) -> ApiError | None:
    """What a final output that has an error is answered with."""
    if output.error is None:
        return None
    return as_api_error(output.error, was_admitted=output.status is not RequestStatus.REJECTED)


def as_api_error(error: Exception, *, was_admitted: bool = False) -> ApiError:
    """The answer that says what went wrong. was_admitted: whether work had begun."""
    if isinstance(error, ApiError):
        return error
    error = _cause_in_media(error) or error
    message = str(error) or type(error).__name__
    if not isinstance(error, OmniError):
        return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
    if isinstance(error, StageUnavailableError):
        return ApiError(503, message, code="stage_rebuilding", retry_s=max(error.retry_after_s, MIN_RETRY_S))
    for kind, status, code, retry_s in ANSWERS:
        if isinstance(error, kind) and not (kind in BEFORE_WORK and was_admitted):
            param = _field_of(message) if status == 400 else None
            return ApiError(status, message, code=code, param=param, retry_s=retry_s)
    if was_admitted:
        return ApiError(500, message, code="stage_failed")
    return ApiError(503, message, code="unavailable", retry_s=RETRY_S)


def _cause_in_media(error: BaseException | None) -> UnreadableMediaError | None:
    """What a stage failed of, where that is a medium that the request brought."""
    while isinstance(error, StageError):
        error = error.__cause__
    return error if isinstance(error, UnreadableMediaError) else None


def scrubbed(message: str) -> str:
    """Without addresses in memory, and of paths only the last part."""
    return FOLDERS.sub("", ADDRESS.sub("0x...", message)).encode("utf-8", "backslashreplace").decode()


def _field_of(message: str) -> str | None:
    """The field that an error of ours begins with: 'max_tokens: got ...'."""
    found = FIELD.match(message)
    return found.group(1) if found else None
