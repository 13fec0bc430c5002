"""Requests that go on without their caller: queued, watched, fetched, deleted. Owns their tasks and files."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error
from vllm_omni.entrypoints.server.http.client import Begun, cancel
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.request import OmniOutput, Progress

Encode = Callable[
    [OmniOutput], Awaitable[Sequence[tuple[bytes, str]]]
]  # -> (a file's bytes, its suffix) of each result


@dataclass(slots=True, eq=False)
class Job:
    """Times are seconds since 1970."""

    run: Run
    kind: str  # "image", "audio" or "video"
    id: str
    facts: dict[str, Any]  # what its route says of it besides; whoever encodes its result may correct them
    created: float = field(default_factory=time.time)
    completed: float | None = None
    status: str = "queued"  # "in_progress", "completed", "failed"
    steps: dict[str, Progress] = field(default_factory=dict)  # by stage that has begun
    files: Sequence[Path] = ()  # that are there, or being written
    is_deleted: bool = False  # whoever still writes its files deletes them
    error: ApiError | None = None
    task: asyncio.Task[None] | None = None
    expires: float | None = None

    @property
    def progress(self) -> int:
        """0 to 100: steps done of those that are known of, 100 only when the files are there."""
        if self.status == "completed":
            return 100
        known = self.steps.values()
        total = sum(at.num_steps for at in known)
        return 0 if not total else min(99, 100 * sum(min(at.step, at.num_steps) for at in known) // total)

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "job",
            "kind": self.kind,
            "status": self.status,
            "progress": self.progress,
            "created_at": int(self.created),
            "completed_at": None if self.completed is None else int(self.completed),
            "expires_at": None if self.expires is None else int(self.expires),
            "model": self.run.model.name,
            "num_files": len(self.files) if self.status == "completed" else 0,
            "error": None if self.error is None else {"code": self.error.code, "message": self.error.message},
        }


class JobStore:
    """Jobs by id, the newest last. Nothing of them outlives the server, but for files in a folder of the user's."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._folder: Path | None = None

    def start(
        self,
        run: Run,
        kind: str,
        parts: Begun[OmniOutput],
        encode: Encode,
        facts: dict[str, Any] | None = None,
    ) -> Job:
        """ApiError 429 where too many are kept and none of them has ended."""
        self._drop_expired()
        if len(self._jobs) >= self._settings.max_jobs:
            oldest = next((job for job in self._jobs.values() if job.status in ("completed", "failed")), None)
            if oldest is None:
                limit = self._settings.max_jobs
                raise ApiError(429, f"{limit} jobs are running (--max-jobs)", code="too_many_jobs", retry_s=10.0)
            self._forget(oldest)
        job = self._jobs[f"job-{run.id}"] = Job(run, kind, f"job-{run.id}", facts or {})
        job.task = asyncio.ensure_future(self._work(job, parts, encode))
        return job

    def find(self, job_id: str) -> Job:
        """ApiError 404 for one that is not known, or no longer."""
        self._drop_expired()
        job = self._jobs.get(job_id)
        if job is None:
            raise ApiError(404, f"job {job_id!r:.80} is unknown, or has expired", code="job_not_found")
        return job

    def all(self) -> list[Job]:
        self._drop_expired()
        return list(self._jobs.values())

    async def delete(self, job: Job) -> None:
        """Aborts it where it runs, and deletes its files."""
        if job.task is not None:
            await cancel(job.task)
        self._forget(job)

    async def close(self) -> None:
        """Aborts what runs; a temporary folder goes with all that is in it."""
        await cancel(*(job.task for job in self._jobs.values() if job.task is not None))
        if self._folder is not None and self._settings.files is None:
            await asyncio.to_thread(shutil.rmtree, self._folder, True)

    async def _work(self, job: Job, parts: Begun[OmniOutput], encode: Encode) -> None:
        try:
            async with aclosing(parts):
                async for output in parts:
                    job.status = "in_progress"
                    job.steps.update(output.progress)
                    if output.finished:
                        await self._write(job, await encode(output))
            job.status = "completed"
        except Exception as error:
            job.status, job.error = "failed", as_api_error(error)
        finally:
            job.completed = time.time()
            job.expires = job.completed + self._settings.job_lifetime_s

    async def _write(self, job: Job, contents: Sequence[tuple[bytes, str]]) -> None:
        folder = self._folder_of_files()
        job.files = [folder / f"{job.id}-{index}.{suffix}" for index, (_, suffix) in enumerate(contents)]
        await asyncio.to_thread(_write_files, job, [content for content, _ in contents])

    def _folder_of_files(self) -> Path:
        if self._folder is None:
            if self._settings.files is not None:
                self._folder = self._settings.files.expanduser()
                self._folder.mkdir(parents=True, exist_ok=True)
            else:
                self._folder = Path(tempfile.mkdtemp(prefix="vllm-omni-jobs-"))
        return self._folder

    def _forget(self, job: Job) -> None:
        job.is_deleted = True
        for path in job.files:
            path.unlink(missing_ok=True)
        self._jobs.pop(job.id, None)

    def _drop_expired(self) -> None:
        now = time.time()
        for job in list(self._jobs.values()):
            if job.expires is not None and job.expires <= now:
                self._forget(job)


def _write_files(job: Job, contents: Sequence[bytes]) -> None:
    """All of them, or none: also where the disk is full, or the job is deleted meanwhile."""
    is_whole = False
    try:
        for path, content in zip(job.files, contents, strict=True):
            path.write_bytes(content)
        is_whole = True
    finally:
        if job.is_deleted or not is_whole:
            for path in job.files:
                path.unlink(missing_ok=True)
