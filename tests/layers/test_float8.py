"""Weights in float8: what they stand for, that rows depend on no others, that published ones stay as they are, and
where they are refused.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.language_models import CPU, save_random_model, write
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import Decoder
from vllm_omni.layers.float8 import (
    DTYPE,
    _product,
    multiply_float8,
    plain_product,
    quantize_float8,
)
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.packing import Float8Packing
from vllm_omni.layers.triton import glue
from vllm_omni.utils import precision
from vllm_omni.utils.device import compute_capability, is_cuda
from vllm_omni.utils.precision import FP8_CAPABILITY, choose_quantization
from vllm_omni.worker.ar.language_model import LanguageModelFolder

WIDE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def test_numbers_are_within_a_sixteenth_of_what_they_stand_for() -> None:
    weight = torch.randn(40, 96) * torch.rand(40, 1)
    numbers, scales = quantize_float8(weight)
    assert numbers.dtype == DTYPE and numbers.float().abs().amax(dim=1).eq(448).all()
    least = 2**-9 * scales[:, None]  # the smallest number above zero
    assert ((numbers.float() * scales[:, None] - weight).abs() <= weight.abs() / 16 + least).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_near_that_of_the_numbers_before_and_a_row_is_its_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 96), torch.randn(48)
    numbers, scales = quantize_float8(weight)
    x = (torch.randn(2, 15, 96) * torch.rand(2, 15, 1) * 100).to(dtype)
    product = multiply_float8(x, numbers, scales, bias.to(dtype))
    expected = x.float() @ weight.T + bias
    assert product.shape == (2, 15, 48) and product.dtype == dtype
    assert (product.float() - expected).std() < 0.05 * expected.std()
    torch.testing.assert_close(multiply_float8(x[1, 7:9], numbers, scales, bias.to(dtype)), product[1, 7:9])


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nothing_finite_and_spoils_no_other(odd: float) -> None:
    numbers, scales = quantize_float8(torch.randn(16, 16))
    x = torch.randn(3, 16)
    expected = multiply_float8(x, numbers, scales, None)
    x[1, 5] = odd
    product = multiply_float8(x, numbers, scales, None)
    assert not product[1].isfinite().any()
    torch.testing.assert_close(product[[0, 2]], expected[[0, 2]])


def test_rows_of_zeros_and_of_the_smallest_numbers_give_zeros() -> None:
    numbers, scales = quantize_float8(torch.cat([torch.zeros(8, 16), torch.randn(8, 16)]))
    product = multiply_float8(torch.tensor([[0.0] * 16, [1e-40] * 16]), numbers, scales, None)
    assert torch.equal(product, torch.zeros(2, 16))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(Qwen3ForCausalLM, Qwen3Config(**WIDE), tmp_path_factory.mktemp("words"))


def test_a_language_model_is_near_that_in_its_own_numbers(words: Path) -> None:
    folder = LanguageModelFolder.open(words)
    model: Any = folder.load(CPU, torch.float32, "fp8")
    packings = {type(part.packing) for part in model.modules() if isinstance(part, Linear) and part.can_quantize}
    assert packings == {Float8Packing}
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert folder.weights_bytes(4, "fp8") == held
    prompts = [[5, 6, 7], [9] * 11, [300, 20, 41]]
    ours, theirs = (write(found, prompts, 1) for found in (model, folder.load(CPU, torch.float32)))
    logits = [torch.stack([row.logits[0] for row in found]) for found in (ours, theirs)]
    assert 0 < (logits[0] - logits[1]).std() < 0.15 * logits[1].std()


def test_published_numbers_stay_as_they_are(words: Path, tmp_path: Path) -> None:
    tensors, scale = load_file(words / "model.safetensors"), torch.tensor([0.002])
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = published = (tensors[name] / scale).to(DTYPE)
    tensors[f"{name}_scale"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((words / "config.json").read_text())
    model: Any = LanguageModelFolder.open(tmp_path).load(CPU, torch.float32, "fp8")
    (decoder,) = (part for part in model.modules() if isinstance(part, Decoder))
    layer: Any = decoder.layers[0].mlp.down_proj
    assert torch.equal(layer.weight.view(torch.uint8), published.view(torch.uint8))
    assert layer.scales.eq(scale).all()


def chosen(asked: str, device: torch.device, published: str | None) -> str | None:
    return choose_quantization(asked, device, torch.bfloat16, published, can_quantize=True)


def test_it_is_for_gpus_that_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match="got 'fp8' on cpu, expected none: fp8 is for CUDA"):
        chosen("fp8", CPU, None)
    for capability, expected in (((8, 0), None), ((9, 0), "fp8")):
        monkeypatch.setattr(precision, "compute_capability", lambda device, found=capability: found)
        assert chosen("auto", gpu, "float8") == expected
        assert chosen("auto", gpu, "int8") is None
    assert chosen("fp8", gpu, None) == "fp8"
    monkeypatch.setattr(precision, "compute_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9"):
        chosen("fp8", gpu, None)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ("interpreter", torch.float32),
        pytest.param("gpu", torch.float32, marks=pytest.mark.cuda),
        pytest.param("gpu", torch.bfloat16, marks=pytest.mark.cuda),
    ],
)
def test_one_pass_of_triton_gives_the_same_numbers(
    where: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if where == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off where there is a GPU")
    device = CPU if where == "interpreter" else request.getfixturevalue("gpu")
    torch.manual_seed(0)
    rows = torch.randn(7, 200) * torch.rand(7, 1) * 100
    rows[2], rows[3] = 0.0, rows[3] * 1e-8
    rows = rows.to(dtype)
    numbers, scales = glue.quantize_rows(rows.to(device), DTYPE)
    expected, expected_scales = quantize_float8(rows)
    assert torch.equal(scales.cpu(), expected_scales)
    differs = numbers.cpu().float() != expected.float()
    if where == "interpreter":  # which loses the carry where a number is rounded up to a power of two
        differs &= numbers.float() * 2 != expected.float()
    assert not differs.any()


@pytest.mark.cuda
@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_the_units_of_a_gpu_multiply_as_defined(num_rows: int, gpu: torch.device) -> None:
    if not is_cuda(gpu) or compute_capability(gpu) < FP8_CAPABILITY:
        pytest.skip("needs a GPU that multiplies float8")
    torch.manual_seed(0)
    weight = quantize_float8(torch.randn(96, 256))
    rows = quantize_float8(torch.randn(num_rows, 256) * torch.rand(num_rows, 1) * 100)
    product = _product(*(part.to(gpu) for part in (*rows, *weight))).cpu().float()
    expected = plain_product(*rows, *weight).float()
    torch.testing.assert_close(product, expected, rtol=0.02, atol=0.01 * float(expected.std()))
    there = quantize_float8((torch.randn(40, 64)).to(gpu))
    assert there[0].dtype == DTYPE and there[1].isfinite().all()
