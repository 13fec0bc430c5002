"""What the original code of FLUX.2 calls its layers, as LoRA files of ComfyUI and kohya's scripts do, too."""

from __future__ import annotations

from vllm_omni.models.flux2.config import Flux2Config

DOUBLE = {
    "img_attn.qkv": "image.qkv",
    "img_attn.proj": "image.out",
    "img_mlp.0": "image.linear_in",
    "img_mlp.2": "image.linear_out",
    "txt_attn.qkv": "text.qkv",
    "txt_attn.proj": "text.out",
    "txt_mlp.0": "text.linear_in",
    "txt_mlp.2": "text.linear_out",
}
SINGLE = {"linear1": "qkv_mlp", "linear2": "out"}
AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}


def lora_aliases(config: Flux2Config) -> dict[str, str]:
    """Name of a layer -> its path in our model, or its published name."""
    doubles = {
        f"double_blocks.{index}.{theirs}": f"double_blocks.{index}.{ours}"
        for index in range(config.num_layers)
        for theirs, ours in DOUBLE.items()
    }
    singles = {
        f"single_blocks.{index}.{theirs}": f"single_blocks.{index}.{ours}"
        for index in range(config.num_single_layers)
        for theirs, ours in SINGLE.items()
    }
    return {**doubles, **singles, **AROUND}
