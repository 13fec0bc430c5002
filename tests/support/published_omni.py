"""What shapes the thinker, the talker and token2wav in the published config.json files of Qwen2.5-Omni, 3B and 7B.

Compared with public copies: both sizes with JimmyMa99/xtuner (xtuner/v1/model/compose/qwen2_5_omni/
qwen2_5_omni_config.py), whose classes forbid other keys; 7B with transformers' defaults, with the module tree that
ai-bot-pro/achatbot#143 prints and, for the talker, with a port to Amazon's NxD Inference (12 heads of 128, 4 key-value
heads); 3B with ports whose tests read the file itself. `dit_config` says `dim`, `depth` and `heads`, which transformers
does not read, and leaves out block_size, the layers that look around, and rope_theta.
"""

from __future__ import annotations

from typing import Any

TOKENS = {
    "audio_token_index": 151646,
    "image_token_index": 151655,
    "video_token_index": 151656,
    "audio_start_token_id": 151647,
    "audio_end_token_id": 151648,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "position_id_per_seconds": 25,
    "seconds_per_chunk": 2,
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_channels": 3,
    "in_chans": 3,
    "intermediate_size": 3420,
    "model_type": "qwen2_5_omni_vision_encoder",
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 25,
    "window_size": 112,
}
AUDIO = {
    "activation_function": "gelu",
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "max_source_positions": 1500,
    "model_type": "qwen2_5_omni_audio_encoder",
    "n_window": 100,
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "scale_embedding": False,
}
DECODER = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
TALKER_TOKENS = {
    "tts_codec_start_token_id": 8293,
    "tts_codec_end_token_id": 8294,
    "tts_codec_pad_token_id": 8292,
    "tts_codec_mask_token_id": 8296,
    "tts_text_start_token_id": 151860,
    "tts_text_end_token_id": 151861,
    "tts_text_pad_token_id": 151859,
}
TOKEN2WAV = {
    "model_type": "qwen2_5_omni_token2wav",
    "dit_config": {
        "depth": 22,
        "dim": 1024,
        "dropout": 0.1,
        "emb_dim": 512,
        "enc_attention_channels": 64,
        "enc_channels": [256, 256, 256, 256, 768],
        "enc_dilations": [1, 2, 3, 4, 1],
        "enc_dim": 128,
        "enc_emb_dim": 192,
        "enc_global_context": True,
        "enc_kernel_sizes": [5, 3, 3, 3, 1],
        "enc_lin_neurons": 192,
        "enc_res2net_scale": 2,
        "enc_se_channels": 64,
        "ff_mult": 2,
        "head_dim": 64,
        "heads": 16,
        "mel_dim": 80,
        "model_type": "qwen2_5_omni_dit",
        "num_embeds": 8193,
        "repeats": 2,
    },
    "bigvgan_config": {
        "mel_dim": 80,
        "model_type": "qwen2_5_omni_bigvgan",
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "resblock_kernel_sizes": [3, 7, 11],
        "upsample_initial_channel": 1536,
        "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
        "upsample_rates": [5, 3, 2, 2, 2, 2],
        "use_bias_at_final": False,
    },
}


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_scaling": {"mrope_section": list(sections), "rope_type": "default", "type": "default"}}


def published(hidden_size: int, text: dict[str, Any], talker: dict[str, Any]) -> dict[str, Any]:
    """As config.json says it, without what no part reads."""
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": {
            **TOKENS,
            "text_config": {**DECODER, "hidden_size": hidden_size, "tie_word_embeddings": False, **text},
            "vision_config": {**VISION, "out_hidden_size": hidden_size},
            "audio_config": {**AUDIO, "output_dim": hidden_size},
        },
        "talker_config": {
            **TOKENS,
            **DECODER,
            **TALKER_TOKENS,
            "embedding_size": hidden_size,
            "vocab_size": 8448,
            "hidden_size": 896,
            "max_window_layers": 28,
            "num_hidden_layers": 24,
            "spatial_merge_size": 2,
            **talker,
        },
        "token2wav_config": TOKEN2WAV,
    }


PUBLISHED = {
    "3B": published(
        2048,
        {
            "intermediate_size": 11008,
            "max_window_layers": 70,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            **rope(16, 24, 24),
        },
        {
            "head_dim": 64,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            **rope(16, 16, 0),
        },
    ),
    "7B": published(
        3584,
        {
            "intermediate_size": 18944,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            **rope(16, 24, 24),
        },
        {
            "head_dim": 128,
            "intermediate_size": 18944,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            **rope(16, 24, 24),
        },
    ),
}
