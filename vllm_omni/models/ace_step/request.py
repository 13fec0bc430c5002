"""What one request asks of ACE-Step, read from its fields and checked. Reads headers of sounds, decodes none.

Ranges, keys and languages are those of ace-step/ACE-Step-1.5 (acestep/constants.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import check_audio
from vllm_omni.models.ace_step.prompt_options import MusicModel, MusicPromptOptions
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, check_number, did_you_mean

TASKS = ("text2music", "cover", "repaint")
OTHER_TASKS = ("extract", "lego", "complete")  # of the reference, for its base model alone
BPM = (30, 300)
TIME_SIGNATURES = ("2", "3", "4", "6")
LANGUAGES = (
    "ar, az, bg, bn, ca, cs, da, de, el, en, es, fa, fi, fr, he, hi, hr, ht, hu, id, is, it, ja, ko, la, lt, ms, ne, "
    "nl, no, pa, pl, pt, ro, ru, sa, sk, sr, sv, sw, ta, te, th, tl, tr, uk, ur, vi, yue, zh, unknown"
)
KEYSCALE = re.compile(r"([A-G])([#b♯♭]?)\s+(major|minor)", re.IGNORECASE)
AUDIO_CODE = re.compile(r"<\|audio_code_\d{1,9}\|>")
AUDIO_CODES = re.compile(r"\s*(?:<\|audio_code_\d{1,9}\|>\s*)+")


@dataclass(frozen=True, slots=True)
class MusicRequest:
    """A checked request. task_type: what the model does (codes make a cover of text to music). duration_s: of the
    result.

    audio, reference_audio: sources, None where there are none. is_planned: whether a language model writes the codes.
    """

    caption: str
    lyrics: str
    language: str
    instruction: str | None
    bpm: int | None
    keyscale: str | None
    timesignature: str | None
    task_type: str
    duration_s: float
    audio: Any
    reference_audio: Any
    audio_codes: str
    is_planned: bool
    repainting_start: float | None
    repainting_end: float | None
    audio_cover_strength: float

    def music(self) -> dict[str, Any]:
        """The value of the port `music`."""
        return {
            "task_type": self.task_type,
            "duration_s": self.duration_s,
            "repainting_start": self.repainting_start,
            "repainting_end": self.repainting_end,
            "audio_cover_strength": self.audio_cover_strength,
            "has_source_audio": self.audio is not None,
            "has_reference_audio": self.reference_audio is not None,
            "has_audio_codes": self.is_planned or bool(self.audio_codes),
        }


class MusicRequestReader:
    """Reads requests for one stage. wanted: its output ports that somebody reads."""

    def __init__(
        self, model: MusicModel, options: MusicPromptOptions, limits: LimitsConfig, wanted: frozenset[str]
    ) -> None:
        self._model = model
        self._limits = limits
        self._wanted = wanted
        self._default_duration_s = options.default_duration_s
        self._min_duration_s = options.min_duration_s or 0.0
        self._is_planned = "planner_prompt" in wanted
        own = options.max_duration_s
        self._max_duration_s = limits.max_duration_s if own is None else min(own, limits.max_duration_s)
        self._duration_key = "limits.max_duration_s" if own != self._max_duration_s else "the stage's max_duration_s"

    def read(self, request: OmniRequest, params: DiffusionParams, prompt: object) -> MusicRequest:
        """prompt: the words that describe the music, the request's own or another stage's. InvalidRequestError for
        whatever is out of bounds, missing, or of no use to the task.
        """
        if not isinstance(prompt, str):
            raise InvalidRequestError("prompt: got tokens or messages, expected a string that describes the music")
        fields = {key: value for key, value in request.fields.items() if value is not None}
        task = self._task(fields)
        self._check_sources(task, fields)
        source_s = self._sound_s("audio", fields)
        self._sound_s("reference_audio", fields)
        codes = self._codes(fields)
        duration_s = self._duration_s(fields, params, source_s, codes)
        is_cover = task == "text2music" and bool(codes or self._is_planned)
        start, end = self._window(task, fields, duration_s)
        return MusicRequest(
            caption=self._text("prompt", prompt),
            lyrics=self._text("lyrics", fields.get("lyrics", "")),
            language=_language(fields.get("vocal_language", "en")),
            instruction=self._instruction(fields),
            bpm=_bpm(fields.get("bpm")),
            keyscale=_keyscale(fields.get("keyscale")),
            timesignature=_timesignature(fields.get("timesignature")),
            task_type="cover" if is_cover else task,
            duration_s=duration_s,
            audio=fields.get("audio"),
            reference_audio=fields.get("reference_audio"),
            audio_codes=codes,
            is_planned=self._is_planned,
            repainting_start=start,
            repainting_end=end,
            audio_cover_strength=_strength("cover" if is_cover else task, fields),
        )

    def _task(self, fields: Mapping[str, Any]) -> str:
        task = fields.get("task_type", "text2music")
        if task in OTHER_TASKS:
            raise InvalidRequestError(f"task_type: got {task!r}, which is not supported; expected {_listed(TASKS)}")
        if task not in TASKS:
            near = did_you_mean(task[:80], TASKS) if isinstance(task, str) else ""
            raise InvalidRequestError(f"task_type: got {brief(task)}, expected {_listed(TASKS)}{near}")
        if self._is_planned and task != "text2music":
            raise InvalidRequestError(
                f"task_type: got {task!r}, but a language model plans the sounds of this config, which is for "
                "'text2music'; use a config without it, such as ace_step"
            )
        return str(task)

    def _check_sources(self, task: str, fields: Mapping[str, Any]) -> None:
        """Whether the task has the sounds that it needs, and none that nobody would hear."""
        for key, port in (("audio", "source_audio"), ("reference_audio",) * 2, ("audio_codes",) * 2):
            if key in fields and port not in self._wanted:
                raise InvalidRequestError(f"{key}: no stage of this config reads it (the port {port!r}); leave it out")
        if "audio" in fields and task == "text2music":
            raise InvalidRequestError("audio: task_type 'text2music' reads none; set task_type to 'cover' or 'repaint'")
        if "audio" in fields and "audio_codes" in fields:
            raise InvalidRequestError("audio_codes: got them beside audio, expected one of the two")
        if task == "repaint" and "audio" not in fields:
            raise InvalidRequestError("task_type: 'repaint' needs the sound to be changed; give it as 'audio'")
        if task == "cover" and not {"audio", "audio_codes"} & set(fields):
            raise InvalidRequestError("task_type: 'cover' needs 'audio' or 'audio_codes'; give one of them")

    def _sound_s(self, key: str, fields: Mapping[str, Any]) -> float | None:
        """Seconds of a sound that the request brings, from its header."""
        if key not in fields:
            return None
        duration_s = check_audio(fields[key], channels=self._model.channels, limits=self._limits, name=key)
        if duration_s < self._model.frame_s:
            raise InvalidRequestError(
                f"{key}: got {duration_s:.6f} s, expected at least {self._model.frame_s:.6f} s, one latent frame"
            )
        return duration_s

    def _codes(self, fields: Mapping[str, Any]) -> str:
        if "audio_codes" not in fields:
            return ""
        codes = self._text("audio_codes", fields["audio_codes"])
        if not AUDIO_CODES.fullmatch(codes):
            raise InvalidRequestError(
                f"audio_codes: got {brief(codes)}, expected codes alone, as '<|audio_code_12|><|audio_code_345|>'"
            )
        return codes

    def _duration_s(
        self, fields: Mapping[str, Any], params: DiffusionParams, source_s: float | None, codes: str
    ) -> float:
        """As given, else the length of what the request brings: a result is as long as its source."""
        given = fields.get("duration_s", params.duration_s)
        if given is not None:
            check_number("duration_s", given, 0, above_low=True, raises=InvalidRequestError, hint=" (seconds)")
            given = float(given)
            if params.duration_s not in (None, given):
                raise InvalidRequestError(
                    f"duration_s: got {given:g} in the prompt and {params.duration_s:g} in the parameters; give one"
                )
        code_s = self._model.frames_per_code * self._model.frame_s
        if codes:
            source_s, tolerance_s = len(AUDIO_CODE.findall(codes)) * code_s, code_s
        else:
            tolerance_s = self._model.frame_s
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

    def _window(self, task: str, fields: Mapping[str, Any], duration_s: float) -> tuple[float | None, float | None]:
        """The part that is painted anew, in seconds; None is the beginning, or the end."""
        bounds: list[float | None] = []
        for key in ("repainting_start", "repainting_end"):
            value = fields.get(key)
            if value is not None and task != "repaint":
                raise InvalidRequestError(f"{key}: read by task_type 'repaint' alone, got {task!r}; leave it out")
            if value is not None:
                most = duration_s + self._model.frame_s
                hint = ", the length of the sound in seconds"
                check_number(key, value, 0, most, raises=InvalidRequestError, hint=hint)
            bounds.append(None if value is None else float(value))
        start, end = bounds
        if (start or 0.0) >= (duration_s if end is None else end):
            raise InvalidRequestError(
                f"repainting_start: got {start or 0.0:g}, expected less than "
                + (f"the end of the sound, {duration_s:g}" if end is None else f"repainting_end, {end:g}")
            )
        return start, end

    def _instruction(self, fields: Mapping[str, Any]) -> str | None:
        if "instruction" not in fields:
            return None
        if fields["instruction"] == "":
            raise InvalidRequestError("instruction: got '', expected words; leave it out for the task's own")
        return self._text("instruction", fields["instruction"])

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise InvalidRequestError(f"{key}: got {type(value).__name__}, expected a string")
        limit = self._limits.max_prompt_chars
        if len(value) > limit:
            raise InvalidRequestError(
                f"{key}: got {len(value)} characters, expected at most {limit} (limits.max_prompt_chars)"
            )
        return value


def _bpm(value: Any) -> int | None:
    if value is not None:
        check_number("bpm", value, *BPM, integer=True, raises=InvalidRequestError, hint=" (beats per minute)")
    return None if value is None else int(value)


def _keyscale(value: object) -> str | None:
    """As ACE-Step writes it: "F# minor"."""
    if value is None:
        return None
    found = KEYSCALE.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 80 else None
    if found is None:
        raise InvalidRequestError(
            f"keyscale: got {brief(value)}, expected a note A to G, perhaps # or b, and major or minor, as 'F# minor'"
        )
    note, accidental, mode = found.groups()
    return f"{note.upper()}{accidental.lower()} {mode.lower()}"


def _timesignature(value: object) -> str | None:
    if value is None:
        return None
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10
    known = str(value) if is_count or isinstance(value, str) else None
    if known not in TIME_SIGNATURES:
        raise InvalidRequestError(
            f"timesignature: got {brief(value)}, expected {_listed(TIME_SIGNATURES)}, the beats of a bar"
        )
    return known


def _language(value: object) -> str:
    if not isinstance(value, str) or value not in LANGUAGES.split(", "):
        raise InvalidRequestError(f"vocal_language: got {brief(value)}, expected one of {LANGUAGES}")
    return value


def _strength(task: str, fields: Mapping[str, Any]) -> float:
    value = fields.get("audio_cover_strength")
    if value is None:
        return 1.0
    check_number("audio_cover_strength", value, 0, 1, raises=InvalidRequestError)
    if task != "cover":
        raise InvalidRequestError(f"audio_cover_strength: read by covers alone, got task_type {task!r}; leave it out")
    return float(value)


def _listed(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values[:-1])) + f" or {values[-1]!r}"
