"""Every extension point as a table of name -> "module:Class", resolved on first use.

A new model, stage kind, step cache, policy or executor is one file and one row here; code outside the package adds
its own row with `register` before it makes an `Omni`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import did_you_mean

TABLES: dict[str, dict[str, str]] = {
    "stage kind": {
        "ar": "vllm_omni.engine.ar.spec:ARSpec",
        "dit": "vllm_omni.engine.diffusion.spec:DiffusionSpec",
        "music_prompt": "vllm_omni.models.ace_step.prompt.spec:MusicPromptSpec",
        "diffusers": "vllm_omni.engine.diffusers.spec:DiffusersSpec",
        "qwen3_tts_talker": "vllm_omni.models.qwen3_tts.talker_spec:TalkerSpec",
        "speech_codec": "vllm_omni.models.qwen3_tts.codec.spec:SpeechCodecSpec",
        "umt5": "vllm_omni.models.wan.text.spec:UMT5Spec",
    },
    "ar stage": {  # by row of "language model"; what has none here is about text
        "text": "vllm_omni.engine.ar.text_spec:TextSpec",
        "Qwen2_5OmniForConditionalGeneration.talker": "vllm_omni.models.qwen2_5_omni.talker_spec:TalkerSpec",
        "Qwen2_5OmniModel.talker": "vllm_omni.models.qwen2_5_omni.talker_spec:TalkerSpec",
        "Qwen3OmniMoeForConditionalGeneration.talker": "vllm_omni.models.qwen3_omni.talker_spec:TalkerSpec",
    },
    "language model": {
        "LlamaForCausalLM": "vllm_omni.models.llama.model:Llama",
        "LlamaModel": "vllm_omni.models.llama.model:Llama",
        "MinistralForCausalLM": "vllm_omni.models.mistral.model:Ministral",
        "MinistralModel": "vllm_omni.models.mistral.model:Ministral",
        "MistralForCausalLM": "vllm_omni.models.mistral.model:Mistral",
        "MistralModel": "vllm_omni.models.mistral.model:Mistral",
        "Qwen2ForCausalLM": "vllm_omni.models.qwen2.model:Qwen2",
        "Qwen2Model": "vllm_omni.models.qwen2.model:Qwen2",
        "Qwen2VLForConditionalGeneration": "vllm_omni.models.qwen2_5_vl.model:Qwen2_5_VLText",
        "Qwen2_5_VLForConditionalGeneration": "vllm_omni.models.qwen2_5_vl.model:Qwen2_5_VL",
        "Qwen3ForCausalLM": "vllm_omni.models.qwen3.model:Qwen3",
        "Qwen3MoeForCausalLM": "vllm_omni.models.qwen3_moe.model:Qwen3Moe",
        "Qwen3MoeModel": "vllm_omni.models.qwen3_moe.model:Qwen3Moe",
        "Qwen3VLForConditionalGeneration": "vllm_omni.models.qwen3_vl.model:Qwen3VLText",
        "Qwen3OmniMoeForConditionalGeneration.talker": "vllm_omni.models.qwen3_omni.talker:Talker",
        "Qwen3OmniMoeForConditionalGeneration.thinker": "vllm_omni.models.qwen3_omni.thinker:Thinker",
        "Qwen3VLModel": "vllm_omni.models.qwen3_vl.model:Qwen3VLText",
        "Qwen3VLTextModel": "vllm_omni.models.qwen3_vl.model:Qwen3VLText",
        "Qwen3Model": "vllm_omni.models.qwen3.model:Qwen3",
        "Qwen3TTSForConditionalGeneration.talker": "vllm_omni.models.qwen3_tts.talker:Talker",
        "Qwen2_5OmniForConditionalGeneration.thinker": "vllm_omni.models.qwen2_5_omni.thinker:Thinker",
        "Qwen2_5OmniForConditionalGeneration.talker": "vllm_omni.models.qwen2_5_omni.talker:Talker",
        "Qwen2_5OmniModel.thinker": "vllm_omni.models.qwen2_5_omni.thinker:Thinker",
        "Qwen2_5OmniModel.talker": "vllm_omni.models.qwen2_5_omni.talker:Talker",
    },
    "attention": {
        "flash": "vllm_omni.layers.attention.flash:FlashAttention",
        "native": "vllm_omni.layers.attention.native:NativeAttention",
        "reference": "vllm_omni.layers.attention.reference:ReferenceAttention",
        "sdpa": "vllm_omni.layers.attention.sdpa:SDPAAttention",
        "triton": "vllm_omni.layers.attention.triton:TritonAttention",
    },
    "diffusion model": {
        "AceStepPipeline": "vllm_omni.models.ace_step.spec:AceStepSpec",
        "Flux2KleinInpaintPipeline": "vllm_omni.models.flux2.spec:KleinInpaintSpec",
        "Flux2KleinKVPipeline": "vllm_omni.models.flux2.spec:KleinKVSpec",
        "Flux2KleinPipeline": "vllm_omni.models.flux2.spec:KleinSpec",
        "Qwen2_5OmniForConditionalGeneration.token2wav": "vllm_omni.models.qwen2_5_omni.token2wav.spec:Token2WavSpec",
        "Qwen2_5OmniModel.token2wav": "vllm_omni.models.qwen2_5_omni.token2wav.spec:Token2WavSpec",
        "QwenImageEditPipeline": "vllm_omni.models.qwen_image.spec:QwenImageEditSpec",
        "QwenImageEditPlusPipeline": "vllm_omni.models.qwen_image.spec:QwenImageEditPlusSpec",
        "QwenImagePipeline": "vllm_omni.models.qwen_image.spec:QwenImageSpec",
        "WanPipeline": "vllm_omni.models.wan.spec:WanSpec",
        "ZImagePipeline": "vllm_omni.models.z_image.spec:ZImageSpec",
    },
    "speech codec": {
        "Qwen3OmniMoeForConditionalGeneration.code2wav": "vllm_omni.models.qwen3_tts.codec.published:code2wav",
        "Qwen3TTSTokenizerV2Model": "vllm_omni.models.qwen3_tts.codec.published:speech_tokenizer",
    },
    "step cache": {
        "none": "vllm_omni.core.diffusion.caches.none:NoCache",
        "dbcache": "vllm_omni.core.diffusion.caches.dbcache:DBCache",
        "first_block": "vllm_omni.core.diffusion.caches.first_block:FirstBlockCache",
        "magcache": "vllm_omni.core.diffusion.caches.magcache:MagCache",
        "recording": "vllm_omni.core.diffusion.caches.recording:Recording",
        "taylorseer": "vllm_omni.core.diffusion.caches.taylorseer:TaylorSeer",
        "teacache": "vllm_omni.core.diffusion.caches.teacache:TeaCache",
    },
    "scheduling policy": {
        "fifo": "vllm_omni.core.routing.policies:FIFOPolicy",
        "priority": "vllm_omni.core.routing.policies:PriorityPolicy",
        "shortest_job_first": "vllm_omni.core.routing.policies:ShortestJobFirstPolicy",
    },
    "follower part": {
        "blocks": "vllm_omni.worker.parallel.blocks:BlocksPart",
        "decoder": "vllm_omni.worker.parallel.decoder:DecoderPart",
    },
    "executor": {
        "inline": "vllm_omni.executor.inline:InlineExecutor",
        "process": "vllm_omni.executor.process.executor:ProcessExecutor",
        "ray": "vllm_omni.executor.ray.executor:RayExecutor",
        "thread": "vllm_omni.executor.thread:ThreadExecutor",
    },
}


def names(table: str) -> list[str]:
    """What the table knows."""
    return sorted(TABLES[table])


def resolve(table: str, name: str) -> Any:
    """The class behind a name."""
    rows = TABLES[table]
    if name not in rows:
        raise ConfigError(f"{table}: got {name!r}{did_you_mean(name, rows)}")
    module, _, attribute = rows[name].partition(":")
    return getattr(import_module(module), attribute)


def register(table: str, name: str, target: str) -> None:
    """Adds a row: `register("stage kind", "echo", "my_package.echo:EchoSpec")`."""
    if table not in TABLES:
        raise ConfigError(f"table: got {table!r}{did_you_mean(table, TABLES)}")
    if ":" not in target:
        raise ConfigError(f"target: got {target!r}, expected 'module:Class'")
    if TABLES[table].get(name, target) != target:
        raise ConfigError(f"{table} {name!r}: already registered as {TABLES[table][name]}")
    TABLES[table][name] = target
