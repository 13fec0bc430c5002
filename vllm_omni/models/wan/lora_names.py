"""What the original code of Wan calls its layers, as LoRA files of ComfyUI, ai-toolkit and musubi-tuner do, too."""

from __future__ import annotations

from vllm_omni.models.wan.config import WanConfig

ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
FEED_FORWARD = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
AROUND = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}


def lora_aliases(config: WanConfig) -> dict[str, str]:
    """Name of a layer -> its published name."""
    projections = {
        f"{attention}.{theirs}": f"{ATTENTIONS[attention]}.{published}"
        for attention in ATTENTIONS
        for theirs, published in PROJECTIONS.items()
    }
    blocks = {
        f"blocks.{index}.{theirs}": f"blocks.{index}.{published}"
        for index in range(config.num_layers)
        for theirs, published in {**projections, **FEED_FORWARD}.items()
    }
    return {**blocks, **AROUND}
