"""What a published config.json of Qwen3-Omni says of its talker and its code predictor. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import DecoderConfig, count_of, sub_config
from vllm_omni.layers.experts import DEFAULTS, ExpertsConfig
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.worker.ar.frames.code_predictor import PredictorConfig, num_groups

ROPE: Mapping[str, Any] = {"rope_theta": 10000.0, "mrope_section": (24, 20, 20)}  # transformers', where it has none
EXPERTS: Mapping[str, Any] = {**DEFAULTS, "num_experts": 128, "moe_intermediate_size": 384}
IN_TURN = {"mrope_interleaved": True}  # whatever a file says, as transformers reads it
NUM_MARKS = 1024  # of the first codebook: its last ones, most of them unused
MARKS: Mapping[str, Any] = {  # transformers', where a file leaves them out
    "im_start_token_id": 151644,
    "user_token_id": 872,
    "assistant_token_id": 77091,
    "tts_bos_token_id": 151672,
    "tts_eos_token_id": 151673,
    "tts_pad_token_id": 151671,
}


@dataclass(frozen=True, slots=True)
class CodecMarks:
    """Codes of the first codebook that are not spoken."""

    begin: int
    end: int
    pad: int
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
class TurnMarks:
    """Tokens of the thinker's prompt by which its turns are told apart."""

    start: int  # before the role of each
    user: int
    assistant: int


@dataclass(frozen=True, slots=True)
class TalkerConfig(DecoderConfig):
    """The talker's decoder, what it is fed, its predictor, its marks and its voices."""

    experts: ExpertsConfig
    thinker_size: int  # width of the thinker's states
    thinker_layer: int  # whose states stand for media
    num_codes: int  # of a frame
    codec: CodecMarks
    text: TextMarks
    turns: TurnMarks
    media: frozenset[int]  # tokens that stand for media in the thinker's prompt
    predictor: PredictorConfig
    speakers: Mapping[str, int]  # name in lower case -> its code

    @property
    def can_write(self) -> bool:
        return True

    @property
    def first_unspoken(self) -> int:
        """From here on codes of the first codebook stand for no sound, and only the end is ever written."""
        return self.vocab_size - NUM_MARKS

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        """From the config.json of a whole checkpoint; ConfigError with the key for what is missing or wrong."""
        talker, inside = sub_config(raw, "talker_config", where), f"{where}: talker_config"
        text, in_text = sub_config(talker, "text_config", inside), f"{inside}.text_config"
        predictor, in_predictor = sub_config(talker, "code_predictor_config", inside), f"{inside}.code_predictor_config"
        fields = cls.fields_from(text, in_text, head_dim=None, rope=ROPE)
        has_bias = bool(text.get("attention_bias", False))
        found = cls(
            **{**fields, "rope": {**fields["rope"], **IN_TURN}},
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            experts=ExpertsConfig.from_json(text, in_text, fields["num_layers"], EXPERTS),
            thinker_size=count_of(talker, "thinker_hidden_size", inside),
            thinker_layer=count_of(talker, "accept_hidden_layer", inside),
            num_codes=num_groups(talker, inside),
            codec=_codec_marks(talker, inside, fields["vocab_size"] - 1),
            text=TextMarks(
                *(_token({**MARKS, **raw}, f"tts_{name}_token_id", where) for name in ("bos", "eos", "pad"))
            ),
            turns=TurnMarks(
                *(_token({**MARKS, **raw}, f"{name}_token_id", where) for name in ("im_start", "user", "assistant"))
            ),
            media=_media(raw, where),
            predictor=PredictorConfig.from_json(predictor, in_predictor, fields["hidden_size"]),
            speakers=_speakers(talker, inside, fields["vocab_size"] - 1),
        )
        found._check(inside)
        return found

    def _check(self, where: str) -> None:
        if self.first_unspoken < 1:
            raise ConfigError(
                f"{where}: text_config: vocab_size: got {self.vocab_size}, expected more than {NUM_MARKS}, its marks"
            )
        if self.predictor.num_codes + 1 != self.num_codes:
            raise ConfigError(
                f"{where}: got num_code_groups {self.num_codes} beside {self.predictor.num_codes + 1} in "
                "code_predictor_config, expected the same"
            )


def _codec_marks(raw: Mapping[str, Any], where: str, last: int) -> CodecMarks:
    names = ("bos_id", "eos_token_id", "pad_id", "nothink_id", "think_bos_id", "think_eos_id")
    return CodecMarks(*(_token(raw, f"codec_{name}", where, last) for name in names))


def _media(raw: Mapping[str, Any], where: str) -> frozenset[int]:
    thinker = sub_config(raw, "thinker_config", where)
    keys = [f"{kind}_token_id" for kind in ("audio", "image", "video")]
    return frozenset(_token(thinker, key, f"{where}: thinker_config") for key in keys)


def _speakers(raw: Mapping[str, Any], where: str, last: int) -> dict[str, int]:
    found = raw.get("speaker_id")
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{where}: speaker_id: got {brief(found)}, expected names and their codes")
    return {str(name).lower(): _token(found, name, f"{where}: speaker_id", last) for name in found}


def _token(raw: Mapping[str, Any], key: str, where: str, most: int | None = None) -> int:
    check_number(f"{where}: {key}", raw.get(key), 0, most, integer=True, raises=ConfigError)
    return int(raw[key])
