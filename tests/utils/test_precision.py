"""`dtype: auto` is the fastest dtype that keeps what was published, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_omni.errors import ConfigError
from vllm_omni.utils.device import multiplies_bfloat16
from vllm_omni.utils.precision import DTYPES, Precision, choose_precision, choose_quantization

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AMD = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
INTEL = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}
OLD = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_fp16": True}
ARM, OLD_ARM = {"architecture": "aarch64", "bf16": True}, {"architecture": "aarch64", "fp16_arith": True, "bf16": False}


def has(monkeypatch: pytest.MonkeyPatch, features: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def auto(published: torch.dtype | None, device: torch.device = CPU) -> Precision:
    return choose_precision("auto", device, lambda: published)


@pytest.mark.parametrize("features", [AMD, INTEL, ARM])
def test_a_cpu_that_multiplies_bfloat16_has_it_for_what_was_published_in_16_bits(
    features: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, features)
    assert str(auto(torch.bfloat16)) == "bfloat16 (published in bfloat16; this CPU multiplies it)"
    assert str(auto(torch.float16)) == "bfloat16 (published in float16; this CPU multiplies bfloat16)"


@pytest.mark.parametrize("published", [torch.float32, torch.float64])
def test_what_was_published_in_more_bits_keeps_them(published: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, AMD)
    assert auto(published).dtype == torch.float32 and str(published).removeprefix("torch.") in auto(published).reason


def test_a_checkpoint_that_does_not_say_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, AMD)
    assert str(auto(None)) == "float32 (no weights say otherwise)"


@pytest.mark.parametrize("features", [OLD, OLD_ARM, {}])
def test_every_other_cpu_computes_in_float32(features: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, features)
    for published in (torch.bfloat16, torch.float16, torch.float32, None):
        assert str(auto(published)) == "float32 (this CPU does not multiply bfloat16)"


def test_a_cpu_whose_features_cannot_be_known_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, AMD)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert auto(torch.bfloat16).dtype == torch.float32


def test_features_that_torch_cannot_use_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, whose torch has no oneDNN."""
    has(monkeypatch, ARM)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bfloat16(CPU)


def test_an_accelerator_computes_in_bfloat16_whatever_was_published() -> None:
    def published() -> torch.dtype:
        raise AssertionError("nobody needs to know")

    assert str(choose_precision("auto", CUDA, published)) == "bfloat16 (auto on cuda)"


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("features", [AMD, OLD])
def test_a_dtype_that_is_named_wins_and_nothing_is_read(
    name: str, features: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def published() -> torch.dtype:
        raise AssertionError("nobody needs to know")

    has(monkeypatch, features)
    assert choose_precision(name, CPU, published) == Precision(DTYPES[name], "as configured")


def test_auto_is_never_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    for features in (AMD, INTEL, ARM, OLD, OLD_ARM):
        has(monkeypatch, features)
        assert {auto(each).dtype for each in (*DTYPES.values(), None)} <= {torch.float32, torch.bfloat16}


def test_an_unknown_dtype_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="dtype: got 'half', expected auto or one of float32, bfloat16, float16"):
        choose_precision("half", CPU, lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("can_quantize", [True, False])
def test_halves_are_kept_beside_float32_on_cpus_alone(
    dtype: torch.dtype, device: torch.device, keeps: bool, can_quantize: bool
) -> None:
    def auto(published: str | None = None) -> str | None:
        return choose_quantization(
            "auto", device, dtype, published, can_quantize=can_quantize, keeps_halves=lambda: keeps
        )

    fits = dtype == torch.float32 and device == CPU
    assert auto() == ("bfloat16" if fits and keeps and can_quantize else None)
    assert auto("int8") == ("int8" if device == CPU and can_quantize else None)
    if fits and can_quantize:
        assert choose_quantization("bfloat16", device, dtype, None, can_quantize=True) == "bfloat16"
    else:
        with pytest.raises(ConfigError, match="quantization: got 'bfloat16'"):
            choose_quantization("bfloat16", device, dtype, None, can_quantize=can_quantize)
