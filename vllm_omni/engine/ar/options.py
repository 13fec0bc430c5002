"""The YAML keys of an AR stage, checked. Reads no files; types are the builder's to check, sizes the spec's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_omni import registry
from vllm_omni.config.schema import MAX_MB, LoRAConfig
from vllm_omni.core.ar.prompt_lookup import PromptLookup
from vllm_omni.engine.ar.prompt_template import PromptTemplate
from vllm_omni.errors import ConfigError
from vllm_omni.layers.attention.choice import AUTO
from vllm_omni.utils.checks import brief, check_number, did_you_mean
from vllm_omni.worker.ar.chat import RESERVED_TEMPLATE_KEYS
from vllm_omni.worker.ar.language_model import LanguageModelConfig

SIDES = ("left", "right", "middle")
WRITTEN_KEYS = frozenset({"text", "token_ids", "finish_reason", "completions"})
META_KEYS = WRITTEN_KEYS | {"prompt_tokens", "truncated_tokens"}
MAX_DRAFT_TOKENS, MAX_NGRAM = 64, 16
MAX_WAIT_S = 3600
KEPT_TOKENS = 2048  # of prefixes that nothing uses, in a pool of no stated size
DEFAULT_MODEL_LEN = 4096  # that the smallest default pool holds


@dataclass(frozen=True, slots=True)
class Tap:
    """An output port of hidden states, one row for each token."""

    # indices into transformers' `hidden_states` (0 the embeddings, i after layer i, the last after the final norm;
    # negative ones count from the end), concatenated on the feature axis; a placeholder of media has no embedding of
    # its own, so that zeros stand there
    layers: tuple[int, ...]
    # whose states: the prompt's (all of it, template included), the completion's (the written tokens, without an
    # end-of-sequence or stop token), or those of written tokens that another token followed: what the model was fed
    # back, the last written one not among them; None: the prompt's where nothing is written, else the completion's
    tokens: Literal["prompt", "completion", "followed"] | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("layers: got none, expected a list of layer indices, as [-2]")

    def resolved_layers(self, num_layers: int, where: str) -> tuple[int, ...]:
        """`layers` as indices from the start; ConfigError for one that a model of this depth does not have."""
        for layer in self.layers:
            if not -(num_layers + 1) <= layer <= num_layers:
                raise ConfigError(
                    f"{where}: got {layer}, expected {-(num_layers + 1)} to {num_layers}, "
                    f"as the model has {num_layers} layers"
                )
        return tuple(layer % (num_layers + 1) for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a text is drafted ahead of the model, which then computes several tokens in one step and keeps the right
    ones.
    """

    method: Literal["prompt_lookup"]  # what followed the last tokens where they stood before, in prompt or text
    max_tokens: int = 8  # of a draft
    min_ngram: int = 2  # fewest last tokens that must have stood before
    max_ngram: int = 4  # most of them that are looked for, and first

    def __post_init__(self) -> None:
        check_number("max_tokens", self.max_tokens, 1, MAX_DRAFT_TOKENS, integer=True, raises=ConfigError)
        check_number("min_ngram", self.min_ngram, 1, MAX_NGRAM, integer=True, raises=ConfigError)
        check_number("max_ngram", self.max_ngram, self.min_ngram, MAX_NGRAM, integer=True, raises=ConfigError)

    def make_lookup(self) -> PromptLookup:
        return PromptLookup(self.max_tokens, self.min_ngram, self.max_ngram)


@dataclass(frozen=True, slots=True)
class AROptions:
    """What the YAML of an AR stage may say."""

    part: str | None = None  # which model of a checkpoint that holds several; None where it is one model
    task: Literal["generate", "encode"] = "generate"  # write tokens, or only compute states
    # whether pictures and other media are read; None: where the folder holds what its model needs for that
    reads_media: bool | None = None
    prompt: Literal["prompt", "negative_prompt"] = "prompt"  # what is read of the request where no edge brings it
    tokenizer: str | None = None  # its folder; None: the model's own, else `tokenizer` beside it
    chat_template: bool = True  # whether strings become a user message in the tokenizer's template, where it has one
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # what the template is given besides
    generation_config: Literal["read", "ignore"] = "read"  # whether the checkpoint's own sampling is the default
    system_prompt: str | None = None  # the system message of chats that have none; None leaves that to the template
    prompt_template: PromptTemplate | None = None  # what wraps the words instead of the chat template; encode alone
    outputs: Mapping[str, Tap] = field(default_factory=dict)  # port -> the hidden states that it gives
    sections: tuple[str, ...] = ()  # labels; the first written line `label: words` gives its words to a port `label`
    rope_scaling: Mapping[str, Any] | None = None  # scaling of positions, as in transformers; None: the config.json's
    max_model_len: int | None = None  # tokens of a sequence; None: the model's positions
    max_prompt_tokens: int | None = None  # a longer prompt, without what is dropped of it, is an error, or is cut
    # what a prompt that is too long loses: beginning, end or middle, while the marks of the chat template stay;
    # true: its last tokens, of a template or not; false: nothing, it is refused
    truncate_prompt: bool | Literal["left", "right", "middle"] = False
    # rows of the prompt's ports: a shorter prompt is padded with the tokenizer's pad token, and pads have states as
    # well, each of the prompt alone and its own position; None: as many as the prompt has tokens; encode alone
    pad_prompt_to: int | None = None
    max_num_seqs: int = 64  # sequences of one step
    max_num_batched_tokens: int = 2048  # tokens of one step
    # the longest, about, that running texts wait for a step in which prompts are computed, while somebody reads one of
    # them as it is written; None: as long as it takes
    max_decode_wait_s: float | None = 0.25
    block_size: int = 16  # tokens of a block of the KV pool
    # the pool's most; None: what the memory budget leaves, at least a sequence of max_model_len (4096 by default)
    kv_memory_mb: float | None = None
    num_blocks: int | None = None  # the pool's blocks; None: enough for max_num_seqs full sequences, as memory allows
    prefix_caching: bool = True  # whether equal beginnings of prompts are computed once
    speculation: Speculation | None = None  # None: a token a step
    attention: str = AUTO  # a row of the registry's table "attention"; "auto" chooses by device
    # whether decode steps are captured in CUDA graphs; None: where device, model and attention backend allow it
    cuda_graphs: bool | None = None
    lora: LoRAConfig | None = None  # the adapters that requests may use; None: none

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.kv_memory_mb is not None and self.num_blocks is not None:
            raise ConfigError("num_blocks: given together with kv_memory_mb; keep one of them")
        for name in self.chat_template_kwargs:
            if name in RESERVED_TEMPLATE_KEYS:
                raise ConfigError(f"chat_template_kwargs.{name}: set by the stage itself; remove it")
        known = {AUTO, *registry.names("attention")}
        if self.attention not in known:
            raise ConfigError(f"attention: got {brief(self.attention)}{did_you_mean(self.attention, known)}")
        object.__setattr__(self, "outputs", {port: self._tap(port, tap) for port, tap in self.outputs.items()})
        self._check_sections()
        self._check_speculation()
        self._check_prompt()
        if not self.can_write and not self.outputs:
            raise ConfigError(
                "outputs: nothing, expected at least one port for task encode, as hidden_states: {layers: [-2]}"
            )

    @property
    def can_write(self) -> bool:
        return self.task == "generate"

    @property
    def num_dropped_tokens(self) -> int:
        """First tokens of a prompt whose states no port holds."""
        return 0 if self.prompt_template is None else self.prompt_template.drop_tokens

    @property
    def padded_len(self) -> int | None:
        """Tokens of every prompt with its pads; None where there are none."""
        return None if self.pad_prompt_to is None else self.pad_prompt_to + self.num_dropped_tokens

    @property
    def least_kept_blocks(self) -> int | None:
        """Blocks that prefixes may have which nothing uses, without more memory being used; None: all of the pool, as
        its size is what somebody has said.
        """
        if self.kv_memory_mb is not None or self.num_blocks is not None:
            return None
        return -(-KEPT_TOKENS // self.block_size)

    @property
    def meta_keys(self) -> frozenset[str]:
        """What the meta of a payload of written text may hold."""
        return META_KEYS.union(self.sections) if self.can_write else META_KEYS - WRITTEN_KEYS

    def model_len(self, config: LanguageModelConfig) -> int:
        """Most tokens of one sequence; ConfigError when more are asked for than the model has positions."""
        positions = config.num_positions
        if self.max_model_len is None:
            return positions
        if self.max_model_len > positions:
            raise ConfigError(
                f"max_model_len: got {self.max_model_len}, expected at most {positions}, the model's positions; "
                "rope_scaling extends them, where the model is made for that"
            )
        return self.max_model_len

    def least_len(self, config: LanguageModelConfig) -> int:
        """Tokens of a sequence for which there is room in any case, where no pool is given."""
        return min(self.model_len(config), self.max_model_len or DEFAULT_MODEL_LEN)

    def tapped_layers(self, config: LanguageModelConfig) -> dict[str, tuple[int, ...]]:
        """Port -> indices of its layers, counted from the start."""
        return {
            port: tap.resolved_layers(config.num_layers, f"outputs.{port}.layers") for port, tap in self.outputs.items()
        }

    def _tap(self, port: str, tap: Tap) -> Tap:
        """The tap with its default, within what the task can give."""
        where = f"outputs.{port}"
        if not port.isidentifier() or port == "text":
            raise ConfigError(f"{where}: got the port name {port!r}, expected an identifier other than 'text'")
        if tap.tokens is None:
            return dataclasses.replace(tap, tokens="completion" if self.can_write else "prompt")
        if tap.tokens != "prompt" and not self.can_write:
            raise ConfigError(f"{where}.tokens: got {tap.tokens!r}, expected 'prompt': task encode writes nothing")
        return tap

    def _check_numbers(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            check_number(name, getattr(self, name), 1, integer=True, raises=ConfigError)
        for name in ("max_model_len", "max_prompt_tokens", "pad_prompt_to", "num_blocks"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, integer=True, raises=ConfigError)
        for name, high in (("kv_memory_mb", MAX_MB), ("max_decode_wait_s", MAX_WAIT_S)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, high, above_low=True, raises=ConfigError)

    def _check_prompt(self) -> None:
        for name in ("prompt_template", "pad_prompt_to"):
            if self.can_write and getattr(self, name) is not None:
                raise ConfigError(f"{name}: got it with task generate, expected task encode; remove it")
        if self.prompt_template is not None and (self.chat_template_kwargs or self.system_prompt is not None):
            key = "system_prompt" if self.system_prompt is not None else "chat_template_kwargs"
            raise ConfigError(f"{key}: got it with prompt_template, which takes the chat template's place; remove it")
        if self.pad_prompt_to is not None and (self.max_prompt_tokens or 0) > self.pad_prompt_to:
            raise ConfigError(
                f"max_prompt_tokens: got {self.max_prompt_tokens}, expected at most pad_prompt_to "
                f"({self.pad_prompt_to}), the rows of every prompt; remove it"
            )

    def _check_speculation(self) -> None:
        if self.speculation is None:
            return
        if not self.can_write:
            raise ConfigError("speculation: got some, expected none: task encode writes nothing")
        if self.max_num_seqs <= self.speculation.max_tokens:
            raise ConfigError(
                f"max_num_seqs: got {self.max_num_seqs}, expected more than speculation.max_tokens "
                f"({self.speculation.max_tokens}): a draft takes places of a step that no sequence has"
            )

    def _check_sections(self) -> None:
        for index, label in enumerate(self.sections):
            where = f"sections[{index}]"
            if not label.isidentifier() or label in META_KEYS:
                raise ConfigError(
                    f"{where}: got {label!r}, expected an identifier other than {', '.join(sorted(META_KEYS))}"
                )
            if label in self.outputs or label in self.sections[:index]:
                raise ConfigError(f"{where}: got {label!r}, which another port is called; choose another")
        if self.sections and not self.can_write:
            raise ConfigError("sections: got some, expected none: task encode writes nothing")
