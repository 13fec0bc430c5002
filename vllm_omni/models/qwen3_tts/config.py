"""What a published config.json of Qwen3-TTS says of its talker and its code predictor. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import DecoderConfig, count_of, sub_config
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.worker.ar.frames.code_predictor import PredictorConfig, num_groups

TaskType = Literal["custom_voice", "voice_design", "base"]
TASK_TYPES = ("custom_voice", "voice_design", "base")
AXES = ("mrope_section", "interleaved", "mrope_interleaved")  # of positions whose axes are always equal here
NO_INSTRUCTIONS = "0b6"  # the size whose named voices follow none
DIALECT = "dialect"  # in the names of languages that nobody asks for: a speaker has one
NUM_MARKS = 1024  # of the first codebook: its last ones, most of them unused


@dataclass(frozen=True, slots=True)
class CodecMarks:
    """Codes of the first codebook that are not spoken."""

    begin: int
    end: int
    pad: int
    think: int  # before a language; `no_think` where it is left open
    no_think: int
    think_begin: int
    think_end: int


@dataclass(frozen=True, slots=True)
class TextMarks:
    """Text tokens around what is said."""

    begin: int
    end: int
    pad: int


@dataclass(frozen=True, slots=True)
class TalkerConfig(DecoderConfig):
    """The talker's decoder, what it is fed, its predictor, its marks and its voices."""

    num_codes: int  # of a frame
    text_vocab_size: int
    text_hidden_size: int
    codec: CodecMarks
    text: TextMarks
    predictor: PredictorConfig
    task_type: TaskType
    speakers: Mapping[str, int]  # name in lower case -> its code; none where voices are described or cloned
    dialects: Mapping[str, str]  # speaker -> the language that it speaks in place of Chinese
    languages: Mapping[str, int]  # name in lower case -> its code
    follows_instructions: bool

    @property
    def can_write(self) -> bool:
        return True

    @property
    def clones(self) -> bool:
        """Whether it speaks in the voice of a recording."""
        return self.task_type == "base"

    @property
    def first_unspoken(self) -> int:
        """From here on codes of the first codebook stand for no sound, and only the end is ever written."""
        return self.vocab_size - NUM_MARKS

    @property
    def spoken_languages(self) -> tuple[str, ...]:
        """Those that a request may name."""
        return tuple(name for name in self.languages if DIALECT not in name)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        """From the config.json of a whole checkpoint; ConfigError with the key for what is missing or wrong."""
        talker, inside = sub_config(raw, "talker_config", where), f"{where}: talker_config"
        fields = _decoder_fields(cls, talker, inside)
        predictor = sub_config(talker, "code_predictor_config", inside)
        task_type = _task_type(raw, where)
        if fields["vocab_size"] <= NUM_MARKS:
            raise ConfigError(
                f"{inside}: vocab_size: got {fields['vocab_size']}, expected more than {NUM_MARKS}, its marks"
            )
        last = fields["vocab_size"] - 1
        languages = _codes(talker, "codec_language_id", inside, last)
        found = cls(
            **fields,
            num_codes=num_groups(talker, inside),
            text_vocab_size=count_of(talker, "text_vocab_size", inside),
            text_hidden_size=count_of(talker, "text_hidden_size", inside),
            codec=_codec_marks(talker, inside, last),
            text=_text_marks(raw, where),
            predictor=PredictorConfig.from_json(predictor, f"{inside}.code_predictor_config", fields["hidden_size"]),
            task_type=task_type,
            speakers=_codes(talker, "spk_id", inside, last),
            dialects=_dialects(talker, inside, languages),
            languages=languages,
            follows_instructions=task_type == "voice_design"
            or (task_type == "custom_voice" and raw.get("tts_model_size") != NO_INSTRUCTIONS),
        )
        if found.predictor.num_codes + 1 != found.num_codes:
            raise ConfigError(
                f"{inside}: got num_code_groups {found.num_codes} beside {found.predictor.num_codes + 1} in "
                "code_predictor_config, expected the same"
            )
        return found


def _decoder_fields(cls: type[DecoderConfig], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As of plain text: the three axes of its positions are equal, so that their sections say nothing."""
    scaling = raw.get("rope_scaling")
    if isinstance(scaling, Mapping):
        raw = {**raw, "rope_scaling": {key: value for key, value in scaling.items() if key not in AXES}}
    has_bias = bool(raw.get("attention_bias", False))
    return {**cls.fields_from(raw, where, None), "qkv_bias": has_bias, "output_bias": has_bias, "head_norms": True}


def _task_type(raw: Mapping[str, Any], where: str) -> TaskType:
    found = raw.get("tts_model_type")
    if found not in TASK_TYPES:
        raise ConfigError(f"{where}: tts_model_type: got {brief(found)}, expected one of {', '.join(TASK_TYPES)}")
    return cast(TaskType, found)


def _codec_marks(raw: Mapping[str, Any], where: str, last: int) -> CodecMarks:
    names = ("bos_id", "eos_token_id", "pad_id", "think_id", "nothink_id", "think_bos_id", "think_eos_id")
    return CodecMarks(*(_token(raw, f"codec_{name}", where, last) for name in names))


def _text_marks(raw: Mapping[str, Any], where: str) -> TextMarks:
    last = count_of(sub_config(raw, "talker_config", where), "text_vocab_size", f"{where}: talker_config") - 1
    return TextMarks(*(_token(raw, f"tts_{name}_token_id", where, last) for name in ("bos", "eos", "pad")))


def _token(raw: Mapping[str, Any], key: str, where: str, last: int) -> int:
    check_number(f"{where}: {key}", raw.get(key), 0, last, integer=True, raises=ConfigError)
    return int(raw[key])


def _codes(raw: Mapping[str, Any], key: str, where: str, last: int) -> dict[str, int]:
    found = raw.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {key}: got {brief(found)}, expected names and their codes")
    return {str(name).lower(): _token(found, name, f"{where}: {key}", last) for name in found}


def _dialects(raw: Mapping[str, Any], where: str, languages: Mapping[str, int]) -> dict[str, str]:
    """Those that speakers have; false stands for none."""
    found = raw.get("spk_is_dialect") or {}
    spoken = {str(name).lower(): dialect for name, dialect in found.items() if dialect} if found else {}
    for name, dialect in spoken.items():
        if dialect not in languages:
            raise ConfigError(f"{where}: spk_is_dialect.{name}: got {brief(dialect)}, which codec_language_id lacks")
    return spoken
