"""The codec's decoder: parity with both published layouts, pieces that join without a seam, published shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.qwen3_tts import answers, write_speech_tokenizer
from support.qwen3_tts_configs import published_tokenizer_config
from torch import Tensor
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder
from vllm_omni.models.qwen3_tts.codec.published import read_codec

CPU = torch.device("cpu")
CODE2WAV = dict(
    codebook_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    num_quantizers=4,
    sliding_window=8,
    decoder_dim=32,
    upsample_rates=(4, 3, 2, 2),
    upsampling_ratios=(2, 2),
)
ANSWERS = answers()
Decoders = dict[str, CodecDecoder]


def load(folder: Path, part: str | None = None) -> CodecDecoder:
    codec = read_codec(folder, part)
    return CodecDecoder.load(codec.decoder, folder, codec.prefix, CPU, torch.float32)


def code2wav_reference() -> Qwen3OmniMoeCode2Wav:
    """Wide enough that every part shows in the samples."""
    generator = torch.Generator().manual_seed(0)
    model = Qwen3OmniMoeCode2Wav(Qwen3OmniMoeCode2WavConfig(**CODE2WAV)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("scale", "gamma")):
            weight.uniform_(0.3, 0.7, generator=generator)
        elif name.endswith(("alpha", "beta")):
            weight.uniform_(-0.3, 0.3, generator=generator)
        elif weight.dim() > 1:
            weight.normal_(0, 0.7 / weight[0].numel() ** 0.5, generator=generator)
        elif "norm" not in name:
            weight.uniform_(-0.1, 0.1, generator=generator)
    return model


def write_code2wav(folder: Path, model: Qwen3OmniMoeCode2Wav) -> Path:
    save_file({f"code2wav.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "code2wav_config": model.config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reference() -> Qwen3OmniMoeCode2Wav:
    return code2wav_reference()


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory, reference: Qwen3OmniMoeCode2Wav) -> Decoders:
    """One of each layout."""
    tokenizer = write_speech_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    part = write_code2wav(tmp_path_factory.mktemp("code2wav"), reference)
    return {"residual": load(tokenizer), "summed": load(part, "code2wav")}


def random_codes(decoder: CodecDecoder, num_rows: int, num_frames: int, seed: int = 0) -> Tensor:
    shape = (num_rows, num_frames, decoder.config.num_quantizers)
    return torch.randint(decoder.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def whole(decoder: CodecDecoder, codes: Tensor) -> Tensor:
    return decoder(codes, decoder.begin(len(codes)), is_first=True)


def in_pieces(decoder: CodecDecoder, codes: Tensor, sizes: Sequence[int]) -> Tensor:
    state, found = decoder.begin(len(codes)), []
    for place, piece in enumerate(codes.split(list(sizes), dim=1)):
        found.append(decoder(piece, state, is_first=place == 0))
    return torch.cat(found, dim=1)


def test_samples_are_those_of_the_package(decoders: Decoders) -> None:
    """More frames than the window holds."""
    codes = torch.from_numpy(ANSWERS["codec.codes"])[None]
    assert codes.shape[1] > 3 * decoders["residual"].config.sliding_window
    expected = torch.from_numpy(ANSWERS["codec.waveform"])[None]
    torch.testing.assert_close(whole(decoders["residual"], codes), expected, atol=1e-5, rtol=0)


def test_samples_are_those_of_transformers(decoders: Decoders, reference: Qwen3OmniMoeCode2Wav) -> None:
    codes = random_codes(decoders["summed"], 2, 30)
    with torch.no_grad():
        expected = reference(codes.transpose(1, 2))[:, 0]
    torch.testing.assert_close(whole(decoders["summed"], codes), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["residual", "summed"])
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_pieces_of_any_sizes_join_to_the_whole(decoders: Decoders, layout: str, sizes: list[int], seed: int) -> None:
    decoder = decoders[layout]
    codes = random_codes(decoder, 2, sum(sizes), seed)
    torch.testing.assert_close(in_pieces(decoder, codes, sizes), whole(decoder, codes), atol=1e-5, rtol=0)


def test_samples_of_a_frame_depend_on_no_later_one(decoders: Decoders) -> None:
    decoder = decoders["residual"]
    codes = random_codes(decoder, 1, 12)
    changed = codes.clone()
    changed[:, 5] = (codes[:, 5] + 1) % decoder.config.codebook_size
    until = 5 * decoder.config.frame_samples
    before, after = whole(decoder, codes), whole(decoder, changed)
    assert torch.equal(before[:, :until], after[:, :until])
    assert not torch.equal(before[:, until : until + 10], after[:, until : until + 10])


def test_the_state_does_not_grow(decoders: Decoders) -> None:
    decoder = decoders["residual"]
    state, sizes = decoder.begin(1), set()
    for frame in random_codes(decoder, 1, 20).split(1, dim=1):
        decoder(frame, state, is_first=False)
        sizes.add(tuple((key, tuple(tensor.shape)) for key, tensor in sorted(state.items())))
    assert len(sizes) == 1
    assert set(state) == set(decoder.carrying)


def test_a_published_checkpoint_fits_the_model_without_its_weights() -> None:
    raw = published_tokenizer_config()["decoder_config"]
    config = CodecDecoderConfig.of_residual_codes(raw, "decoder_config")
    with torch.device("meta"):
        decoder = CodecDecoder(config)
    assert config.frame_samples == 1920
    names = {
        "pre_conv.conv.weight": (1024, 512, 3),
        "quantizer.rvq_rest.vq.layers.14._codebook.embedding_sum": (2048, 256),
        "pre_transformer.layers.7.self_attn.q_proj.weight": (1024, 512),
        "pre_transformer.input_proj.bias": (512,),
        "upsample.1.1.dwconv.conv.weight": (1024, 1, 7),
        "decoder.1.block.1.conv.weight": (1536, 768, 16),
        "decoder.4.block.4.conv1.conv.weight": (96, 96, 7),
        "decoder.6.conv.weight": (1, 96, 7),
    }
    parameters = dict(decoder.named_parameters())
    for name, shape in names.items():
        target = decoder.locate(name)
        assert target is not None
        parameter = parameters[target.parameter]
        assert tuple(parameter[target.rows].shape if target.rows else parameter.shape) == shape, name


def test_a_missing_and_a_foreign_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_speech_tokenizer(tmp_path)
    shapes = {
        name.removeprefix("decoder."): tuple(tensor.shape)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith("decoder.")
    }
    with torch.device("meta"):
        decoder = CodecDecoder(read_codec(folder, None).decoder)
    plan_loading(decoder, shapes, "here")
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'decoder\.9\.weight'"):
        plan_loading(decoder, shapes | {"decoder.9.weight": (1,)}, "here")
    lacking = {name: shape for name, shape in shapes.items() if name != "pre_conv.conv.bias"}
    with pytest.raises(CheckpointError, match=r"nothing \(or not enough\) for the parameter 'pre_conv\.bias'"):
        plan_loading(decoder, lacking, "here")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("hidden_size", 0, "expected"),
        ("hidden_size", 2**40, "expected"),
        ("upsample_rates", [], "decoder_dim"),
        ("upsample_rates", [8, "five"], r"upsample_rates\[1\]"),
        ("decoder_dim", 100, "each of which halves it"),
        ("sliding_window", 1, "at least 2"),
        ("num_key_value_heads", 3, "a multiple of"),
        ("hidden_act", "gelu", "expected 'silu'"),
        ("attention_bias", True, "expected false"),
        ("rope_scaling", {"rope_type": "yarn"}, "expected the type 'default'"),
        ("head_dim", 7, "even"),
    ],
)
def test_odd_configurations_are_refused_with_their_key(key: str, value: object, complaint: str) -> None:
    raw = published_tokenizer_config()["decoder_config"] | {key: value}
    with pytest.raises(ConfigError, match=complaint) as caught:
        CodecDecoderConfig.of_residual_codes(raw, "somewhere")
    assert str(caught.value).startswith("somewhere: ")
