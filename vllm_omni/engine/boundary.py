"""The stage boundary: the one place where anything that a stage raises becomes a StageError with its cause."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_omni.errors import OmniError, ResourceError, StageError
from vllm_omni.utils.device import is_out_of_memory

if TYPE_CHECKING:
    from vllm_omni.engine.base import StageEngine
    from vllm_omni.payload import StagePayload

FIX_MEMORY = "ask for less at once: a smaller picture, a shorter prompt, fewer outputs or requests"


@contextmanager
def stage_boundary(stage: str) -> Iterator[None]:
    """Lets an OmniError through and turns any other exception into a StageError."""
    try:
        yield
    except OmniError:
        raise
    except Exception as error:
        raise stage_error(stage, error) from error


def stage_error(stage: str, cause: Exception) -> StageError:
    """A StageError that names the stage; one that already does stays as it is. The cause keeps its lines, but lets go
    of its frames' tensors. Where memory could not be had, the cause is a ResourceError that says so.
    """
    clear_frames(cause)
    prefix = f"stage {stage!r} failed: "
    if isinstance(cause, StageError) and str(cause).startswith(prefix):
        return cause
    if is_out_of_memory(cause) and not isinstance(cause, OmniError):
        lacking = ResourceError(f"out of memory: {describe(cause)}; {FIX_MEMORY}")
        lacking.__cause__, cause = cause, lacking
    error = StageError(prefix + describe(cause))
    error.__cause__ = cause
    return error


def as_stage_error(stage: str, cause: Exception) -> OmniError:
    """An OmniError as it is, anything else as a StageError."""
    return cause if isinstance(cause, OmniError) else stage_error(stage, cause)


def made_so_far(engine: StageEngine, request_id: str) -> StagePayload | None:
    """What a task of an engine that may be broken has made; None where it cannot say."""
    try:
        return engine.partial_result(request_id)
    except Exception:
        return None


def clear_frames(error: BaseException) -> None:
    """Clears the frames that an error, and those that it was raised from, went through: who keeps it keeps its lines,
    but no engine and no tensor. Frames that still run stay as they are, and so does what the caller was handling.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or (link.__context__ if link.__suppress_context__ else None)


def describe(error: BaseException) -> str:
    """The message alone for our own errors, 'ValueError: message' for others."""
    text = str(error)
    if isinstance(error, OmniError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
