"""What tiny Qwen3-TTS folders say of themselves, in the style of the published ones."""

from __future__ import annotations

from typing import Any

from benchmarks.qwen3_tts.published import TASKS, published_config, published_tokenizer_config, talker_tokens

__all__ = ["TASKS", "published_config", "published_tokenizer_config", "tiny_config", "tiny_tokenizer_config"]

TINY_CODES = 64


def tiny_config(task: str, text_tokens: dict[str, int], text_vocab_size: int) -> dict[str, Any]:
    """base is of 0.6B's style (the predictor as wide as the talker), the others of 1.7B's (a projection between)."""
    config = published_config("0.6B" if task == "base" else "1.7B", task) | text_tokens
    decoder = {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }
    talker = config["talker_config"] | decoder | talker_tokens(TINY_CODES, task)
    talker |= {"text_hidden_size": 24, "text_vocab_size": text_vocab_size, "vocab_size": TINY_CODES + 1024}
    talker["rope_scaling"] = talker["rope_scaling"] | {"mrope_section": [4, 2, 2]}
    predictor = talker["code_predictor_config"] | decoder | {"vocab_size": TINY_CODES}
    talker["code_predictor_config"] = predictor | {"hidden_size": 32 if task == "base" else 24}
    speaker = {
        "enc_attention_channels": 8,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_dim": 32,
        "enc_se_channels": 8,
        "sample_rate": 24000,
    }
    return config | {"talker_config": talker, "speaker_encoder_config": speaker}


def tiny_tokenizer_config() -> dict[str, Any]:
    """192 samples a frame come out, so that a second is short; in go 1920, as published."""
    config = published_tokenizer_config() | {"decode_upsample_rate": 192}
    transformer = {
        "codebook_size": TINY_CODES,
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }
    config["decoder_config"] |= transformer | {
        "codebook_dim": 16,
        "decoder_dim": 32,
        "latent_dim": 24,
        "sliding_window": 8,
        "upsample_rates": [4, 3, 2, 2],
    }
    config["encoder_config"] |= transformer | {
        "codebook_dim": 8,
        "num_filters": 4,
        "num_quantizers": 18,
        "sliding_window": 10,
        "upsample_groups": 32,
        "vector_quantization_hidden_dimension": 8,
    }
    return config
