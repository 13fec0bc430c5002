"""What comes into an AR stage: which prompt a task means, its tokens, and the refusal of all that could not be run.
Computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm_omni.engine.ar.chat.truncation import ChatCutter, Side, cut_tokens
from vllm_omni.engine.ar.options import SIDES, AROptions
from vllm_omni.engine.ar.prompt_rows import check_not_dropped
from vllm_omni.engine.ar.source_images import source_images, with_images
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import InvalidRequestError, ResourceError
from vllm_omni.media.messages import (
    MediaPart,
    as_texts,
    has_media,
    is_messages,
    media_parts,
    num_chars,
    without_sources,
)
from vllm_omni.media.source_files import caller_media
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.request import Messages, OmniRequest, Prompt
from vllm_omni.utils.checks import brief
from vllm_omni.utils.plain import num_json_chars
from vllm_omni.worker.ar.chat import CHAT_KEYS, Chat
from vllm_omni.worker.ar.media_prompt import MediaPrompt
from vllm_omni.worker.ar.prompt_reader import MediaPlan, PromptReader
from vllm_omni.worker.background import Stop

DEFAULT_MAX_TOKENS = 16384
DEFAULT_LIMIT = f"max_tokens ({DEFAULT_MAX_TOKENS}, the default)"
TRUNCATES = "truncate_prompt"


@dataclass(frozen=True, slots=True)
class ARLimits:
    """The largest values of a stage."""

    vocab_size: int
    model_len: int  # tokens of a sequence
    pool_tokens: int  # what the whole KV pool holds
    pool_limited_by: str  # the key that would raise it
    max_prompt_chars: int
    max_outputs: int

    def check_params(self, params: StageParams, *, why_one: str | None = None, hint: str = "") -> SamplingParams:
        """Refuses what no prompt would make right. why_one: why there can be but one sample, if so. hint: ends what is
        said of tokens.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params: got {type(params).__name__}, expected SamplingParams")
        for name, tokens in (("stop_token_ids", params.stop_token_ids or ()), ("logit_bias", params.logit_bias or ())):
            self.check_vocabulary(name, tokens, hint)
        n = params.n or 1
        if n > self.max_outputs:
            raise InvalidRequestError(f"n: got {n}, expected at most {self.max_outputs} (limits.max_outputs)")
        if n > 1 and why_one is not None:
            raise InvalidRequestError(f"n: got {n}, expected 1: {why_one}")
        if params.max_tokens is not None and (params.min_tokens or 0) > params.max_tokens:
            raise InvalidRequestError(
                f"min_tokens: got {params.min_tokens}, expected at most max_tokens ({params.max_tokens})"
            )
        return params

    def check_vocabulary(self, name: str, token_ids: Sequence[int] | Mapping[int, float], hint: str = "") -> None:
        """InvalidRequestError for a token that the model does not have."""
        for token in token_ids:
            if token >= self.vocab_size:
                raise InvalidRequestError(
                    f"{name}: got the token id {token}, expected less than {self.vocab_size}{hint}"
                )

    def pool_words(self) -> str:
        """What to say of a text that ends because no block is left."""
        return (
            f"the KV pool ({self.pool_tokens} tokens, prompt included, as {self.pool_limited_by} sets it); raise "
            "kv_memory_mb, num_blocks or resources.max_memory_gb"
        )

    def check_pool(self, num_tokens: int) -> None:
        """ResourceError for a sequence that the whole pool could not hold."""
        if num_tokens > self.pool_tokens:
            raise ResourceError(
                f"prompt: got {num_tokens} tokens (one to be written included), expected at most "
                f"{self.pool_tokens}, the whole KV pool, as {self.pool_limited_by} sets it; "
                "raise num_blocks, kv_memory_mb or resources.max_memory_gb"
            )


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt's tokens, checked: all that a task needs."""

    token_ids: list[int]
    num_truncated: int  # how many it lost
    max_new_tokens: int  # room for written ones
    room_limit: str | None = None  # what keeps it so small, where nobody asked for that
    media: MediaPrompt | None = None  # with positions and encoder inputs; None for text alone

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt whose media have been measured, and not been decoded."""

    plan: MediaPlan

    @property
    def num_tokens(self) -> int:
        return self.plan.num_tokens


Prepared = PreparedPrompt | PlannedPrompt


def prompt_keys(options: AROptions) -> frozenset[str]:
    """The keys of `OmniRequest.fields` that say how the request's own prompt is read."""
    chat_keys = CHAT_KEYS if options.prompt_template is None else frozenset()  # of the chat template's alone
    return chat_keys | {TRUNCATES}


def read_prompt(options: AROptions, request: OmniRequest, inputs: Mapping[str, Any]) -> Prompt:
    """What a task's prompt is: what its edge brings, else the field of the request that the stage reads."""
    if "prompt" in inputs:
        return inputs["prompt"]
    return request.prompt if options.prompt == "prompt" else request.negative_prompt_text()


class ARInput:
    """Makes the prompts of one stage into tokens, within its limits. Safe to ask from any thread."""

    def __init__(
        self,
        options: AROptions,
        processor: TextProcessor,
        limits: ARLimits,
        reader: PromptReader[Any] | None = None,
        reads_request: bool = True,
    ) -> None:
        """reads_request: whether the prompt is the request's own, so that what it says of its prompt counts here."""
        self._options = options
        self._processor = processor
        self._limits = limits
        self._reader = reader  # of a model that reads more than text
        self._reads_request = reads_request

    def prepare(self, prompt: Prompt, request: OmniRequest, params: SamplingParams) -> Prepared:
        """Tokens within the limits; of a prompt with media a plan, for which only headers have been read.
        InvalidRequestError (or ResourceError: the KV pool is too small) for what could not be run.
        """
        keys = prompt_keys(self._options) if self._reads_request else ()
        fields = {key: request.fields[key] for key in keys if request.fields.get(key) is not None}
        side = _side(fields)
        if self._reader is not None:
            self._reader.check_request(request)
            images = source_images(self._options, request)
            if images:
                return self._planned(*with_images(prompt, images), request, fields)
            if is_messages(prompt) and has_media(prompt):
                return self._planned(prompt, media_parts(prompt), request, fields)
        if is_messages(prompt):
            self._check_chars(prompt)
            prompt = as_texts(prompt)
        messages = self._processor.as_messages(prompt)
        if messages is None:
            _check_no_chat_keys(fields)
            self._check_chars(prompt)
            return self._checked(prompt, self._processor.encode(prompt), side, params)
        chat = Chat.of(messages, fields)
        self._check_chars(messages, chat)
        return self._checked(chat, self._processor.encode(chat), side, params)

    @caller_media()
    def read(self, planned: PlannedPrompt, params: SamplingParams, stop: Stop) -> PreparedPrompt:
        """The prompt with its media decoded. It may have another length than its headers said, and is never cut."""
        assert self._reader is not None
        return self.accept(self._reader.read(planned.plan, stop), params)

    def accept(self, media: MediaPrompt, params: SamplingParams) -> PreparedPrompt:
        """A prompt that has been read, within the limits."""
        self._check_length(len(media.token_ids))
        self._limits.check_vocabulary("messages", media.token_ids)
        room, limit = self._room(len(media.token_ids), params)
        return PreparedPrompt(list(media.token_ids), 0, room, limit, media)

    def _planned(
        self, messages: Messages, parts: Sequence[MediaPart], request: OmniRequest, fields: Mapping[str, Any]
    ) -> PlannedPrompt:
        assert self._reader is not None
        if self._options.pad_prompt_to is not None:
            raise InvalidRequestError("messages: got media, expected text: the stage pads prompts (pad_prompt_to)")
        self._check_chars(messages, Chat.of(messages, fields))
        if TRUNCATES in fields:
            raise InvalidRequestError(f"{TRUNCATES}: got it with media, which are never cut; leave it out")
        plan = self._reader.plan(Chat.of(without_sources(messages), fields), parts, request)
        self._check_length(plan.num_tokens)
        return PlannedPrompt(plan)

    def _checked(
        self, prompt: Prompt | Chat, token_ids: list[int], side: Side | None, params: SamplingParams
    ) -> PreparedPrompt:
        """The tokens of a prompt, cut where it is too long and may be cut."""
        if not token_ids:
            raise InvalidRequestError("prompt: got no tokens, expected at least one")
        if self._reader is not None:
            self._reader.check_token_ids(token_ids)
        kept = self._truncate(prompt, token_ids, side)
        self._limits.check_vocabulary("prompt", kept)
        return PreparedPrompt(kept, len(token_ids) - len(kept), *self._room(len(kept), params))

    def _room(self, num_tokens: int, params: SamplingParams) -> tuple[int, str | None]:
        """How many tokens may be written after a prompt of this length, and why no more where nobody asked for that."""
        room, limit, options = 0, None, self._options
        check_not_dropped(options, num_tokens)
        if options.can_write:
            limits = self._limits
            room, limit = min(
                (params.max_tokens or DEFAULT_MAX_TOKENS, None if params.max_tokens else DEFAULT_LIMIT),
                (limits.model_len - num_tokens, f"max_model_len ({limits.model_len} tokens, prompt included)"),
                (max(limits.pool_tokens - num_tokens, 1), limits.pool_words()),
                key=lambda choice: choice[0],
            )
        self._limits.check_pool(max(num_tokens + (1 if room else 0), options.padded_len or 0))
        if (params.min_tokens or 0) > room and options.can_write:
            raise InvalidRequestError(
                f"min_tokens: got {params.min_tokens}, expected at most {room}, the room after {num_tokens} tokens"
            )
        return room, limit

    def _check_chars(self, prompt: Prompt, chat: Chat | None = None) -> None:
        """Of the prompt, and of what else the chat template is given."""
        count = num_chars(prompt)
        if chat is not None:
            count += num_json_chars(chat.tools) + num_json_chars(chat.template_kwargs)
        if count > self._limits.max_prompt_chars:
            raise InvalidRequestError(
                f"prompt: got {count} characters, expected at most {self._limits.max_prompt_chars}; "
                "shorten it, or raise limits.max_prompt_chars"
            )

    def _max_prompt_tokens(self) -> tuple[int, str]:
        """The most tokens of a prompt, those that are dropped included, and the key that says so."""
        options = self._options
        limit, key = self._limits.model_len - (1 if options.can_write else 0), "max_model_len"
        for name in ("pad_prompt_to", "max_prompt_tokens"):
            most = limit if getattr(options, name) is None else getattr(options, name) + options.num_dropped_tokens
            limit, key = (most, name) if most < limit else (limit, key)
        return limit, key

    def _check_length(self, num_tokens: int) -> None:
        """Of a prompt with media, which is never cut."""
        limit, key = self._max_prompt_tokens()
        if num_tokens > limit:
            raise InvalidRequestError(
                f"messages: got {num_tokens} tokens with their media, expected at most {limit} ({key}); "
                "use smaller or shorter media"
            )
        self._limits.check_pool(num_tokens + (1 if self._options.can_write else 0))

    def _truncate(self, prompt: Prompt | Chat, token_ids: list[int], side: Side | None) -> list[int]:
        limit, key = self._max_prompt_tokens()
        if len(token_ids) <= limit:
            return token_ids
        chosen = side or self._options.truncate_prompt
        if not chosen or limit == 0:
            raise InvalidRequestError(
                f"prompt: got {len(token_ids)} tokens, expected at most {limit} ({key}); shorten it, or set {TRUNCATES}"
            )
        if chosen is True:
            return token_ids[:limit]
        cut = self._cut(prompt, token_ids, chosen, limit)
        if cut is None:
            raise InvalidRequestError(
                f"prompt: got {len(token_ids)} tokens, expected at most {limit} ({key}); so few hold no text "
                f"between the marks of its chat template, so {TRUNCATES} does not help; shorten it"
            )
        return cut

    def _cut(self, prompt: Prompt | Chat, token_ids: list[int], side: Side, limit: int) -> list[int] | None:
        if isinstance(prompt, Chat):
            return ChatCutter(prompt, limit, self._processor.encode).cut(side)
        before, behind = self._options.num_dropped_tokens, 0  # of token ids
        if isinstance(prompt, str):
            before, behind = self._processor.special_ends(prompt, token_ids)
        num_kept = limit - before - behind
        if num_kept <= 0:
            return None
        stop = len(token_ids) - behind
        return [*token_ids[:before], *cut_tokens(token_ids[before:stop], side, num_kept), *token_ids[stop:]]


def _side(fields: Mapping[str, Any]) -> Side | None:
    side = fields.get(TRUNCATES)
    if side is not None and not (isinstance(side, str) and side in SIDES):
        raise InvalidRequestError(f"{TRUNCATES}: got {brief(side)}, expected one of {', '.join(SIDES)}")
    return cast("Side | None", side)


def _check_no_chat_keys(fields: Mapping[str, Any]) -> None:
    for key in sorted(CHAT_KEYS & fields.keys()):
        raise InvalidRequestError(
            f"{key}: got it with a prompt that is no chat, expected chat messages (`messages`), or text to which a "
            "chat template applies; leave it out"
        )
