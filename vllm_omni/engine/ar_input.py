"""What comes into an AR stage: which prompt a task means, its tokens, and the refusal of all that could not be run.
Computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.ar_options import AROptions, KVPoolPlan
from vllm_omni.engine.base import StageTask
from vllm_omni.engine.text_processor import TextProcessor
from vllm_omni.errors import InvalidRequestError, ResourceError, StageError
from vllm_omni.models.language_model import LanguageModelConfig
from vllm_omni.models.media import MediaPrompt
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.request import OmniRequest, Prompt

DEFAULT_MAX_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class ARLimits:
    """The largest values of a stage. pool_tokens: what the whole KV pool holds; pool_limited_by: the key that would
    raise it.
    """

    vocab_size: int
    model_len: int
    pool_tokens: int
    pool_limited_by: str
    max_prompt_chars: int
    max_outputs: int

    @classmethod
    def of(cls, options: AROptions, model: LanguageModelConfig, pool: KVPoolPlan, config: OmniConfig) -> ARLimits:
        return cls(
            vocab_size=model.vocab_size,
            model_len=options.model_len(model),
            pool_tokens=pool.num_blocks * options.block_size,
            pool_limited_by=pool.limited_by,
            max_prompt_chars=config.limits.max_prompt_chars,
            max_outputs=config.limits.max_outputs,
        )


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt's tokens, checked. num_truncated: how many its end lost. max_new_tokens: room for written ones. media:
    the prompt with its positions and encoder inputs, None for text alone.
    """

    token_ids: list[int]
    num_truncated: int
    max_new_tokens: int
    media: MediaPrompt | None = None


def read_prompt(options: AROptions, request: OmniRequest, inputs: Mapping[str, Any]) -> Prompt:
    """What a task's prompt is: what its edge brings, else the field of the request that the stage reads."""
    if "prompt" in inputs:
        return inputs["prompt"]
    return request.prompt if options.prompt == "prompt" else _negative_prompt(request)


class ARInput:
    """Makes the prompts of one stage into tokens, within its limits."""

    def __init__(self, options: AROptions, processor: TextProcessor, limits: ARLimits) -> None:
        self._options = options
        self._processor = processor
        self._limits = limits

    def check_params(self, params: StageParams, can_fan_out: bool) -> SamplingParams:
        """Refuses what no prompt would make right. can_fan_out: whether n > 1 samples have somewhere to go."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params: got {type(params).__name__}, expected SamplingParams")
        if not self._options.can_write:  # it samples nothing; the parameters are meant for other stages
            return params
        for name, tokens in (("stop_token_ids", params.stop_token_ids or ()), ("logit_bias", params.logit_bias or ())):
            self._check_vocabulary(name, tokens)
        n = params.n or 1
        if n > self._limits.max_outputs:
            raise InvalidRequestError(f"n: got {n}, expected at most {self._limits.max_outputs} (limits.max_outputs)")
        if n > 1 and not can_fan_out:
            raise InvalidRequestError(
                f"n: got {n}, expected 1: other stages read what this one writes, or its hidden states"
            )
        if params.max_tokens is not None and (params.min_tokens or 0) > params.max_tokens:
            raise InvalidRequestError(
                f"min_tokens: got {params.min_tokens}, expected at most max_tokens ({params.max_tokens})"
            )
        return params

    def prepare_task(self, task: StageTask, stage: StageConfig, params: SamplingParams) -> PreparedPrompt:
        """As `prepare`; StageError where the words are another stage's, so that its name stands in it."""
        prompt = read_prompt(self._options, task.request, task.inputs)
        try:
            return self.prepare(prompt, params)
        except InvalidRequestError as error:
            if "prompt" not in task.inputs:
                raise
            raise StageError(f"cannot read what {stage.edges['prompt'].source} gave: {error}") from error

    def prepare(self, prompt: Prompt | MediaPrompt, params: SamplingParams) -> PreparedPrompt:
        """Tokens within the limits; InvalidRequestError (or ResourceError: the KV pool is too small) for what cannot be
        run.
        """
        if isinstance(prompt, MediaPrompt):
            return self._prepare_read(prompt, params)
        num_chars = _num_chars(prompt)
        if num_chars > self._limits.max_prompt_chars:
            raise InvalidRequestError(
                f"prompt: got {num_chars} characters, expected at most {self._limits.max_prompt_chars}; "
                "shorten it, or raise limits.max_prompt_chars"
            )
        token_ids = self._processor.encode(prompt)
        if not token_ids:
            raise InvalidRequestError("prompt: got no tokens, expected at least one")
        kept = self._truncate(token_ids)
        self._check_vocabulary("prompt", kept)
        return PreparedPrompt(kept, len(token_ids) - len(kept), self._room(len(kept), params))

    def _prepare_read(self, read: MediaPrompt, params: SamplingParams) -> PreparedPrompt:
        """Of a prompt whose media are read already; it is never cut."""
        token_ids = [int(token) for token in read.token_ids]
        if self._options.part != "thinker":
            raise InvalidRequestError("prompt: got media, expected words; this stage's model reads nothing else")
        if not token_ids or len(self._truncate(token_ids)) < len(token_ids):
            raise InvalidRequestError(
                f"prompt: got {len(token_ids)} tokens with their media, expected fewer; media cannot be truncated"
            )
        self._check_vocabulary("prompt", token_ids)
        return PreparedPrompt(token_ids, 0, self._room(len(token_ids), params), read)

    def _room(self, num_tokens: int, params: SamplingParams) -> int:
        """How many tokens may be written after a prompt of this length."""
        room = 0
        if self._options.can_write:
            wanted = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
            room = min(wanted, self._limits.model_len - num_tokens, max(self._limits.pool_tokens - num_tokens, 1))
        self._check_pool(num_tokens + (1 if room else 0))
        if (params.min_tokens or 0) > room and self._options.can_write:
            raise InvalidRequestError(
                f"min_tokens: got {params.min_tokens}, expected at most {room}, the room after {num_tokens} tokens"
            )
        return room

    def _truncate(self, token_ids: list[int]) -> list[int]:
        limit, key = self._limits.model_len - (1 if self._options.can_write else 0), "max_model_len"
        if self._options.max_prompt_tokens is not None and self._options.max_prompt_tokens < limit:
            limit, key = self._options.max_prompt_tokens, "max_prompt_tokens"
        if len(token_ids) <= limit:
            return token_ids
        if not self._options.truncate_prompt or limit == 0:
            raise InvalidRequestError(
                f"prompt: got {len(token_ids)} tokens, expected at most {limit} ({key}); "
                "shorten it, or set truncate_prompt"
            )
        return token_ids[:limit]

    def _check_vocabulary(self, name: str, token_ids: Sequence[int] | Mapping[int, float]) -> None:
        for token in token_ids:
            if token >= self._limits.vocab_size:
                raise InvalidRequestError(
                    f"{name}: got the token id {token}, expected less than {self._limits.vocab_size}"
                )

    def _check_pool(self, num_tokens: int) -> None:
        if num_tokens > self._limits.pool_tokens:
            raise ResourceError(
                f"prompt: got {num_tokens} tokens (one to be written included), expected at most "
                f"{self._limits.pool_tokens}, the whole KV pool, as {self._limits.pool_limited_by} sets it; "
                "raise num_blocks or kv_memory_mb"
            )


def _negative_prompt(request: OmniRequest) -> str:
    given = request.params.values() if isinstance(request.params, Mapping) else [request.params]
    for params in given:
        if isinstance(params, DiffusionParams) and params.negative_prompt is not None:
            return params.negative_prompt
    return request.negative_prompt or ""


def _num_chars(prompt: Prompt) -> int:
    """Characters of a text or of all messages; token ids have none (the model's length bounds them)."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(message["content"])) for message in prompt if isinstance(message, Mapping))
