"""The YAML keys of a `umt5` stage."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

PROMPTS = ("prompt", "negative_prompt")
MAX_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class UMT5Options:
    """Prompts that are too long lose their end, as the published pipeline has it."""

    prompt: str = "prompt"  # which words of a request are encoded: one of PROMPTS
    tokenizer: str | None = None  # folder of the tokenizer; None: beside the model's
    max_prompt_tokens: int = 512

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise ConfigError(f"prompt: got {self.prompt!r}, expected one of {', '.join(PROMPTS)}")
        check_number("max_prompt_tokens", self.max_prompt_tokens, 2, MAX_TOKENS, integer=True, raises=ConfigError)
