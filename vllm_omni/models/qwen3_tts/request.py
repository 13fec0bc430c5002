"""What a request says of its speech: the words, who says them and how. Checked, and tokenised; of a recording that is
to be cloned headers alone are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.media.audio_input import check_audio
from vllm_omni.models.qwen3_tts.config import TalkerConfig
from vllm_omni.models.qwen3_tts.prompt import NUM_REFERENCE_ENDS, NUM_ROLE_TOKENS, NUM_WORD_ENDS, Script
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.plain import as_number
from vllm_omni.voices import SAMPLE_RATE, VoiceStore, check_reference

SPEAKER, VOICE, LANGUAGE, INSTRUCTIONS, TASK_TYPE = "speaker", "voice", "language", "instructions", "task_type"
REF_AUDIO, REF_TEXT, ALONE = "ref_audio", "ref_text", "x_vector_only_mode"
WHOLE = "non_streaming_mode"
MAX_TOKENS = "max_new_tokens"
SUBTALKER = {  # key -> field of DrawSettings, its largest value
    "subtalker_temperature": ("temperature", 100.0),
    "subtalker_top_k": ("top_k", 2**31 - 1),
    "subtalker_top_p": ("top_p", 1.0),
}
KEYS = frozenset(
    {SPEAKER, VOICE, LANGUAGE, INSTRUCTIONS, TASK_TYPE, REF_AUDIO, REF_TEXT, ALONE, WHOLE, MAX_TOKENS, *SUBTALKER}
)
AUTO = "auto"
TASK_NAMES = {"customvoice": "custom_voice", "voicedesign": "voice_design"}  # as vllm-omni's clients write them
TURN_BEGIN, TURN_END = "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n"
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """One task of the talker, before its recording is read."""

    script: Script
    draw: DrawSettings  # of all codes of a frame but the first
    max_tokens: int | None = None  # frames, where the request says so beside its parameters
    recording: Any = None  # a source of audio; None: nothing is cloned
    recording_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Voice:
    speaker: str | None = None  # of the checkpoint's own, in lower case
    recording: Any = None
    recording_s: float = 0.0
    words: str = ""  # of the recording, where it is to stand in the prompt


class SpeechReader:
    """Reads the requests of one checkpoint. Safe to ask from any thread.

    encode: its tokenizer. draw: what a request leaves unset. voices: those that callers may add.
    """

    def __init__(
        self,
        config: TalkerConfig,
        limits: LimitsConfig,
        encode: Encode,
        draw: DrawSettings,
        voices: VoiceStore | None = None,
    ) -> None:
        self._config = config
        self._voices = voices
        self._limits = limits
        self._encode = encode
        self._draw = draw

    def read(self, request: OmniRequest) -> SpeechRequest:
        """InvalidRequestError for what cannot be said, or not by this checkpoint."""
        fields = {key: request.fields[key] for key in KEYS if request.fields.get(key) is not None}
        self._check_task(fields)
        ids = self._encode(TURN_BEGIN) if request.is_open else self._words(request)
        voice = self._voice(fields)
        script = Script(
            role=ids[:NUM_ROLE_TOKENS],
            words=() if request.is_open else ids[NUM_ROLE_TOKENS:-NUM_WORD_ENDS],
            instructions=self._instructions(fields),
            language=self._language(fields, voice.speaker),
            speaker=None if voice.speaker is None else self._config.speakers[voice.speaker],
            is_cloned=voice.recording is not None,
            reference=self._reference(voice.words),
            is_whole=self._is_whole(fields, request.is_open),
            is_open=request.is_open,
        )
        max_tokens = None if MAX_TOKENS not in fields else _number(fields, MAX_TOKENS, 1, None, integer=True)
        return SpeechRequest(script, self._drawn(fields), max_tokens, voice.recording, voice.recording_s)

    def _check_task(self, fields: Mapping[str, Any]) -> None:
        given = fields.get(TASK_TYPE)
        own = self._config.task_type
        name = str(given).lower().replace("_", "")
        if given is not None and TASK_NAMES.get(name, name) != own:
            raise InvalidRequestError(
                f"{TASK_TYPE}: got {brief(given)}, but this checkpoint is for {own}; leave it out, or use another"
            )

    def _words(self, request: OmniRequest) -> list[int]:
        """The turn that says the text, with its marks."""
        text = request.prompt
        if not isinstance(text, str):
            raise InvalidRequestError("prompt: got token ids or messages, expected the text that is to be said")
        check_chars("prompt", len(text), self._limits)
        check_words(text)
        return self._encode(f"{TURN_BEGIN}{text}{TURN_END}")

    def _is_whole(self, fields: Mapping[str, Any], is_open: bool) -> bool:
        """Text in pieces stands beside the frames; for the other layout there would have to be all of it."""
        if not is_open:
            return _flag(fields, WHOLE, not self._config.clones)
        if _flag(fields, WHOLE, False):
            raise InvalidRequestError(
                f"{WHOLE}: got true with a text in pieces, expected false: with it all text stands before the first "
                "frame; leave it out, or give one string"
            )
        return False

    def _instructions(self, fields: Mapping[str, Any]) -> list[int]:
        text = self._text(fields, INSTRUCTIONS)
        if not text:
            return []
        if not self._config.follows_instructions:
            raise InvalidRequestError(
                f"{INSTRUCTIONS}: got some, but this checkpoint ({self._config.task_type}) follows none; leave it out"
            )
        return self._encode(f"<|im_start|>user\n{text}<|im_end|>\n")

    def _voice(self, fields: Mapping[str, Any]) -> _Voice:
        """Who speaks: of a checkpoint's own voices the first, where nothing is said."""
        name, source = _name(fields), fields.get(REF_AUDIO)
        if source is not None and name is not None:
            raise InvalidRequestError(f"{REF_AUDIO}: got a recording beside {VOICE} {brief(name)}; keep one of them")
        if not self._config.clones:
            return self._own_voice(name, fields)
        if source is not None:
            length_s = check_audio(source, channels=1, limits=self._limits, name=REF_AUDIO)
            check_reference(length_s)
            return _Voice(recording=source, recording_s=length_s, words=self._recorded_words(fields))
        if name is None:
            raise InvalidRequestError(f"{REF_AUDIO}: missing; this checkpoint speaks in the voice of a recording")
        if self._voices is None:
            raise InvalidRequestError(
                f"{VOICE}: got {brief(name)}, but this checkpoint has no voices of its own, and none are kept; give "
                f"{REF_AUDIO}, or set the stage's `voices`"
            )
        kept = self._voices.get(name)
        words = "" if _flag(fields, ALONE, False) else kept.facts.text or ""
        return _Voice(recording=(kept.sound, SAMPLE_RATE), recording_s=kept.facts.duration_s, words=words)

    def _own_voice(self, name: object, fields: Mapping[str, Any]) -> _Voice:
        task, known = self._config.task_type, self._config.speakers
        for key in (REF_AUDIO, REF_TEXT):
            if fields.get(key):
                raise InvalidRequestError(f"{key}: got it, but this checkpoint ({task}) clones no voice; leave it out")
        if name is None:
            return _Voice(speaker=next(iter(known), None))
        if not known:
            raise InvalidRequestError(
                f"{VOICE}: got {brief(name)}, but this checkpoint ({task}) has no named voices; leave it out"
            )
        if not isinstance(name, str) or name.lower() not in known:
            raise InvalidRequestError(f"{VOICE}: got {brief(name)}{did_you_mean(str(name)[:80], known)}")
        return _Voice(speaker=name.lower())

    def _recorded_words(self, fields: Mapping[str, Any]) -> str:
        """None where the recording lends its voice alone."""
        text = self._text(fields, REF_TEXT)
        if _flag(fields, ALONE, False):
            return ""
        if not text.strip():
            raise InvalidRequestError(
                f"{REF_TEXT}: missing; expected the words of {REF_AUDIO}, or {ALONE}: true, which lends its voice alone"
            )
        return text

    def _reference(self, words: str) -> list[int]:
        if not words:
            return []
        return self._encode(f"{TURN_BEGIN}{words}<|im_end|>\n")[NUM_ROLE_TOKENS:-NUM_REFERENCE_ENDS]

    def _language(self, fields: Mapping[str, Any], speaker: str | None) -> int | None:
        """Its code; None to leave it open. A speaker's dialect takes the place of Chinese."""
        given, known = fields.get(LANGUAGE, AUTO), (AUTO, *self._config.spoken_languages)
        if not isinstance(given, str) or given.lower() not in known:
            raise InvalidRequestError(f"{LANGUAGE}: got {brief(given)}{did_you_mean(str(given)[:80], known)}")
        name = given.lower()
        dialect = self._config.dialects.get(speaker or "")
        if name in ("chinese", AUTO) and dialect is not None:
            name = dialect
        return self._config.languages.get(name)

    def _drawn(self, fields: Mapping[str, Any]) -> DrawSettings:
        values: dict[str, Any] = {name: getattr(self._draw, name) for name, _ in SUBTALKER.values()}
        for key, (name, most) in SUBTALKER.items():
            if key in fields:
                values[name] = _number(fields, key, 0, most, integer=name == "top_k")
        return DrawSettings(**values)

    def _text(self, fields: Mapping[str, Any], key: str) -> str:
        text = fields.get(key, "")
        if not isinstance(text, str):
            raise InvalidRequestError(f"{key}: got {brief(text)}, expected a text")
        check_chars(key, len(text), self._limits)
        return text


def check_chars(name: str, num_chars: int, limits: LimitsConfig) -> None:
    """InvalidRequestError for a text that is too long."""
    most = limits.max_prompt_chars
    if num_chars > most:
        raise InvalidRequestError(
            f"{name}: got {num_chars} characters, expected at most {most}; shorten it, or raise limits.max_prompt_chars"
        )


def check_words(text: str) -> None:
    """InvalidRequestError for one that says nothing."""
    if not text.strip():
        raise InvalidRequestError(f"prompt: got {text!r:.20}, expected words that are to be said")


def _name(fields: Mapping[str, Any]) -> object:
    """Who is to speak; None where nothing says it."""
    named = [fields[key] for key in (VOICE, SPEAKER) if key in fields]
    if len(named) > 1 and named[0] != named[1]:
        raise InvalidRequestError(f"{SPEAKER}: got {brief(named[1])} beside {VOICE} {brief(named[0])}; keep one")
    return named[0] if named else None


def _flag(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    found = fields.get(key, default)
    if not isinstance(found, bool):
        raise InvalidRequestError(f"{key}: got {brief(found)}, expected true or false")
    return found


def _number(fields: Mapping[str, Any], key: str, least: float, most: float | None, *, integer: bool) -> Any:
    return as_number(key, fields[key], least, most, raises=InvalidRequestError, integer=integer)
