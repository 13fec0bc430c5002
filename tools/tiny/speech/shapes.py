"""The sizes of the tiny speaking model, as transformers' Qwen2.5-Omni configuration: the thinker, its encoders that are
only there because the format has them, and the talker.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5OmniTalkerConfig, Qwen2_5OmniThinkerConfig

MAX_POSITIONS = 2048
THINKER_SIZE, TALKER_SIZE = 128, 256
# Marks of the talker behind its codes, and of the text that it is fed.
NUM_MARKS = 4
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|speech_end|>",
    "<|speech_pad|>",
    "<|speech_reader|>",
)
ENDING = SPECIAL_TOKENS.index("<|im_end|>")
PADDING = SPECIAL_TOKENS.index("<|endoftext|>")
READER = SPECIAL_TOKENS.index("<|speech_reader|>")  # what the voice's reply starts with
MEDIA = {
    "audio_token_index": SPECIAL_TOKENS.index("<|AUDIO|>"),
    "image_token_index": SPECIAL_TOKENS.index("<|IMAGE|>"),
    "video_token_index": SPECIAL_TOKENS.index("<|VIDEO|>"),
    "audio_start_token_id": SPECIAL_TOKENS.index("<|audio_bos|>"),
    "audio_end_token_id": SPECIAL_TOKENS.index("<|audio_eos|>"),
    "vision_start_token_id": SPECIAL_TOKENS.index("<|vision_bos|>"),
    "vision_end_token_id": SPECIAL_TOKENS.index("<|vision_eos|>"),
}


def rope(*sections: int) -> dict[str, Any]:
    """sections: of half a head's width, for time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


def thinker_config(vocabulary: int) -> Qwen2_5OmniThinkerConfig:
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": THINKER_SIZE,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": rope(4, 6, 6),
            "tie_word_embeddings": False,
            "pad_token_id": PADDING,
            "eos_token_id": ENDING,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 112,
            "out_hidden_size": THINKER_SIZE,
            "fullatt_block_indexes": [0],
        },
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "output_dim": THINKER_SIZE,
        },
        user_token_id=SPECIAL_TOKENS.index("<|im_start|>"),
        **MEDIA,
    )


def talker_config(num_codes: int) -> Qwen2_5OmniTalkerConfig:
    """Codes 0 to num_codes - 1, then the one that token2wav's table has beyond them and no recording uses, then the
    marks.
    """
    marks = num_codes + 1
    return Qwen2_5OmniTalkerConfig(
        vocab_size=marks + NUM_MARKS,
        tts_codec_pad_token_id=marks,
        tts_codec_start_token_id=marks + 1,
        tts_codec_end_token_id=marks + 2,
        tts_codec_mask_token_id=marks + 3,
        tts_text_start_token_id=READER,
        tts_text_end_token_id=SPECIAL_TOKENS.index("<|speech_end|>"),
        tts_text_pad_token_id=SPECIAL_TOKENS.index("<|speech_pad|>"),
        embedding_size=THINKER_SIZE,
        hidden_size=TALKER_SIZE,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=rope(8, 12, 12),
        **MEDIA,
    )
