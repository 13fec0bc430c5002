"""The exceptions of vllm_omni. Messages say what was got, what was expected and how to fix it.

OmniError
|- ConfigError             a YAML file, an override or a checkpoint's configuration is wrong
|- CheckpointError         weights or side files are missing, left over, misshapen or damaged
|- InvalidRequestError     a prompt or a parameter is out of bounds (also a ValueError)
|  `- UnreadableMediaError a picture, a sound or a video of a request cannot be read, which may show only in a stage
|- SchedulerError          a request could not be admitted or was used wrongly
|  |- QueueFullError       the waiting queue is at `max_queue_size`
|  |- RequestTimeoutError  the request's deadline passed
|  `- RequestAbortedError  the caller gave the request up
|- CacheError              a KV block or a step cache was misused
|- ResourceError           memory does not suffice, now or ever
`- StageError              a stage failed while it worked on a request; `__cause__` holds why
   |- DataLostError        what another stage had made for it is gone with the machine that held it
   `- StageUnavailableError  the stage is being rebuilt after a failure; `retry_after_s` says when to ask again
"""

from __future__ import annotations

MAX_MESSAGE = 2_000


class OmniError(Exception):
    """Base of everything that this package raises on purpose. Its message can be printed, and is never long."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_printable(item) if isinstance(item, str) else item for item in args))


class ConfigError(OmniError):
    """A stage config, an override or a model's configuration file is wrong."""


class CheckpointError(OmniError):
    """A checkpoint folder lacks a file or a tensor, or holds one that does not fit."""


class InvalidRequestError(OmniError, ValueError):
    """A prompt or a parameter is out of bounds; nothing has been computed for the request."""


class UnreadableMediaError(InvalidRequestError):
    """A picture, a sound or a video that a request brings is damaged, of a wrong kind or beyond the limits. What shows
    only when it is decoded is the `__cause__` of the StageError that ends the request.
    """


class SchedulerError(OmniError):
    """A request could not be admitted, or the scheduler was used in a state that does not allow it."""


class QueueFullError(SchedulerError):
    """The scheduler already holds `max_queue_size` requests."""


class RequestTimeoutError(SchedulerError):
    """The request's deadline passed before it was done."""


class RequestAbortedError(SchedulerError):
    """The request was given up before it was done."""


class CacheError(OmniError):
    """A KV block or a step cache was used in a state that does not allow it."""


class ResourceError(OmniError):
    """Memory does not suffice."""


class StageError(OmniError):
    """A stage failed while it worked on this request."""


class DataLostError(StageError):
    """What another stage had made of a request is gone, with the machine that held it."""


class StageUnavailableError(StageError):
    """A stage is being rebuilt after a failure, and takes no task meanwhile. retry_after_s: when it may again."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def _printable(message: str) -> str:
    """Characters that no encoding has are escaped, and the middle of a long message is left out."""
    if len(message) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2 - 20
        message = f"{message[:half]} [...{len(message) - 2 * half} more...] {message[-half:]}"
    return message.encode("utf-8", "backslashreplace").decode("utf-8")
