"""A tiny random Qwen2.5-Omni checkpoint in the published format: config.json, sharded safetensors, spk_dict.pt."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

SPEAKERS = ("Chelsie", "Ethan")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SPECIAL = {"audio": 100, "image": 101, "video": 102, "audio_bos": 103, "audio_eos": 104}
TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rope_parameters=ROPE,
)
THINKER = dict(
    text_config={
        **{k: v for k, v in TEXT.items() if k != "head_dim"},
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    },
    vision_config=dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        window_size=16,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
    ),
    audio_config=dict(
        num_mel_bins=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        d_model=32,
        n_window=4,
        output_dim=32,
    ),
    audio_token_index=SPECIAL["audio"],
    image_token_index=SPECIAL["image"],
    video_token_index=SPECIAL["video"],
    audio_start_token_id=SPECIAL["audio_bos"],
    audio_end_token_id=SPECIAL["audio_eos"],
    user_token_id=105,
    vision_start_token_id=106,
    vision_end_token_id=107,
)
TALKER = dict(
    **{**TEXT, "hidden_size": 24, "vocab_size": 64},
    embedding_size=32,
    audio_token_index=SPECIAL["audio"],
    image_token_index=SPECIAL["image"],
    video_token_index=SPECIAL["video"],
    audio_start_token_id=SPECIAL["audio_bos"],
    audio_end_token_id=SPECIAL["audio_eos"],
    vision_start_token_id=106,
    vision_end_token_id=107,
    tts_text_start_token_id=108,
    tts_text_end_token_id=109,
    tts_text_pad_token_id=110,
    tts_codec_start_token_id=61,
    tts_codec_end_token_id=62,
    tts_codec_pad_token_id=60,
    tts_codec_mask_token_id=63,
)
TOKEN2WAV = dict(
    dit_config=dict(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=16,
        emb_dim=16,
        block_size=6,
        look_ahead_layers=[2],
        look_backward_layers=[0, 3],
        num_embeds=59,
        mel_dim=20,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        enc_emb_dim=12,
        enc_dim=16,
        enc_channels=[16, 16, 16, 16, 48],
        enc_attention_channels=8,
        enc_se_channels=8,
    ),
    bigvgan_config=dict(
        mel_dim=20, upsample_initial_channel=32, upsample_rates=[5, 3, 2], upsample_kernel_sizes=[11, 7, 4]
    ),
)
MASK = 63
CODEC_EOS = (60, 62)  # what ends the talker: pad and end


def tiny_config(**changes: object) -> Qwen2_5OmniConfig:
    return Qwen2_5OmniConfig(
        **{"thinker_config": THINKER, "talker_config": TALKER, "token2wav_config": TOKEN2WAV, **changes}
    )


def tiny_reference(seed: int = 0, config: Qwen2_5OmniConfig | None = None) -> Qwen2_5OmniForConditionalGeneration:
    """transformers' model with random weights large enough to make different inputs give different tokens."""
    torch.manual_seed(seed)
    model = Qwen2_5OmniForConditionalGeneration(config or tiny_config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.token2wav.code2wav_bigvgan_model.conv_post.weight.mul_(0.05)  # a waveform that is not clipped
        model.talker.codec_head.weight[MASK] = 0  # it is no code, and is never the best choice
    model.speaker_map = tiny_speakers(seed)
    return model


def tiny_speakers(seed: int = 0) -> dict[str, dict[str, object]]:
    """As spk_dict.pt holds them: the text token that starts the reply, the speaker's embedding, a reference mel."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        name: {
            "bos_token": 111 + index,
            "cond": torch.randn(1, 12, generator=generator),
            "ref_mel": torch.randn(1, 30 + 5 * index, 20, generator=generator),
        }
        for index, name in enumerate(SPEAKERS)
    }


def save_tiny_omni(folder: Path, seed: int = 0, config: Qwen2_5OmniConfig | None = None) -> Path:
    """Weights in several shards, config.json, generation_config.json, spk_dict.pt and the processor."""
    model = tiny_reference(seed, config)
    model.save_pretrained(folder, max_shard_size="100KB")
    torch.save(tiny_speakers(seed), folder / "spk_dict.pt")
    return save_processor(folder)


IM_START, IM_END, UNKNOWN = 96, 97, 98
WORDS = {
    "<|im_start|>": IM_START,
    "<|im_end|>": IM_END,
    "<|endoftext|>": UNKNOWN,
    "<|AUDIO|>": SPECIAL["audio"],
    "<|IMAGE|>": SPECIAL["image"],
    "<|VIDEO|>": SPECIAL["video"],
    "<|audio_bos|>": SPECIAL["audio_bos"],
    "<|audio_eos|>": SPECIAL["audio_eos"],
    "<|vision_bos|>": 106,
    "<|vision_eos|>": 107,
}
NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROCESSOR = dict(  # one file for images, videos and sounds, as published
    image_processor_type="Qwen2VLImageProcessor",
    feature_extractor_type="WhisperFeatureExtractor",
    processor_class="Qwen2_5OmniProcessor",
    image_mean=[0.48, 0.46, 0.41],
    image_std=[0.27, 0.26, 0.28],
    min_pixels=64,
    max_pixels=64 * 64,
    patch_size=4,
    merge_size=2,
    temporal_patch_size=2,
    chunk_length=20,
    feature_size=16,
    hop_length=160,
    n_fft=400,
    padding_side="right",
    padding_value=0.0,
    dither=0.0,
    return_attention_mask=True,
    sampling_rate=16000,
)


def character_tokenizer(words: dict[str, int], **keys: Any) -> PreTrainedTokenizerFast:
    """128 tokens: one for each character of ASCII, and special words beyond them."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)} | words
    vocabulary |= {f"<|spare_{index}|>": index for index in range(128) if index not in vocabulary.values()}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(words))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        **keys,
    )


def save_processor(folder: Path) -> Path:
    """Tokenizer, chat template and the settings of images, videos and sounds."""
    character_tokenizer(WORDS, extra_special_tokens=NAMED).save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def save_readable(folder: Path) -> Path:
    """What is needed to read prompts: the processor and config.json, no weights."""
    tiny_config().save_pretrained(folder)
    return save_processor(folder)


@cache
def meta_thinker() -> Any:
    """The reference thinker without weights, for its positions."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(tiny_config().thinker_config)
