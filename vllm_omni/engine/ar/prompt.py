"""What comes into an AR stage: which prompt a task means, its tokens, and the refusal of all that could not be run.
Computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.ar.options import AROptions, KVPoolPlan
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.engine.base import StageTask
from vllm_omni.errors import InvalidRequestError, ResourceError, StageError
from vllm_omni.media.messages import as_texts, has_media, is_messages, num_chars
from vllm_omni.models.qwen2_5_omni.prompt_reader import MediaProcessor
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.request import Messages, OmniRequest, Prompt
from vllm_omni.utils.checks import brief
from vllm_omni.worker.ar.language_model import LanguageModelConfig
from vllm_omni.worker.ar.media_prompt import MediaPrompt

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
    """Makes the prompts of one stage into tokens, within its limits. media: for a model that reads more than text."""

    def __init__(
        self, options: AROptions, processor: TextProcessor, limits: ARLimits, media: MediaProcessor | None = None
    ) -> None:
        self._options = options
        self._processor = processor
        self._limits = limits
        self._media = media

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

    def check(self, request: OmniRequest, params: SamplingParams) -> None:
        """Refuses a request that could not be run. Of media only the headers are read."""
        prompt = read_prompt(self._options, request, {})
        use_audio_in_video = _use_audio_in_video(request)
        if self._media is None or not is_messages(prompt) or not has_media(prompt):
            self.prepare(prompt, params)
            return
        self._check_chars(prompt)
        self._check_length(self._media.check(prompt, use_audio_in_video))

    def prepare_task(self, task: StageTask, stage: StageConfig, params: SamplingParams) -> PreparedPrompt:
        """As `prepare`; StageError where the words are another stage's, so that its name stands in it."""
        prompt = read_prompt(self._options, task.request, task.inputs)
        try:
            return self.prepare(prompt, params, _use_audio_in_video(task.request))
        except InvalidRequestError as error:
            if "prompt" not in task.inputs:
                raise
            raise StageError(f"cannot read what {stage.edges['prompt'].source} gave: {error}") from error

    def prepare(
        self, prompt: Prompt | MediaPrompt, params: SamplingParams, use_audio_in_video: bool = False
    ) -> PreparedPrompt:
        """Tokens within the limits; InvalidRequestError (or ResourceError: the KV pool is too small) for what cannot be
        run. Media are decoded.
        """
        if isinstance(prompt, MediaPrompt):
            return self._prepare_read(prompt, params)
        self._check_chars(prompt)
        if is_messages(prompt):
            if self._media is not None and has_media(prompt):
                return self._prepare_media(self._media, prompt, params, use_audio_in_video)
            prompt = as_texts(prompt)
        token_ids = self._processor.encode(prompt)
        if not token_ids:
            raise InvalidRequestError("prompt: got no tokens, expected at least one")
        if self._media is not None:
            self._media.check_token_ids(token_ids)
        kept = self._truncate(token_ids)
        self._check_vocabulary("prompt", kept)
        return PreparedPrompt(kept, len(token_ids) - len(kept), self._room(len(kept), params))

    def _prepare_media(
        self, media: MediaProcessor, messages: Messages, params: SamplingParams, use_audio_in_video: bool
    ) -> PreparedPrompt:
        self._check_length(media.check(messages, use_audio_in_video))
        return self._prepare_read(media.read(messages, use_audio_in_video), params)

    def _prepare_read(self, read: MediaPrompt, params: SamplingParams) -> PreparedPrompt:
        """Of a prompt whose media are read already; it is never cut."""
        if self._options.part != "thinker":
            raise InvalidRequestError("prompt: got media, expected words; this stage's model reads nothing else")
        self._check_length(len(read.token_ids))
        self._check_vocabulary("messages", read.token_ids)
        return PreparedPrompt(list(read.token_ids), 0, self._room(len(read.token_ids), params), read)

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

    def _check_chars(self, prompt: Prompt) -> None:
        count = num_chars(prompt)
        if count > self._limits.max_prompt_chars:
            raise InvalidRequestError(
                f"prompt: got {count} characters, expected at most {self._limits.max_prompt_chars}; "
                "shorten it, or raise limits.max_prompt_chars"
            )

    def _max_prompt_tokens(self) -> tuple[int, str]:
        """The most tokens of a prompt, and the key that says so."""
        limit = self._limits.model_len - (1 if self._options.can_write else 0)
        if self._options.max_prompt_tokens is not None and self._options.max_prompt_tokens < limit:
            return self._options.max_prompt_tokens, "max_prompt_tokens"
        return limit, "max_model_len"

    def _check_length(self, num_tokens: int) -> None:
        """Of a prompt with media, which is never cut."""
        limit, key = self._max_prompt_tokens()
        if num_tokens > limit:
            raise InvalidRequestError(
                f"messages: got {num_tokens} tokens with their media, expected at most {limit} ({key}); "
                "use smaller or shorter media"
            )
        self._check_pool(num_tokens + (1 if self._options.can_write else 0))

    def _truncate(self, token_ids: list[int]) -> list[int]:
        limit, key = self._max_prompt_tokens()
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


def _use_audio_in_video(request: OmniRequest) -> bool:
    value = request.fields.get("use_audio_in_video")
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"use_audio_in_video: got {brief(value)}, expected true or false")
    return bool(value)
