"""All that is known of a `speech_codec` stage before its decoder is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, MemoryPlan, StageSpec, model_folder
from vllm_omni.errors import ConfigError
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.weights import tensor_files, tensor_shapes
from vllm_omni.models.qwen3_tts.codec.convolution import MAX_WINDOW_NUMBERS
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder
from vllm_omni.models.qwen3_tts.codec.options import CodecOptions
from vllm_omni.models.qwen3_tts.codec.published import read_codec
from vllm_omni.models.qwen3_tts.codec.state import state_bytes
from vllm_omni.models.qwen3_tts.codec.warm_states import MAX_KEPT
from vllm_omni.params import SamplingParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.utils.files import ModelFolders
from vllm_omni.utils.variants import check_variant, variants_in
from vllm_omni.worker.published_dtype import dtype_of_headers

if TYPE_CHECKING:
    from vllm_omni.models.qwen3_tts.codec.engine import CodecEngine

EXPECTED = "the folder speech_tokenizer of a checkpoint, or a folder of several models beside the key 'part'"
LIVE_COPIES = 5  # of the widest layer of a frame, while it is computed
PORT, REFERENCE = "codes", "reference_codes"


class SpeechCodecSpec(StageSpec):
    """Stage kind `speech_codec`: codes [n, codebooks] come frame by frame, audio leaves as soon as it can. The
    `reference_codes` of a recording that the speech goes on from come before, and are not heard.
    """

    options_type = CodecOptions
    params_type = SamplingParams
    reads_params = False

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        self.options: CodecOptions = CodecOptions() if stage.options is None else stage.options
        self.folder = model_folder(stage, folders, EXPECTED)
        self.codec = read_codec(self.folder, self.options.part)
        if stage.variant is not None:
            check_variant(stage.variant, {self.folder.name: variants_in(self.folder)}, self.folder)
        if stage.defaults:
            raise ConfigError(f"defaults: got {', '.join(stage.defaults)}, but this stage takes none; remove the key")
        self._check_edge()
        frames = TensorSpec(("T", self.codec.decoder.num_quantizers))
        self.signature = StageSignature(
            inputs={PORT: frames, REFERENCE: frames},
            outputs={"audio": TensorSpec(("N", 1, "n"))},
            required_inputs=frozenset({PORT}),
            results=frozenset({"audio"}),
            streamed_inputs=frozenset({PORT, REFERENCE}),
            streamed_outputs=frozenset({"audio"}),
        )
        with on_meta_device():
            self._blank = CodecDecoder(self.codec.decoder)

    def published_dtype(self) -> torch.dtype | None:
        files = tensor_files(self.folder, self.codec.prefix, self.stage.variant).values()
        return dtype_of_headers(files, self.codec.prefix)

    def plan_memory(self) -> MemoryPlan:
        dtype = self.precision.dtype
        shapes = tensor_shapes(self.folder, self.codec.prefix, self.stage.variant)
        names = (name for name in shapes if not self._blank.is_ignored(name.removeprefix(self.codec.prefix)))
        num_states = self.options.max_batch_size + (MAX_KEPT if REFERENCE in self.stage.edges else 0)
        state, window_bytes = state_bytes(self._blank.carrying, dtype), MAX_WINDOW_NUMBERS * dtype.itemsize
        return MemoryPlan(
            weights_bytes=sum(math.prod(shapes[name]) for name in names) * dtype.itemsize,
            kv_pool_bytes=num_states * state,
            activation_bytes=self.options.max_batch_frames * self._frame_bytes(dtype) + window_bytes,
            remark=f"the state of {self.options.max_batch_size} requests, {state / 1e6:.1f} MB each",
        )

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, str(self.folder.resolve()), self.options.part or "", self.stage.variant or "")

    def load(self, context: EngineContext) -> CodecEngine:
        from vllm_omni.models.qwen3_tts.codec.engine import CodecEngine

        return CodecEngine(self, context)

    def note(self) -> str:
        codec = self.codec
        frames = f"{codec.sample_rate / codec.decoder.frame_samples:g} frames of {codec.decoder.num_quantizers} codes"
        return f"{frames} a second become audio of {codec.sample_rate} Hz, each once; it looks at no later frame"

    def _frame_bytes(self, dtype: torch.dtype) -> int:
        """Of the widest layer."""
        config = self.codec.decoder
        steps = math.prod(config.upsampling_ratios)
        widest = steps * config.channels[0]
        for channels, rate in zip(config.channels[1:], config.upsample_rates, strict=True):
            steps *= rate
            widest = max(widest, 2 * steps * channels)  # what a transposed convolution reaches
        return LIVE_COPIES * widest * dtype.itemsize

    def _check_edge(self) -> None:
        streams = {port: edge.stream for port, edge in self.stage.edges.items() if edge.stream is not None}
        for port, stream in streams.items():
            for key in ("left_context", "look_ahead"):
                if not getattr(stream, key):
                    continue
                raise ConfigError(
                    f"inputs.{port}.stream.{key}: got {getattr(stream, key)}, expected 0: this stage carries its state"
                    " from chunk to chunk and looks at no later frame; leave it out"
                )
