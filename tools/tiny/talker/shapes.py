"""The sizes of the small speaking model, as the published config.json files of Qwen3-TTS say them."""

from __future__ import annotations

from typing import Any

SAMPLE_RATE, FRAME_SAMPLES = 24_000, 1920
NUM_GROUPS, NUM_CODES = 6, 256  # codes of a frame, and how many there are of each
SPEAKER, LANGUAGE = "reader", "english"
MARKS = (  # of text: what the published tokenizers have
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tts_pad>",
    "<tts_text_bos>",
    "<tts_text_eod>",
)
UNSPOKEN = (  # of the first codebook, behind its codes
    "codec_pad_id",
    "codec_bos_id",
    "codec_eos_token_id",
    "codec_think_id",
    "codec_nothink_id",
    "codec_think_bos_id",
    "codec_think_eos_id",
)
DECODER = {
    "attention_bias": False,
    "hidden_act": "silu",
    "head_dim": 48,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_code_groups": NUM_GROUPS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "hidden_size": 192,
}
GENERATION = {  # nothing needs to be drawn: a word has one spelling
    "do_sample": False,
    "repetition_penalty": 1.0,
    "subtalker_dosample": False,
    "max_new_tokens": 200,
}


def model_config(text_vocab_size: int) -> dict[str, Any]:
    """config.json of the folder."""
    first = NUM_CODES + 16
    marks = {name: NUM_CODES + place for place, name in enumerate(UNSPOKEN)}
    text = {"im_start": 1, "im_end": 2, "tts_pad": 3, "tts_bos": 4, "tts_eos": 5}
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": "0b6",
        "tts_model_type": "custom_voice",
        **{f"{name}_token_id": token for name, token in text.items()},
        "talker_config": {
            **DECODER,
            **marks,
            "model_type": "qwen3_tts_talker",
            "codec_language_id": {LANGUAGE: first},
            "spk_id": {SPEAKER: first + 1},
            "spk_is_dialect": {SPEAKER: False},
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "text_hidden_size": 64,
            "text_vocab_size": text_vocab_size,
            "vocab_size": NUM_CODES + 1024,
            "code_predictor_config": {
                **DECODER,
                "model_type": "qwen3_tts_talker_code_predictor",
                "intermediate_size": 384,
                "num_hidden_layers": 2,
                "vocab_size": NUM_CODES,
            },
        },
    }


def codec_config() -> dict[str, Any]:
    """config.json of its folder `speech_tokenizer`, which has no encoder."""
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "input_sample_rate": SAMPLE_RATE,
        "output_sample_rate": SAMPLE_RATE,
        "decode_upsample_rate": FRAME_SAMPLES,
        "encode_downsample_rate": FRAME_SAMPLES,
        "decoder_config": {
            "codebook_dim": 128,
            "codebook_size": NUM_CODES,
            "decoder_dim": 320,
            "head_dim": 40,
            "hidden_act": "silu",
            "hidden_size": 160,
            "intermediate_size": 384,
            "latent_dim": 160,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "num_quantizers": NUM_GROUPS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000,
            "sliding_window": 6,
            "upsample_rates": [8, 6, 5],
            "upsampling_ratios": [2, 2, 2],
        },
    }
