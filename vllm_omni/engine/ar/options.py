"""The YAML keys of an AR stage, checked, and the size of the KV pool that follows from them. Reads no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.worker.ar.language_model import LanguageModelConfig

TASKS = ("generate", "encode")
PROMPTS = ("prompt", "negative_prompt")
PARTS = ("thinker", "talker")
STATE_PORTS = ("prompt_states", "reply_states")  # of a thinker, without being declared
THINKER_PORTS = frozenset({*STATE_PORTS, "prompt_positions"})
WORD_KEYS = (
    *("task", "prompt", "tokenizer", "chat_template", "chat_template_kwargs", "system_prompt", "outputs", "sections"),
    *("max_prompt_tokens", "truncate_prompt"),
)
RESERVED_TEMPLATE_KEYS = ("conversation", "tokenize", "add_generation_prompt")
WRITTEN_KEYS = frozenset({"text", "token_ids", "finish_reason", "completions"})
META_KEYS = WRITTEN_KEYS | {"prompt_tokens", "truncated_tokens"}
DEFAULT_MODEL_LEN = 4096
DEFAULT_POOL_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Tap:
    """An output port of hidden states.

    layers: indices into transformers' `hidden_states` (0 the embeddings, i after layer i, the last after the final
    norm; negative ones count from the end), concatenated on the feature axis. tokens: whose states: "prompt" (all of
    it, template included) or "completion" (the written tokens, without an end-of-sequence or stop token).
    """

    layers: tuple[int, ...]
    tokens: str

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
class KVPoolPlan:
    """A pool of `num_blocks` blocks of `block_bytes` (keys, values and tapped states). limited_by: the key that set the
    number.
    """

    num_blocks: int
    block_bytes: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class AROptions:
    """What the YAML of an AR stage may say.

    part: which model of a checkpoint that holds several ("thinker", "talker"); None where it is one model. task:
    "generate" writes tokens, "encode" only computes states. prompt: which field of the request is read when no
    edge brings the prompt. tokenizer: its folder (default: the model's own, else `tokenizer` beside it). chat_template:
    whether plain strings become a user message in the tokenizer's template, where it has one; chat_template_kwargs go
    to it. system_prompt: the system message of chats that have none; None leaves that to the template. outputs:
    port -> hidden states to tap, see Tap. sections: labels; the first written line that begins with `label:` gives its
    other words to a text port of that name. max_model_len: most tokens of a sequence (the model's positions, but 4096
    at most where the size of the KV pool is not given). max_prompt_tokens: most tokens of a prompt; a longer one is an
    error, or keeps its first tokens when truncate_prompt is set. max_num_seqs and max_num_batched_tokens bound one
    step. The KV pool has num_blocks blocks of block_size tokens, or enough for max_num_seqs full sequences in at most
    kv_memory_mb (256).
    """

    part: str | None = None
    task: str = "generate"
    prompt: str = "prompt"
    tokenizer: str | None = None
    chat_template: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    max_model_len: int | None = None
    max_prompt_tokens: int | None = None
    truncate_prompt: bool = False
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_memory_mb: float | None = None
    num_blocks: int | None = None
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.part is not None:
            _check_choice("part", self.part, PARTS)
        _check_choice("task", self.task, TASKS)
        _check_choice("prompt", self.prompt, PROMPTS)
        self._check_types()
        self._check_limits()
        if self.part == "talker":
            self._refuse_words()
        taps = {port: _tap(port, value, self.task) for port, value in self.outputs.items()}
        object.__setattr__(self, "outputs", taps)
        object.__setattr__(self, "sections", _sections(self.sections, taps, self.task))
        taken = THINKER_PORTS.intersection((*taps, *self.sections)) if self.part == "thinker" else ()
        if taken:
            raise ConfigError(f"outputs: got {', '.join(sorted(taken))}, which a thinker has by itself; remove it")
        if self.task == "encode" and not taps and self.part is None:
            raise ConfigError(
                "outputs: nothing, expected at least one port for task encode, as hidden_states: {layers: [-2]}"
            )

    @property
    def taps(self) -> Mapping[str, Tap]:
        """`outputs`, checked."""
        return self.outputs

    @property
    def meta_keys(self) -> frozenset[str]:
        """What the meta of a payload of written text may hold."""
        return META_KEYS.union(self.sections) if self.can_write else META_KEYS - WRITTEN_KEYS

    @property
    def can_write(self) -> bool:
        return self.task == "generate"

    def model_len(self, config: LanguageModelConfig) -> int:
        """Most tokens of one sequence; ConfigError when more are asked for than the model has positions."""
        if self.max_model_len is None:
            is_pool_given = self.kv_memory_mb is not None or self.num_blocks is not None
            return (
                config.max_position_embeddings
                if is_pool_given
                else min(config.max_position_embeddings, DEFAULT_MODEL_LEN)
            )
        if self.max_model_len > config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len: got {self.max_model_len}, expected at most {config.max_position_embeddings}, "
                "the model's positions"
            )
        return self.max_model_len

    def tapped_layers(self, config: LanguageModelConfig) -> dict[str, tuple[int, ...]]:
        """Port -> indices of its layers, counted from the start; of a thinker the embeddings and the last states,
        too.
        """
        layers = {
            port: tap.resolved_layers(config.num_layers, f"outputs.{port}.layers") for port, tap in self.taps.items()
        }
        if self.part == "thinker":
            ports = STATE_PORTS if self.can_write else STATE_PORTS[:1]
            layers |= dict.fromkeys(ports, (0, config.num_layers))
        return layers

    def plan_pool(self, config: LanguageModelConfig, itemsize: int) -> KVPoolPlan:
        """The KV pool, as if every declared port were wanted; ConfigError when not one block fits into kv_memory_mb."""
        tapped = {layer for layers in self.tapped_layers(config).values() for layer in layers}
        num_kv_layers = config.num_layers if self.can_write else max(tapped)
        token_bytes = (
            num_kv_layers * 2 * config.num_kv_heads * config.head_dim + len(tapped) * config.hidden_size
        ) * itemsize
        block_bytes = token_bytes * self.block_size
        if self.num_blocks is not None:
            return KVPoolPlan(self.num_blocks, block_bytes, "num_blocks")
        needed = -(-self.model_len(config) // self.block_size) * self.max_num_seqs
        if self.kv_memory_mb is None:
            affordable, limit = max(1, DEFAULT_POOL_BYTES // block_bytes), "the default of 256 MB"
        else:
            affordable, limit = int(self.kv_memory_mb * 2**20) // block_bytes, "kv_memory_mb"
        if affordable == 0:
            raise ConfigError(
                f"kv_memory_mb: got {self.kv_memory_mb:g}, expected at least {block_bytes / 2**20:.3g}, one block"
            )
        return KVPoolPlan(min(needed, affordable), block_bytes, "max_num_seqs" if needed <= affordable else limit)

    def activation_bytes(self, config: LanguageModelConfig, itemsize: int) -> int:
        """The widest moment of a step: a layer's residual, normed states and MLP, or the logits with a float32 copy."""
        layer = self.max_num_batched_tokens * (4 * config.hidden_size + 3 * config.intermediate_size) * itemsize
        logits = self.max_num_seqs * config.vocab_size * (itemsize + 4) if self.can_write else 0
        return max(layer, logits)

    def _check_types(self) -> None:
        for name in ("chat_template", "truncate_prompt", "prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected true or false")
        if self.kv_memory_mb is not None and self.num_blocks is not None:
            raise ConfigError("num_blocks: given together with kv_memory_mb; keep one of them")
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise ConfigError(f"tokenizer: got {self.tokenizer!r}, expected a folder")
        if self.system_prompt is not None and not isinstance(self.system_prompt, str):
            raise ConfigError(f"system_prompt: got {self.system_prompt!r}, expected text")
        for name in ("chat_template_kwargs", "outputs"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected a mapping")
        for name in self.chat_template_kwargs:
            if name in RESERVED_TEMPLATE_KEYS:
                raise ConfigError(f"chat_template_kwargs.{name}: set by the stage itself; remove it")

    def _refuse_words(self) -> None:
        """Keys about words: a talker reads states and writes codes."""
        plain = AROptions()
        for key in WORD_KEYS:
            value = getattr(self, key)
            if value != getattr(plain, key) and (value or key == "chat_template"):
                raise ConfigError(f"{key}: got {value!r}, but part talker reads and writes no words; remove it")

    def _check_limits(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name}: got null, expected an integer")
            self._check_limit(name, low=1, integer=True)
        for name in ("max_model_len", "max_prompt_tokens", "num_blocks"):
            self._check_limit(name, low=1, integer=True)
        self._check_limit("kv_memory_mb", low=0, above_low=True)

    def _check_limit(self, name: str, low: float, integer: bool = False, above_low: bool = False) -> None:
        value = getattr(self, name)
        if value is not None:
            check_number(name, value, low, integer=integer, above_low=above_low, raises=ConfigError)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: got {value!r}{did_you_mean(str(value), choices)}")


def _tap(port: object, value: object, task: str) -> Tap:
    where = f"outputs.{port}"
    if not isinstance(port, str) or not port.isidentifier() or port == "text":
        raise ConfigError(f"{where}: got the port name {port!r}, expected an identifier other than 'text'")
    if isinstance(value, Tap):
        value = {"layers": value.layers, "tokens": value.tokens}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: got {value!r}, expected {{layers: [-2], tokens: prompt}}")
    for key in value:
        if key not in ("layers", "tokens"):
            raise ConfigError(f"{where}.{key}: unknown key{did_you_mean(str(key), ('layers', 'tokens'))}")
    layers = value.get("layers")
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ConfigError(f"{where}.layers: got {layers!r}, expected a list of layer indices, as [-2]")
    for layer in layers:
        check_number(f"{where}.layers", layer, integer=True, raises=ConfigError)
    tokens = value.get("tokens", "prompt" if task == "encode" else "completion")
    _check_choice(f"{where}.tokens", tokens, ("prompt", "completion"))
    if tokens == "completion" and task == "encode":
        raise ConfigError(f"{where}.tokens: got 'completion', expected 'prompt': task encode writes nothing")
    return Tap(tuple(int(layer) for layer in layers), tokens)


def _sections(labels: object, taps: Mapping[str, Tap], task: str) -> tuple[str, ...]:
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        raise ConfigError(f"sections: got {labels!r}, expected a list of labels, as [scene, sound]")
    for index, label in enumerate(labels):
        where = f"sections[{index}]"
        if not isinstance(label, str) or not label.isidentifier() or label in META_KEYS:
            raise ConfigError(
                f"{where}: got {label!r}, expected an identifier other than {', '.join(sorted(META_KEYS))}"
            )
        if label in taps or label in labels[:index]:
            raise ConfigError(f"{where}: got {label!r}, which another port is called; choose another")
    if labels and task == "encode":
        raise ConfigError("sections: got some, expected none: task encode writes nothing")
    return tuple(labels)
