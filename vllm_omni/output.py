"""The answer to a request on its way out (OmniOutput), and what it holds. Knows no stage and no engine."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.params import StageParams
from vllm_omni.utils.files import check_suffix

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vllm_omni.media.audio import Audio
    from vllm_omni.media.video import Video


class RequestStatus(enum.Enum):
    """Where a request is; the last four are final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"
    REJECTED = "rejected"

    @property
    def is_final(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled text."""

    text: str
    token_ids: tuple[int, ...]
    # stop, or length where it reached max_tokens or another limit, which `note` names; abort, timeout or error where
    # the request ended first; None of a piece
    finish_reason: str | None
    # of every output position: token id -> log probability, the chosen token first
    logprobs: tuple[Mapping[int, float], ...] | None = None
    note: str | None = None  # which limit ended it that the request did not ask for; of final outputs


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one stage named in `outputs` gives to the caller."""

    completions: tuple[Completion, ...] = ()
    images: tuple[Image, ...] = ()
    audios: tuple[Audio, ...] = ()
    videos: tuple[Video, ...] = ()
    previews: tuple[Image, ...] = ()  # of a partial output: what the pictures of all samples look like so far


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running stage is: denoising steps of all its outputs, or tokens of the most that it may write."""

    step: int  # done
    num_steps: int  # known of; of a stage whose input comes in chunks, those of the chunks that have come


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniOutput:
    """The answer to a request: partial (`finished` False, only in streams) or final. A final one with an error holds
    what was made until then: texts as far as they were written, the beginning of audio, finished pictures and videos.

    A partial one holds what is new: of a stage that writes always its n completions, in their order, empty where a
    sample has nothing new. Joined, their texts, tokens and log probabilities are those of the final output;
    `finish_reason` stands where a sample ends.

    The metrics of a stage: queued_s, ran_s, started_s (after admission), first_rows_s (after the stage's start, where
    it gives its rows as they are made), seed (of a stage that draws), steps, tokens, prompt_tokens, cached_tokens (of
    the prompt), truncated_tokens (where it was cut), cache_hits and what else it counts; skipped (True) and reason of a
    stage that a condition kept from running.
    """

    request_id: str
    status: RequestStatus
    results: Mapping[str, StageResult] = field(default_factory=dict)  # by stage, as the config's `outputs` name them
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by "stage.port"
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by stage
    progress: Mapping[str, Progress] = field(default_factory=dict)  # of a partial output, by stage that has begun
    params: Mapping[str, StageParams] = field(default_factory=dict)  # by stage that is done, defaults filled in
    error: OmniError | None = None  # why there is no (whole) result

    @property
    def finished(self) -> bool:
        return self.status.is_final

    @property
    def images(self) -> list[Image]:
        return [image for result in self.results.values() for image in result.images]

    @property
    def audios(self) -> list[Audio]:
        return [audio for result in self.results.values() for audio in result.audios]

    @property
    def videos(self) -> list[Video]:
        return [video for result in self.results.values() for video in result.videos]

    @property
    def previews(self) -> list[Image]:
        return [preview for result in self.results.values() for preview in result.previews]

    @property
    def completions(self) -> list[Completion]:
        """Every sampled text, stage by stage."""
        return [completion for result in self.results.values() for completion in result.completions]

    @property
    def text(self) -> str | None:
        return self.completions[0].text if self.completions else None

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        return self.completions[0].token_ids if self.completions else None

    @property
    def logprobs(self) -> tuple[Mapping[int, float], ...] | None:
        return self.completions[0].logprobs if self.completions else None

    @property
    def finish_reason(self) -> str | None:
        return self.completions[0].finish_reason if self.completions else None

    @property
    def seed(self) -> int | None:
        """What the first stage of `results` that draws has drawn from, else any other; None where none has. Given as
        the parameters' seed, it makes the same again; sample i alone is made by seed + i.
        """
        seeds = (self.metrics.get(stage, {}).get("seed") for stage in (*self.results, *self.metrics))
        return next((seed for seed in seeds if seed is not None), None)

    def _repr_html_(self) -> str:
        """For notebooks: texts, pictures, sounds and videos to play, the error."""
        from vllm_omni.utils.notebook import output_html

        return output_html(self)

    def plot_timeline(self, path: str | Path) -> None:
        """Writes a `.png`: when each stage waited and worked, and where its first rows came; of a final output whose
        request was admitted.

        InvalidRequestError for another suffix and for an output without such times, OSError when the file cannot be
        written.
        """
        from vllm_omni.utils.plots.timeline_plot import draw_timeline

        if not self.finished or not self.metrics:
            raise InvalidRequestError(
                f"plot_timeline: got an output that is {self.status.value} and has no times of stages, expected the "
                "final one of a request that ran"
            )
        path = Path(path).expanduser()
        check_suffix(path, (".png",))
        draw_timeline(self.metrics, path)
