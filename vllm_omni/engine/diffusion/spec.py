"""All that is known of a `dit` stage before it is loaded: its folder, options and the spec of its model.

Which model a folder holds is said by the class name of a pipeline's index, or by a checkpoint's architecture and the
stage's `part`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_omni.config.schema import LoRAConfig, OmniConfig, StageConfig
from vllm_omni.core.diffusion.dit_cache_manager import MEGABYTE, budget_bytes
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts, StageSpec, model_folder
from vllm_omni.engine.diffusion.checks import (
    check_counts,
    check_fitted_model,
    check_fitted_steps,
    check_no_video,
    check_previews,
    check_readers,
    diffusion_params,
    with_fields,
)
from vllm_omni.engine.diffusion.decoding_memory import DecodingMemory
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.engine.lora import LoRASource, loras_of
from vllm_omni.engine.parallel import check_axes, check_devices, check_divisible
from vllm_omni.errors import ConfigError
from vllm_omni.layers.blocks import NONE_STREAMED
from vllm_omni.layers.shard import Shard, Shards
from vllm_omni.layers.weights import tensor_shapes
from vllm_omni.layers.weights_digest import weights_digest
from vllm_omni.params import DiffusionParams, StageParams, layered
from vllm_omni.registry import names, resolve
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import did_you_mean
from vllm_omni.utils.device import is_cpu, resolve_device
from vllm_omni.utils.files import ModelFolders, read_json
from vllm_omni.utils.precision import Precision
from vllm_omni.utils.variants import check_variant, variants_in
from vllm_omni.worker.architecture import named_architectures
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModelSpec
from vllm_omni.worker.diffusion.shared_model import SharedModelSpec
from vllm_omni.worker.diffusion.tiling import Tiling
from vllm_omni.worker.lora.target import LoRATarget
from vllm_omni.worker.parallel.blocks import block_orders
from vllm_omni.worker.parallel.links import Links

if TYPE_CHECKING:
    from vllm_omni.engine.diffusion.engine import DiffusionEngine

PIPELINE_INDEX = "model_index.json"
CHECKPOINT_CONFIG = "config.json"
EXPECTED = "a diffusers pipeline folder, or a transformers folder beside the key 'part'"


class DiffusionSpec(StageSpec):
    """Stage kind `dit`."""

    options_type = DiTOptions
    params_type = DiffusionParams
    imports = ("diffusers:AutoencoderKL",)

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        self.options: DiTOptions = DiTOptions() if stage.options is None else stage.options
        self.policy = self.options.make_policy()
        self.folder = model_folder(stage, folders, EXPECTED)
        self.model: DiffusionModelSpec = resolve("diffusion model", model_name(self.folder, self.options.part))(
            self.folder, stage.variant
        )
        if stage.variant is not None:
            parts = {part.name: variants_in(part) for part in self.model.weight_folders}
            check_variant(stage.variant, parts, self.folder)
        size = self.model.decoding_size(torch.float32)
        if self.options.vae_tiling == "always" and (size is None or size.tile is None):
            raise ConfigError("vae_tiling: got 'always', but this model decodes nothing in tiles; leave it out")
        self.signature = self.model.signature
        self.request_keys, self.media_keys = self.model.request_keys, self.model.media_keys
        self.defaults = layered(stage.defaults, self.model.defaults)
        self.frame_rate = self.model.frame_rate and stage.defaults.get("fps", self.model.frame_rate)
        self._dit_cache = config.dit_cache
        self.encoded_bytes = int(config.dit_cache.encoded_images_mb * MEGABYTE) if self.model.media_keys else 0
        self.lora = None if self.options.lora is None else self._lora_source(self.options.lora)
        self.takes_loras = self.lora is not None
        self._check_parallel()

    parallel_axes = ("tensor", "sequence", "guidance")

    @property
    def can_quantize(self) -> bool:  # type: ignore[override]
        return self.model.can_quantize

    @property
    def can_offload(self) -> bool:  # type: ignore[override]
        return self.model.can_offload

    def choose_dtype(self) -> Precision:
        auto = self.model.auto_dtype if self.stage.dtype == "auto" else None
        return super().choose_dtype() if auto is None else Precision(auto, "as the reference implementation computes")

    def published_quantization(self) -> str | None:
        return self.model.published_quantization()

    def keeps_halves(self) -> bool:
        return self.model.keeps_halves()

    def published_dtype(self) -> torch.dtype | None:
        return self.model.published_dtype()

    def draws(self, params: StageParams) -> bool:
        return True

    def plan_memory(self) -> MemoryPlan:
        dtype, decoding = self.precision.dtype, self._decoding
        streamed = self.model.streamed_bytes(dtype, self.precision.quantization) if self.offloads else NONE_STREAMED
        return MemoryPlan(
            weights_bytes=self._weights_bytes() - streamed.waiting + streamed.slots,
            offloaded_bytes=streamed.waiting,
            num_ranks=self.stage.parallel.size,
            activation_bytes=self.options.max_batch_tokens * self.model.token_bytes(dtype),
            step_cache_bytes=self.encoded_bytes + (0 if self.policy.computes_all else budget_bytes(self._dit_cache)),
            adapter_bytes=0 if self.lora is None else self.lora.max_bytes,
            decoding_bytes=decoding.num_bytes,
            wanted_bytes=decoding.wanted_bytes,
            remark=decoding.remark(),
        )

    def grant_memory(self, num_bytes: int) -> None:
        self._decoding.grant(num_bytes)

    def block_orders(self, links: Links) -> Mapping[str, Any]:
        """What the followers of the first rank load."""
        name, precision = model_name(self.folder, self.options.part), self.precision
        return block_orders(name, self.folder, self.stage.variant, precision.dtype, precision.quantization)

    def _weights_bytes(self) -> int:
        """Of the first rank."""
        tensor, of_weights = self.stage.parallel.tensor, (self.precision.dtype, self.precision.quantization)
        is_on_cpu = is_cpu(resolve_device(self.stage.device))
        packing = self.model.packing_bytes(self.precision.dtype) if is_on_cpu else 0
        if tensor > 1 and isinstance(self.model, SharedModelSpec):
            return packing + self.model.rank_bytes(*of_weights, Shards(tensor=Shard(0, tensor)))
        return packing + self.model.weights_bytes(*of_weights)

    def _check_parallel(self) -> None:
        """ConfigError for ranks that could not share this model."""
        parallel = self.stage.parallel
        if parallel.size == 1:
            return
        axes = self.model.parallel_axes if isinstance(self.model, SharedModelSpec) else ()
        check_axes(parallel, axes, model_name(self.folder, self.options.part))
        assert isinstance(self.model, SharedModelSpec)
        if self.lora is not None:
            raise ConfigError("parallel: got several ranks, but adapters need whole layers; remove `lora` or this")
        for axis, counts in self.model.shared_counts().items():
            check_divisible(axis, getattr(parallel, axis), counts)
            if axis == "sequence" and "heads" in counts:  # of which each rank of `tensor` has its share already
                ranks = parallel.tensor * parallel.sequence
                check_divisible("tensor * sequence", ranks, {"heads": counts["heads"]})
        check_devices(self.stage)

    def tiling(self) -> Tiling | None:
        """How it decodes pictures; None for a model that decodes nothing in tiles."""
        return self._decoding.tiling()

    @cached_property
    def _decoding(self) -> DecodingMemory:
        size = self.model.decoding_size(self.precision.dtype)
        return DecodingMemory(self.options.vae_tiling, size, self.limits.max_pixels)

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, str(self.folder.resolve()), self.options.part or "", self.stage.variant or "")

    def needed_inputs(self, request: OmniRequest, params: StageParams) -> frozenset[str]:
        whole = self.with_fields(request, diffusion_params(params))
        return self.model.needed_inputs(frozenset(self.stage.inputs), request, whole)

    def with_fields(self, request: OmniRequest, params: DiffusionParams) -> DiffusionParams:
        """The parameters with what the prompt's dict says beside them."""
        # those of a request that was saved have their defaults filled in
        given = DiffusionParams() if request.saved else request.params_for(self.stage.name, DiffusionParams)
        return with_fields(request, params, given, self.request_keys)

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> None:
        params = self.with_fields(request, diffusion_params(params))
        self.model.check(request, params, frozenset(self.stage.inputs), self.limits)
        if self.frame_rate is None:
            check_no_video(params)
        check_counts(params, self.model.num_steps(params), self.limits)
        check_fitted_steps(self.policy.fit, self.model.num_steps(params))
        check_readers(params, self.stage.name, reads)
        check_previews(params, self.model.gives_previews)
        if self.lora is not None:
            self.lora.plans(loras_of(params))

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        return self.model.job_size(request, self.with_fields(request, diffusion_params(params)))

    def note(self) -> str:
        """What the model says of itself, and where the parameters come from that a request leaves unset."""
        said = [f"{name} {value} (config)" for name, value in self.stage.defaults.items()]
        said += [
            f"{name} {value:g} (checkpoint)"
            for name, value in self.model.defaults.items()
            if name in self.defaults and name not in self.stage.defaults
        ]
        return "; ".join(filter(None, [self.model.note(), f"defaults: {', '.join(said)}" if said else ""]))

    def _lora_source(self, config: LoRAConfig) -> LoRASource:
        part = self.model.adapted_part
        if part is None:
            raise ConfigError("lora: the layers of this model cannot be adapted; remove the key")
        return LoRASource(config, lambda: self._lora_target(part), lambda: self.precision.dtype.itemsize)

    def _lora_target(self, part: str) -> LoRATarget:
        published = tensor_shapes(self.folder / part, variant=self.stage.variant)
        return LoRATarget(self.model.build_transformer(), published, self.model.lora_aliases())

    def fingerprint(self) -> Mapping[str, Any] | None:
        """Not of a model that reads an input chunk by chunk."""
        if self.signature.streamed_inputs:
            return None
        return {
            "weights": weights_digest(self.folder, self.model.weight_folders, self.stage.variant),
            "precision": self.precision.name,
            "device": resolve_device(self.stage.device).type,
            "cache": {"policy": "none", **self.options.cache},
        }

    def load(self, context: EngineContext) -> DiffusionEngine:
        from vllm_omni.engine.diffusion.engine import DiffusionEngine

        if self.policy.fit is not None:
            check_fitted_model(self.policy.fit, self.model.fingerprint(), str(self.folder))
        return DiffusionEngine(self, context)


def model_name(folder: Path, part: str | None) -> str:
    """The row of the registry's table "diffusion model" for a folder; ConfigError where there is none."""
    is_checkpoint = (folder / CHECKPOINT_CONFIG).is_file() and not (folder / PIPELINE_INDEX).is_file()
    if not is_checkpoint:
        if part is not None:
            raise ConfigError(f"part: got {part!r}, but {folder} holds one diffusers pipeline; leave it out")
        return str(read_json(folder / PIPELINE_INDEX).get("_class_name"))
    where = folder / CHECKPOINT_CONFIG
    architecture = next(iter(named_architectures(read_json(where), str(where))), "None")
    parts = [name.partition(".")[2] for name in names("diffusion model") if name.startswith(architecture + ".")]
    if not parts:
        raise ConfigError(f"{folder / CHECKPOINT_CONFIG}: architectures: got {architecture!r}, which diffuses nothing")
    if part is None:
        raise ConfigError(f"part: missing; {architecture} holds several models; expected one of {', '.join(parts)}")
    if part not in parts:
        raise ConfigError(f"part: got {part!r}{did_you_mean(part, parts)}")
    return f"{architecture}.{part}"
