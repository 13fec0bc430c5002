"""What is known of an AR stage before it is loaded: its folder, its model, its limits and its memory. Says nothing of
what the stage is for: that is a subclass, by a table of the registry.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import dtype

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.ar.cache_window import CacheWindow
from vllm_omni.engine.ar.base import ARStage
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.prompt import ARLimits, PreparedPrompt
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts, StageSpec, model_folder
from vllm_omni.engine.lora import LoRASource
from vllm_omni.engine.parallel import check_devices, check_divisible
from vllm_omni.errors import ConfigError
from vllm_omni.layers.attention.base import AttentionUse
from vllm_omni.layers.attention.choice import choose_attention
from vllm_omni.layers.blocks import NONE_STREAMED
from vllm_omni.layers.shard import Shard
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.utils.device import resolve_device
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.ar.decode_graphs import capture_complaint
from vllm_omni.worker.ar.kv_pool import KVPoolPlan, activation_bytes, plan_kv_pool
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.model_runner import ModelRunner

TABLE = "ar stage"
DEFAULT_ROW = "text"


class ARSpec(StageSpec):
    """A language model over a paged KV pool."""

    options_type = AROptions
    params_type = SamplingParams
    portable_types = (PreparedPrompt,)
    can_quantize = True
    can_offload = True
    parallel_axes = ("tensor",)
    imports = ("transformers:AutoTokenizer",)

    options: AROptions
    can_write: bool  # whether its jobs sample
    prefix_caching: bool
    lora: LoRASource | None = None  # the adapters that its requests may use

    @classmethod
    def describe(cls, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> ARSpec:
        options: AROptions = stage.options
        folder = model_folder(stage, folders, "the folder of a language model")
        model = LanguageModelFolder.open(folder, options.part, options.rope_scaling, stage.variant, options.reads_media)
        row = model.name if model.name in registry.names(TABLE) else DEFAULT_ROW
        spec: type[ARSpec] = registry.resolve(TABLE, row)
        described = spec(stage, config, folders, model)
        described.check_capture()
        return described

    def __init__(
        self, stage: StageConfig, config: OmniConfig, folders: ModelFolders, model: LanguageModelFolder
    ) -> None:
        """model: the stage's, its configuration read by `describe`. folders: for options that name further ones."""
        super().__init__(stage, config, folders)
        self.options = stage.options
        self.model = model
        self._check_parallel()
        self.tapped = self.options.tapped_layers(model.config)  # port -> indices of its layers
        self.model_len = self.options.model_len(model.config)
        device = resolve_device(stage.device)
        use = AttentionUse(device, self.precision.dtype, self.options.block_size, model.config.head_dim)
        self.attention = choose_attention(self.options.attention, use)  # a row of the registry
        self._granted_bytes = 0  # beyond the smallest pool, where no key says how large it is

    def check_capture(self) -> None:
        """ConfigError where graphs are asked for that cannot be had."""
        complaint = self._capture_complaint
        if self.options.cuda_graphs and complaint is not None:
            raise ConfigError(f"cuda_graphs: got true, but {complaint}; remove the key")

    @abstractmethod
    def tapped_layers(self, reads: ReadPorts) -> frozenset[int]:
        """Indices into `hidden_states` that are kept where these ports are read."""

    @abstractmethod
    def make_stage(self, context: EngineContext, runner: ModelRunner) -> ARStage:
        """The running half, side files read."""

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured in graphs."""
        return self.options.cuda_graphs is not False and self._capture_complaint is None

    @property
    def uses_graphs(self) -> bool:
        """Whether anything is captured: decode steps, or what completes their tokens."""
        return self.captures_steps

    @property
    def pool(self) -> KVPoolPlan:
        """The KV pool, as if every declared port were read; ConfigError where not one block fits."""
        options = self.options
        return plan_kv_pool(
            self.model.config,
            itemsize=self._itemsize,
            block_size=options.block_size,
            can_write=self.can_write,
            tapped_layers={layer for layers in self.tapped.values() for layer in layers},
            model_len=self.model_len,
            least_len=options.least_len(self.model.config),
            max_num_seqs=options.max_num_seqs,
            kv_memory_mb=options.kv_memory_mb,
            num_blocks=options.num_blocks,
            granted_bytes=self._granted_bytes,
            window=self.cache_window,
            shard=self._shard,
        )

    @property
    def cache_window(self) -> CacheWindow | None:
        """What of a sequence its blocks must hold; None where that is all of it: a layer sees everything, no sequence
        is longer than the window, or tapped states, which are read when all is computed, stand beside the blocks.
        """
        window = self.model.config.window
        if window is None or window >= self.model_len or self.tapped or not self.can_write:
            return None
        return CacheWindow(window, self.options.max_num_batched_tokens)

    @property
    def ar_limits(self) -> ARLimits:
        """The largest values of a request."""
        pool, window = self.pool, self.cache_window
        pool_tokens = pool.num_blocks * self.options.block_size
        if window is not None and window.most_blocks(self.options.block_size) <= pool.num_blocks:
            pool_tokens = max(pool_tokens, self.model_len)  # it never holds a whole sequence
        return ARLimits(
            vocab_size=self.model.config.vocab_size,
            model_len=self.model_len,
            pool_tokens=pool_tokens,
            pool_limited_by=pool.limited_by,
            max_prompt_chars=self.limits.max_prompt_chars,
            max_outputs=self.limits.max_outputs,
        )

    def draws(self, params: StageParams) -> bool:
        return self.can_write and isinstance(params, SamplingParams) and params.temperature != 0

    def grant_memory(self, num_bytes: int) -> None:
        self._granted_bytes += num_bytes // self.stage.parallel.size

    def plan_memory(self) -> MemoryPlan:
        pool, precision, ranks = self.pool, self.precision, self.stage.parallel.size
        tokens = pool.num_blocks * self.options.block_size
        on_each = f" on each of {ranks} ranks, with a share of its heads" if ranks > 1 else ""
        weights = self.model.weights_bytes(self._itemsize, precision.quantization, self._shard)
        streamed = NONE_STREAMED
        if self.offloads:
            streamed = self.model.streamed_bytes(precision.dtype, precision.quantization)
        return MemoryPlan(
            weights_bytes=weights - streamed.waiting + streamed.slots,
            offloaded_bytes=streamed.waiting,
            num_ranks=ranks,
            kv_pool_bytes=pool.num_blocks * pool.block_bytes,
            wanted_bytes=pool.num_wanted * pool.block_bytes * ranks,
            remark=f"KV pool of {tokens:,} tokens{on_each}, as {pool.limited_by} sets it",
            adapter_bytes=0 if self.lora is None else self.lora.max_bytes,
            activation_bytes=activation_bytes(
                self.model.config,
                itemsize=self._itemsize,
                max_num_batched_tokens=self.options.max_num_batched_tokens,
                max_num_seqs=self.options.max_num_seqs,
                can_write=self.can_write,
            ),
        )

    def published_dtype(self) -> dtype | None:
        return self.model.published_dtype()

    def published_quantization(self) -> str | None:
        return self.model.published_quantization

    def keeps_halves(self) -> bool:
        return self.model.keeps_halves()

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, *self.model.key)

    def note(self) -> str:
        return f"attention {self.attention}{', decode steps in CUDA graphs' if self.captures_steps else ''}"

    def load(self, context: EngineContext) -> AREngine:
        return AREngine(self, context)

    @property
    def _capture_complaint(self) -> str | None:
        if self.offloads:
            return "the weights of the layers come and go (offload: weights)"
        if self.stage.parallel.size > 1:
            return "the ranks that share its model tell each other of every step"
        attention = registry.resolve("attention", self.attention)
        device = resolve_device(self.stage.device)
        return capture_complaint(self.model, attention, can_write=self.can_write, device=device)

    @property
    def _shard(self) -> Shard:
        """Of the first rank, which is never connected: for what is planned."""
        return Shard(0, self.stage.parallel.tensor)

    def _check_parallel(self) -> None:
        """ConfigError for ranks that could not share this model."""
        tensor = self.stage.parallel.tensor
        if tensor == 1:
            return
        if not self.model.model_class.can_shard:
            raise ConfigError(f"parallel.tensor: got {tensor}, but {self.model.name} has one rank; remove the key")
        if self.options.lora is not None:
            raise ConfigError(f"parallel.tensor: got {tensor}, but adapters need whole layers; remove `lora` or this")
        check_divisible("tensor", tensor, self.model.config.shared_counts)
        check_devices(self.stage)

    @property
    def _itemsize(self) -> int:
        return self.precision.dtype.itemsize
