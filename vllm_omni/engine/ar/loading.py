"""What an AR engine computes with, made of its spec: the model, with the ranks that share it, and its runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_omni import registry
from vllm_omni.engine.base import EngineContext
from vllm_omni.engine.shared_model import SharedModel
from vllm_omni.layers.shard import WHOLE
from vllm_omni.utils.device import CudaGraphs
from vllm_omni.worker.ar.bucket_graphs import bucket_sizes
from vllm_omni.worker.ar.kv_pool import KVLayout
from vllm_omni.worker.ar.language_model import LanguageModel
from vllm_omni.worker.ar.model_runner import ModelRunner
from vllm_omni.worker.parallel.decoder import DecoderLead, decoder_orders
from vllm_omni.worker.parallel.links import Links

if TYPE_CHECKING:
    from vllm_omni.engine.ar.spec import ARSpec


def load_shared_model(spec: ARSpec, context: EngineContext) -> SharedModel[LanguageModel]:
    """Loaded once for all engines of this process that are alike."""
    quantization = spec.precision.quantization

    def load(links: Links | None) -> LanguageModel:
        shard = WHOLE if links is None else links.shard("tensor")
        return spec.model.load(context.device, context.dtype, quantization, spec.make_copies(), shard)

    def orders(links: Links) -> Mapping[str, Any]:
        tapped = spec.tapped_layers(context.reads)
        return decoder_orders(
            spec.model,
            KVLayout.of(spec.model.config, can_write=spec.can_write, tapped_layers=tapped),
            num_blocks=spec.pool.num_blocks,
            block_size=spec.options.block_size,
            attention=spec.attention,
            dtype=context.dtype,
            quantization=quantization,
        )

    key = (*spec.model.key, str(context.device), spec.precision.name, spec.sharing_key)
    return SharedModel.load(spec, context, key, load, orders)


def make_runner(spec: ARSpec, context: EngineContext, shared: SharedModel[LanguageModel]) -> ModelRunner:
    """With a KV pool of its own."""
    group = shared.group
    return ModelRunner(
        shared.model,
        num_blocks=spec.pool.num_blocks,
        block_size=spec.options.block_size,
        max_num_seqs=spec.options.max_num_seqs,
        tapped_layers=sorted(spec.tapped_layers(context.reads)),
        can_sample=spec.can_write,
        device=context.device,
        dtype=context.dtype,
        attention=registry.resolve("attention", spec.attention),
        max_model_len=spec.model_len,
        decode_buckets=bucket_sizes(spec.options.max_num_seqs) if spec.captures_steps else (),
        graphs=CudaGraphs(context.device) if spec.uses_graphs else None,
        shard=WHOLE if group is None else group.links.shard("tensor"),
        lead=None if group is None else DecoderLead(group),
    )
