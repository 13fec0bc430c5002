"""Reads what a request asks of ACE-Step from its keys, and checks it. Reads headers of audio, decodes none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import check_audio
from vllm_omni.models.ace_step.audio_codes import find_codes, is_codes_alone
from vllm_omni.models.ace_step.geometry import MusicGeometry
from vllm_omni.models.ace_step.prompt.musical_facts import (
    listed,
    read_bpm,
    read_keyscale,
    read_language,
    read_timesignature,
)
from vllm_omni.models.ace_step.prompt.options import MusicPromptOptions
from vllm_omni.models.ace_step.request import MusicOutline, MusicRequest, MusicSources
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, check_number, did_you_mean

TASKS = ("text2music", "cover", "repaint")
OTHER_TASKS = ("extract", "lego", "complete")  # of the reference, for its base model alone


class MusicRequestReader:
    """Reads requests for one stage. reads: its output ports that somebody reads."""

    def __init__(
        self, geometry: MusicGeometry, options: MusicPromptOptions, limits: LimitsConfig, reads: ReadPorts
    ) -> None:
        self._geometry = geometry
        self._limits = limits
        self._reads = reads
        self._default_duration_s = options.default_duration_s
        self._min_duration_s = options.min_duration_s or 0.0
        self._is_planned = "planner_prompt" in reads  # a language model writes audio codes
        own = options.max_duration_s
        self._max_duration_s = limits.max_duration_s if own is None else min(own, limits.max_duration_s)
        self._duration_key = "limits.max_duration_s" if own != self._max_duration_s else "the stage's max_duration_s"

    def read(self, request: OmniRequest, params: DiffusionParams, prompt: object) -> MusicRequest:
        """prompt: the words that describe the music. InvalidRequestError for whatever is out of bounds, missing, or of
        no use to the task.
        """
        caption = read_caption(prompt, self._limits)
        fields = {key: value for key, value in request.fields.items() if value is not None}
        sources = MusicSources.of(fields)
        task = self._task(sources.task_type)
        self._check_sources(task, sources)
        source_s = self._audio_s("audio", fields)
        self._audio_s("reference_audio", fields)
        codes = self._codes(fields)
        duration_s = self._duration_s(fields, params, source_s, codes)
        has_codes = self._is_planned or bool(codes)
        start, end = self._window(task, fields, duration_s)
        acting = "cover" if task == "text2music" and has_codes else task
        return MusicRequest(
            caption=caption,
            lyrics=_text("lyrics", fields.get("lyrics", ""), self._limits),
            language=read_language(fields.get("vocal_language", "en")),
            instruction=self._instruction(fields),
            bpm=read_bpm(fields.get("bpm")),
            keyscale=read_keyscale(fields.get("keyscale")),
            timesignature=read_timesignature(fields.get("timesignature")),
            audio=fields.get("audio"),
            reference_audio=fields.get("reference_audio"),
            audio_codes=codes,
            outline=MusicOutline(
                task_type=acting,
                duration_s=duration_s,
                num_frames=self._geometry.num_frames(duration_s),
                cover_strength=_strength(acting, fields),
                repaint_frames=self._repaint_frames(start, end) if task == "repaint" else None,
                has_source_audio=sources.has_audio,
                has_reference_audio=sources.has_reference_audio,
                has_audio_codes=has_codes,
            ),
        )

    def _task(self, task: Any) -> str:
        if task in OTHER_TASKS:
            raise InvalidRequestError(f"task_type: got {task!r}, which is not supported; expected {listed(TASKS)}")
        if task not in TASKS:
            near = did_you_mean(task[:80], TASKS) if isinstance(task, str) else ""
            raise InvalidRequestError(f"task_type: got {brief(task)}, expected {listed(TASKS)}{near}")
        if self._is_planned and task != "text2music":
            raise InvalidRequestError(
                f"task_type: got {task!r}, but a language model plans the sounds of this config, which is for "
                "'text2music'; use a config without it, such as ace_step"
            )
        return str(task)

    def _check_sources(self, task: str, sources: MusicSources) -> None:
        """Whether the task has the audio that it needs, and none that nobody would hear."""
        for key, port, is_given in (
            ("audio", "source_audio", sources.has_audio),
            ("reference_audio", "reference_audio", sources.has_reference_audio),
            ("audio_codes", "audio_codes", sources.has_audio_codes),
        ):
            if is_given and port not in self._reads:
                raise InvalidRequestError(f"{key}: no stage of this config reads it (the port {port!r}); leave it out")
        if sources.has_audio and task == "text2music":
            raise InvalidRequestError("audio: task_type 'text2music' reads none; set task_type to 'cover' or 'repaint'")
        if sources.has_audio and sources.has_audio_codes:
            raise InvalidRequestError("audio_codes: got them beside audio, expected one of the two")
        if task == "repaint" and not sources.has_audio:
            raise InvalidRequestError("task_type: 'repaint' needs the sound to be changed; give it as 'audio'")
        if task == "cover" and not sources.has_audio and not sources.has_audio_codes:
            raise InvalidRequestError("task_type: 'cover' needs 'audio' or 'audio_codes'; give one of them")

    def _audio_s(self, key: str, fields: Mapping[str, Any]) -> float | None:
        """Seconds of the audio that the request brings, from its header."""
        if key not in fields:
            return None
        duration_s = check_audio(fields[key], channels=self._geometry.channels, limits=self._limits, name=key)
        if duration_s < self._geometry.frame_s:
            raise InvalidRequestError(
                f"{key}: got {duration_s:.6f} s, expected at least {self._geometry.frame_s:.6f} s, one latent frame"
            )
        return duration_s

    def _codes(self, fields: Mapping[str, Any]) -> str:
        if "audio_codes" not in fields:
            return ""
        codes = _text("audio_codes", fields["audio_codes"], self._limits)
        if not is_codes_alone(codes):
            raise InvalidRequestError(
                f"audio_codes: got {brief(codes)}, expected codes alone, as '<|audio_code_12|><|audio_code_345|>'"
            )
        return codes

    def _duration_s(
        self, fields: Mapping[str, Any], params: DiffusionParams, source_s: float | None, codes: str
    ) -> float:
        """As given, else the length of what the request brings: a result is as long as its source."""
        given = _given_duration_s(fields, params)
        tolerance_s = self._geometry.frame_s
        if codes:
            source_s, tolerance_s = len(find_codes(codes)) * self._geometry.code_s, self._geometry.code_s
        if given is not None and source_s is not None and abs(given - source_s) >= tolerance_s:
            raise InvalidRequestError(
                f"duration_s: got {given:g}, but {'the codes last' if codes else 'the source lasts'} {source_s:.2f} s, "
                "and the result is as long; leave duration_s out"
            )
        duration_s: float = next(value for value in (given, source_s, self._default_duration_s) if value is not None)
        if duration_s > self._max_duration_s:
            raise InvalidRequestError(
                f"duration_s: got {duration_s:g}, expected at most {self._max_duration_s:g} ({self._duration_key})"
            )
        if duration_s < self._min_duration_s:
            raise InvalidRequestError(
                f"duration_s: got {duration_s:g}, expected at least {self._min_duration_s:g} "
                "(the stage's min_duration_s)"
            )
        return duration_s

    def _window(self, task: str, fields: Mapping[str, Any], duration_s: float) -> tuple[float, float | None]:
        """The part that is painted anew, in seconds; None is the end."""
        bounds: list[float | None] = []
        for key in ("repainting_start", "repainting_end"):
            value = fields.get(key)
            if value is not None and task != "repaint":
                raise InvalidRequestError(f"{key}: read by task_type 'repaint' alone, got {task!r}; leave it out")
            if value is not None:
                most = duration_s + self._geometry.frame_s
                hint = ", the length of the sound in seconds"
                check_number(key, value, 0, most, raises=InvalidRequestError, hint=hint)
            bounds.append(None if value is None else float(value))
        start, end = bounds[0] or 0.0, bounds[1]
        if start >= (duration_s if end is None else end):
            raise InvalidRequestError(
                f"repainting_start: got {start:g}, expected less than "
                + (f"the end of the sound, {duration_s:g}" if end is None else f"repainting_end, {end:g}")
            )
        return start, end

    def _repaint_frames(self, start: float, end: float | None) -> tuple[int, int | None]:
        return self._geometry.frame_at(start), None if end is None else self._geometry.frame_at(end)

    def _instruction(self, fields: Mapping[str, Any]) -> str | None:
        if "instruction" not in fields:
            return None
        if fields["instruction"] == "":
            raise InvalidRequestError("instruction: got '', expected words; leave it out for the task's own")
        return _text("instruction", fields["instruction"], self._limits)


def read_caption(prompt: object, limits: LimitsConfig) -> str:
    """The words that describe the music, the request's own or another stage's."""
    if not isinstance(prompt, str):
        raise InvalidRequestError("prompt: got tokens or messages, expected a string that describes the music")
    return _text("prompt", prompt, limits)


def _text(key: str, value: object, limits: LimitsConfig) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{key}: got {type(value).__name__}, expected a string")
    if len(value) > limits.max_prompt_chars:
        raise InvalidRequestError(
            f"{key}: got {len(value)} characters, expected at most {limits.max_prompt_chars} (limits.max_prompt_chars)"
        )
    return value


def _given_duration_s(fields: Mapping[str, Any], params: DiffusionParams) -> float | None:
    """What the prompt or the parameters say; InvalidRequestError where they contradict each other."""
    given = fields.get("duration_s", params.duration_s)
    if given is None:
        return None
    check_number("duration_s", given, 0, above_low=True, raises=InvalidRequestError, hint=" (seconds)")
    duration_s = float(given)
    if params.duration_s not in (None, duration_s):
        raise InvalidRequestError(
            f"duration_s: got {duration_s:g} in the prompt and {params.duration_s:g} in the parameters; give one"
        )
    return duration_s


def _strength(task: str, fields: Mapping[str, Any]) -> float:
    value = fields.get("audio_cover_strength")
    if value is None:
        return 1.0
    check_number("audio_cover_strength", value, 0, 1, raises=InvalidRequestError)
    if task != "cover":
        raise InvalidRequestError(f"audio_cover_strength: read by covers alone, got task_type {task!r}; leave it out")
    return float(value)
