"""What routes of jobs answer alike: pages of them, and their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Query
from starlette.responses import FileResponse, Response

from vllm_omni.entrypoints.server.answers.encoding import AUDIO_TYPES, IMAGE_TYPES, VIDEO_TYPES
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.jobs import Job

POLL_HEADERS = {"openai-poll-after-ms": "500"}  # how long clients wait before they ask again
TYPES = {**VIDEO_TYPES, **IMAGE_TYPES, **AUDIO_TYPES}
After = Annotated[str | None, Query(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def page_of(
    jobs: Sequence[Job], describe: Callable[[Job], dict[str, Any]], after: str | None, limit: int, order: str
) -> dict[str, Any]:
    """jobs: oldest first. Those from behind the job `after` on, in that order; ApiError 400 where it is none of
    them.
    """
    jobs = jobs[::-1] if order == "desc" else jobs
    if after is not None:
        found = [index for index, job in enumerate(jobs) if job.id == after]
        if not found:
            raise ApiError(400, f"after: got {after!r}, which is no job", code="invalid_value", param="after")
        jobs = jobs[found[0] + 1 :]
    data = [describe(job) for job in jobs[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}


def file_of(job: Job, index: int) -> Response:
    """One of the files of a completed job, or the range of it that the request asks for; ApiError 404 and 409."""
    if job.status != "completed":
        raise ApiError(409, f"job {job.id!r} is {job.status.replace('_', ' ')}", code="job_not_completed")
    if index >= len(job.files):
        raise ApiError(404, f"index: got {index}, but the job has {len(job.files)} files", code="file_not_found")
    path = job.files[index]
    if not path.is_file():
        raise ApiError(404, f"index: file {index} of the job has been deleted", code="file_not_found")
    return FileResponse(path, media_type=TYPES[path.suffix[1:]], filename=path.name)
