"""What the published Qwen3-TTS folders say of themselves: 12 Hz, 0.6B and 1.7B, tasks base, custom_voice and
voice_design; the speech tokenizer is the same in all. Keys that nothing reads are left out.
"""

from __future__ import annotations

from typing import Any

TASKS = ("base", "custom_voice", "voice_design")
CODES = 2048  # entries of a published codebook; control codes of the talker start CODES + 50, voices further on
LANGUAGES = {
    "english": 2,
    "german": 5,
    "spanish": 6,
    "chinese": 7,
    "japanese": 10,
    "french": 13,
    "sichuan_dialect": 14,
    "korean": 16,
    "russian": 21,
    "italian": 22,
    "portuguese": 23,
    "beijing_dialect": 26,
}
CONTROLS = {
    "codec_pad_id": 100,
    "codec_bos_id": 101,
    "codec_eos_token_id": 102,
    "codec_think_id": 106,
    "codec_nothink_id": 107,
    "codec_think_bos_id": 108,
    "codec_think_eos_id": 109,
}
SPEAKERS = {
    "aiden": 813,
    "sohee": 816,
    "ono_anna": 825,
    "eric": 827,
    "dylan": 830,
    "uncle_fu": 962,
    "ryan": 1013,
    "vivian": 1017,
    "serena": 1018,
}
DIALECTS = {"eric": "sichuan_dialect", "dylan": "beijing_dialect"}
TEXT_TOKENS = {
    "im_start_token_id": 151644,
    "im_end_token_id": 151645,
    "tts_pad_token_id": 151671,
    "tts_bos_token_id": 151672,
    "tts_eos_token_id": 151673,
}
GENERATION = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.05,
    "subtalker_dosample": True,
    "subtalker_temperature": 0.9,
    "subtalker_top_k": 50,
    "subtalker_top_p": 1.0,
    "max_new_tokens": 8192,
}  # generation_config.json
SIZES = {"0.6B": "0b6", "1.7B": "1b7"}


def published_config(size: str, task: str) -> dict[str, Any]:
    """config.json of a published folder. size: 0.6B or 1.7B."""
    width = {"0.6B": (1024, 3072), "1.7B": (2048, 6144)}[size]
    decoder = {
        "attention_bias": False,
        "attention_dropout": 0,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_code_groups": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "use_sliding_window": False,
    }
    talker = {
        **decoder,
        **talker_tokens(CODES, task),
        "model_type": "qwen3_tts_talker",
        "hidden_size": width[0],
        "intermediate_size": width[1],
        "num_hidden_layers": 28,
        "rope_scaling": {"interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default", "type": "default"},
        "text_hidden_size": 2048,
        "text_vocab_size": 151936,
        "vocab_size": CODES + 1024,
        "code_predictor_config": {
            **decoder,
            "model_type": "qwen3_tts_talker_code_predictor",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 65536,
            "num_hidden_layers": 5,
            "vocab_size": CODES,
        },
    }
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": SIZES[size],
        "tts_model_type": task,
        **TEXT_TOKENS,
        "speaker_encoder_config": {"enc_dim": width[0], "sample_rate": 24000},
        "talker_config": talker,
    }


def published_tokenizer_config() -> dict[str, Any]:
    """config.json of `speech_tokenizer`."""
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": 16,
        "input_sample_rate": 24000,
        "output_sample_rate": 24000,
        "decode_upsample_rate": 1920,
        "encode_downsample_rate": 1920,
        "decoder_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "codebook_dim": 512,
            "codebook_size": CODES,
            "decoder_dim": 1536,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 512,
            "intermediate_size": 1024,
            "latent_dim": 1024,
            "layer_scale_initial_scale": 0.01,
            "max_position_embeddings": 8000,
            "num_attention_heads": 16,
            "num_hidden_layers": 8,
            "num_key_value_heads": 16,
            "num_quantizers": 16,
            "num_semantic_quantizers": 1,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000,
            "sliding_window": 72,
            "upsample_rates": [8, 5, 4, 3],
            "upsampling_ratios": [2, 2],
        },
        "encoder_config": {
            "model_type": "mimi",
            "audio_channels": 1,
            "codebook_dim": 256,
            "codebook_size": CODES,
            "compress": 2,
            "dilation_growth_rate": 2,
            "frame_rate": 12.5,
            "head_dim": 64,
            "hidden_act": "gelu",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "kernel_size": 7,
            "last_kernel_size": 3,
            "layer_scale_initial_scale": 0.01,
            "max_position_embeddings": 8000,
            "norm_eps": 1e-05,
            "num_attention_heads": 8,
            "num_filters": 64,
            "num_hidden_layers": 8,
            "num_key_value_heads": 8,
            "num_quantizers": 32,
            "num_residual_layers": 1,
            "num_semantic_quantizers": 1,
            "pad_mode": "constant",
            "residual_kernel_size": 3,
            "rope_theta": 10000,
            "sampling_rate": 24000,
            "sliding_window": 250,
            "trim_right_ratio": 1.0,
            "upsample_groups": 512,
            "upsampling_ratios": [8, 6, 5, 4],
            "use_causal_conv": True,
            "use_conv_shortcut": False,
            "vector_quantization_hidden_dimension": 256,
        },
    }


def talker_tokens(codes: int, task: str) -> dict[str, Any]:
    """Ids beyond the codes. Only a custom_voice folder names speakers."""
    has_speakers = task == "custom_voice"
    return {
        **{name: codes + place for name, place in CONTROLS.items()},
        "codec_language_id": {name: codes + place for name, place in LANGUAGES.items()},
        "spk_id": {name: codes + place for name, place in SPEAKERS.items()} if has_speakers else {},
        "spk_is_dialect": {name: DIALECTS.get(name, False) for name in SPEAKERS} if has_speakers else {},
    }
