"""What the caller sees of a request: its output stages' text, PIL images, sounds, videos and tensors, piece by piece
while they are made and whole at the end. All of it is the caller's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_omni.core.routing.request_state import RequestEnd
from vllm_omni.engine.boundary import clear_frames, stage_boundary
from vllm_omni.errors import InvalidRequestError, OmniError, RequestAbortedError, RequestTimeoutError, StageError
from vllm_omni.media.audio import Audio
from vllm_omni.media.video import Video
from vllm_omni.messages import StageProgress, StageRows
from vllm_omni.payload import StagePayload
from vllm_omni.request import Completion, OmniOutput, Progress, RequestStatus, StageResult
from vllm_omni.utils.checks import check_number

IMAGE_PORT = "image"
AUDIO_PORT = "audio"
VIDEO_PORT = "video"
SOUNDTRACK_PORT = "soundtrack"


def make_output(end: RequestEnd, unfinished: Mapping[str, StageResult] | None = None) -> OmniOutput:
    """The final OmniOutput; what a request that failed did finish is given as well, and what it had made of the rest
    (unfinished: by stage). A caller who keeps its error keeps no engine by that.
    """
    output = _output_of(end, unfinished or {})
    if output.error is not None:
        clear_frames(output.error)
    return output


class PartialOutputs:
    """The partial outputs of one request, to be made in the order of its events: it counts the samples of each stage,
    and knows how far each is.

    outputs: the entries of the config's `outputs` that the caller gets. steps: whether a step that made nothing for the
    caller has an output, which says how far the stages are.
    """

    def __init__(self, outputs: Sequence[str], steps: bool = True) -> None:
        self._outputs = outputs
        self._steps = steps
        self._given: dict[str, list[_Given]] = {}  # by stage, of each sample
        self._pieces: dict[str, list[Audio]] = {}
        self._num_samples: dict[str, int] = {}
        self._progress: dict[str, Progress] = {}

    def make(self, event: StageProgress | StageRows, stage: str) -> OmniOutput | None:
        """A RUNNING output: how far the stages are, previews where the request asks for them and, where `outputs` lists
        the stage itself, what it has newly written, or the sound that it has newly made. None for what the caller does
        not get; StageError for rows that are no sound.
        """
        if isinstance(event, StageProgress):
            return self._step(event, stage)
        if event.port != AUDIO_PORT or stage not in self._outputs or not event.rows.numel():
            return None
        return self._sound(event, stage)

    def finished(self, payload: StagePayload, stage: str) -> OmniOutput | None:
        """A RUNNING output with what a stage has made, where `outputs` lists it and it made something that was not
        given in pieces: pictures, audio, videos, what the pieces of its texts left out. StageError for what cannot be
        shown.
        """
        if stage in self._progress:
            num_steps = self._progress[stage].step
            self._progress[stage] = Progress(num_steps, num_steps)
        if stage not in self._outputs:
            return None
        made = make_result(payload)
        given = self._given.pop(stage, [])
        given += [_Given() for _ in made.completions[len(given) :]]
        rests = tuple(pieces.rest(whole) for pieces, whole in zip(given, made.completions, strict=True))
        made = dataclasses.replace(made, completions=rests if any(map(_is_new, rests)) else ())
        if self._pieces.pop(stage, None) is not None:
            made = dataclasses.replace(made, audios=())
        if not (made.completions or made.images or made.audios or made.videos):
            return None
        return OmniOutput(
            request_id=payload.request_id,
            status=RequestStatus.RUNNING,
            results={stage: made},
            progress=dict(self._progress),
        )

    @property
    def progress(self) -> Mapping[str, Progress]:
        """How far the stages are that have begun. From any thread."""
        return dict(self._progress)

    def given(self, stage: str) -> StageResult | None:
        """What the pieces of a stage that is not finished come to; None without any."""
        texts, pieces = self._given.get(stage, ()), self._pieces.get(stage)
        audios: tuple[Audio, ...] = ()
        if pieces:
            samples = np.concatenate([piece.samples for piece in pieces], axis=1)
            audios = (Audio(samples, pieces[0].sample_rate),)
        completions = tuple(text.joined() for text in texts)
        return StageResult(completions, audios=audios) if completions or audios else None

    def _step(self, event: StageProgress, stage: str) -> OmniOutput | None:
        if not isinstance(event.text, str):
            raise StageError(f"stage {stage!r}: new text is {type(event.text).__name__}, expected str")
        check_number(f"stage {stage!r}: step", event.step, 0, integer=True, raises=StageError)
        check_number(f"stage {stage!r}: num_steps", event.num_steps, 0, integer=True, raises=StageError)
        self._progress[stage] = Progress(event.step, event.num_steps)
        is_text = stage in self._outputs and bool(event.text or event.token_ids)
        if is_text:
            self._note(event, stage)
        result = StageResult(
            completions=_pieces(event) if is_text else (),
            previews=() if event.previews is None else to_images(event.previews, stage),
        )
        has_result = bool(result.completions or result.previews)
        if not has_result and not self._steps:
            return None
        return OmniOutput(
            request_id=event.request_id,
            status=RequestStatus.RUNNING,
            results={stage: result} if has_result else {},
            metrics={stage: {"step": event.step, "num_steps": event.num_steps}},
            progress=dict(self._progress),
        )

    def _note(self, event: StageProgress, stage: str) -> None:
        given = self._given.setdefault(stage, [_Given() for _ in range(event.num_samples)])[event.sample]
        given.text += event.text
        given.token_ids += event.token_ids
        given.logprobs += event.logprobs or ()
        given.end = event.finish_reason

    def _sound(self, event: StageRows, stage: str) -> OmniOutput:
        if event.rows.dim() != 2:
            raise StageError(f"stage {stage!r}: rows of audio are {list(event.rows.shape)}, expected [n, channels]")
        start = self._num_samples.get(stage, 0)
        self._num_samples[stage] = start + len(event.rows)
        audios = to_audios(event.rows.T[None], event.meta.get("sample_rate"), stage, start)
        self._pieces.setdefault(stage, []).extend(audios)
        return OmniOutput(
            request_id=event.request_id,
            status=RequestStatus.RUNNING,
            results={stage: StageResult(audios=audios)},
            progress=dict(self._progress),
        )


@dataclass(slots=True)
class _Given:
    """What the pieces of one sample's text came to."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, float]] = field(default_factory=list)
    end: str | None = None  # its finish reason, once it was given

    def rest(self, whole: Completion) -> Completion:
        """What the pieces left out."""
        num_tokens = len(self.token_ids)
        reason = None if self.end is not None else whole.finish_reason
        logprobs = None if whole.logprobs is None else whole.logprobs[num_tokens:]
        return Completion(whole.text[len(self.text) :], whole.token_ids[num_tokens:], reason, logprobs)

    def joined(self) -> Completion:
        logprobs = tuple(self.logprobs) if self.logprobs else None
        return Completion(self.text, tuple(self.token_ids), self.end, logprobs)


def _is_new(rest: Completion) -> bool:
    return bool(rest.text or rest.token_ids or rest.finish_reason)


def _pieces(event: StageProgress) -> tuple[Completion, ...]:
    """What is new of every sample: of all but one nothing."""
    news = Completion(event.text, event.token_ids, event.finish_reason, event.logprobs)
    nothing = Completion("", (), None, None if event.logprobs is None else ())
    return tuple(news if number == event.sample else nothing for number in range(event.num_samples))


def make_result(payload: StagePayload) -> StageResult:
    """Text from meta "completions" (the fields of a Completion each; else a bare "text"), images from the tensor
    "image", sounds from the tensor "audio" and meta "sample_rate", videos from the tensor "video" and meta "fps", the
    sound that goes with each from the tensor "soundtrack" and meta "sample_rate".

    image: uint8 [N, H, W, 3]. audio, soundtrack: floating [N, channels, n]. video: uint8 [N, n, H, W, 3].
    """
    completions = payload.meta.get("completions")
    if completions is None and "text" in payload.meta:
        completions = [payload.meta]
    images, frames = payload.tensors.get(IMAGE_PORT), payload.tensors.get(VIDEO_PORT)
    sounds, tracks = (
        () if tensor is None else to_audios(tensor, payload.meta.get("sample_rate"), payload.source)
        for tensor in (payload.tensors.get(AUDIO_PORT), payload.tensors.get(SOUNDTRACK_PORT))
    )
    return StageResult(
        completions=tuple(_completion(item) for item in completions or ()),
        images=() if images is None else to_images(images, payload.source),
        audios=sounds,
        videos=() if frames is None else to_videos(frames, payload.meta.get("fps"), payload.source, tracks),
    )


def to_images(pixels: Tensor, stage: str) -> tuple[Image.Image, ...]:
    """pixels: uint8 [n, H, W, 3], any device -> n RGB images."""
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[-1] != 3:
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise StageError(f"stage {stage!r}: image is {got}, expected torch.uint8 [n, H, W, 3]")
    return tuple(Image.fromarray(array) for array in pixels.detach().cpu().contiguous().numpy())


def to_audios(sounds: Tensor, sample_rate: object, stage: str, start: int = 0) -> tuple[Audio, ...]:
    """sounds: floating [N, channels, n], any device; sample_rate: Hz; start: as Audio's -> N sounds. StageError for
    other tensors, for a rate that is none, and for samples that are not finite.
    """
    if not sounds.is_floating_point() or sounds.dim() != 3:
        got = f"{sounds.dtype} {list(sounds.shape)}"
        raise StageError(f"stage {stage!r}: audio is {got}, expected floating point [N, channels, n]")
    owned = sounds.detach().to("cpu", torch.float32, copy=True).contiguous()
    try:
        return tuple(Audio(array, sample_rate, start) for array in owned.numpy())  # type: ignore[arg-type]
    except InvalidRequestError as error:
        raise StageError(f"stage {stage!r}: audio: {error}") from error


def to_videos(frames: Tensor, fps: object, stage: str, tracks: Sequence[Audio] = ()) -> tuple[Video, ...]:
    """frames: uint8 [N, n, H, W, 3], any device; fps: frames per second; tracks: the sound of each, or none -> N
    videos. StageError for other tensors, and for a rate that is none.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3:
        got = f"{frames.dtype} {list(frames.shape)}"
        raise StageError(f"stage {stage!r}: video is {got}, expected torch.uint8 [N, n, H, W, 3]")
    owned = frames.detach().to("cpu", copy=True).contiguous().numpy()
    sounds: Sequence[Audio | None] = tracks or [None] * len(owned)
    try:
        return tuple(Video(video, fps, sound) for video, sound in zip(owned, sounds, strict=True))  # type: ignore[arg-type]
    except (InvalidRequestError, ValueError) as error:
        raise StageError(f"stage {stage!r}: video: {error}") from error


def unfinished_result(
    stage: str, payload: StagePayload | None, partials: PartialOutputs | None = None
) -> StageResult | None:
    """What a stage had made when its request ended: of the payload that says it, else what its pieces came to."""
    if payload is not None:
        try:
            with stage_boundary(stage):
                return make_result(payload)
        except OmniError:  # it was not finished, and need not be whole
            pass
    return None if partials is None else partials.given(stage)


def _output_of(end: RequestEnd, unfinished: Mapping[str, StageResult]) -> OmniOutput:
    results: dict[str, StageResult] = {}
    tensors: dict[str, Tensor] = {}
    status, error = end.status, end.error
    for entry in end.outputs:
        stage, _, port = entry.partition(".")
        payload = end.payloads.get(stage)
        if payload is None:
            if entry in unfinished:
                results[stage] = _ended(unfinished[stage], end.error)
            continue
        try:
            with stage_boundary(stage):
                if not port:
                    results[stage] = make_result(payload)
                elif port in payload.tensors:
                    tensors[entry] = payload.tensors[port].detach().clone()
                else:
                    raise StageError(f"stage {stage!r} gave no {port!r}, which `outputs` lists")
        except OmniError as failure:
            status, error = RequestStatus.FAILED, error or failure
    return OmniOutput(
        request_id=end.request.request_id,
        status=status,
        results=results,
        tensors=tensors,
        metrics=end.metrics,
        params=end.params,
        error=error,
    )


def _ended(result: StageResult, error: OmniError | None) -> StageResult:
    """The same, its texts that were still being written ended by the error."""
    reason = "error"
    if isinstance(error, RequestTimeoutError | RequestAbortedError):
        reason = "timeout" if isinstance(error, RequestTimeoutError) else "abort"
    completions = (
        dataclasses.replace(completion, finish_reason=completion.finish_reason or reason)
        for completion in result.completions
    )
    return dataclasses.replace(result, completions=tuple(completions))


def _completion(item: Mapping[str, Any]) -> Completion:
    """logprobs: for every position its [token, log probability] pairs."""
    logprobs, text = item.get("logprobs"), item["text"]
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}, expected str")
    return Completion(
        text=text,
        token_ids=tuple(item.get("token_ids", ())),
        finish_reason=item.get("finish_reason"),
        logprobs=None if logprobs is None else tuple(dict(position) for position in logprobs),
        note=item.get("note"),
    )
