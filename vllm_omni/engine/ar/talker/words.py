"""What stages that write codes of speech cannot be asked for, since codes are no words."""

from __future__ import annotations

from collections.abc import Container

from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.prompt import ARLimits
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.params import SamplingParams, StageParams

KEYS = (
    *("task", "prompt", "tokenizer", "chat_template", "chat_template_kwargs", "system_prompt", "outputs", "sections"),
    *("max_prompt_tokens", "truncate_prompt", "generation_config", "speculation", "prompt_template", "pad_prompt_to"),
)
PARAMS = ("stop", "logprobs", "skip_special_tokens")
BY_STAGE = "for text and speech give the parameters by stage, {stage: params}"


def refuse_keys(options: AROptions, reads: Container[str] = ()) -> None:
    """ConfigError for a key about words that is set. reads: of them those that the stage reads."""
    plain = AROptions()
    for key in KEYS:
        value = getattr(options, key)
        if key not in reads and value != getattr(plain, key):
            raise ConfigError(f"{key}: got {value!r}, but part talker reads and writes no words; remove it")


def checked_params(limits: ARLimits, params: StageParams) -> SamplingParams:
    """InvalidRequestError for what no codes could be written by."""
    checked = limits.check_params(params, why_one="a reply is spoken once", hint=f"; {BY_STAGE}")
    for name in PARAMS:
        if getattr(checked, name) is not None:
            raise InvalidRequestError(f"{name}: speech has no words, and does not read it; {BY_STAGE}")
    return checked
