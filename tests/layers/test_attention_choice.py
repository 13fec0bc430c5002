"""Which backend a stage takes: what does not fit is refused in words, and `auto` passes it over. The calls of
FlashAttention have the signatures of the functions that are called.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from support import attention as stand_ins
from support.attention import FlashByTorch
from torch.nn.attention.varlen import varlen_attn

from vllm_omni import registry
from vllm_omni.errors import ConfigError
from vllm_omni.layers.attention import choice, flash
from vllm_omni.layers.attention.base import AttentionUse
from vllm_omni.layers.attention.choice import choose_attention
from vllm_omni.layers.attention.flash import FlashAttention
from vllm_omni.layers.attention.triton import TritonAttention

CPU_USE = AttentionUse(torch.device("cpu"), torch.float32, block_size=16, head_dim=64)
GPU_USE = AttentionUse(torch.device("cuda"), torch.bfloat16, block_size=256, head_dim=128)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU and every package."""
    monkeypatch.setattr(flash, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr("vllm_omni.layers.attention.triton.find_spec", lambda name: object())
    monkeypatch.setattr("vllm_omni.layers.attention.triton.missing_to_compile", lambda: None)
    monkeypatch.setattr(FlashAttention, "find_kernel", FlashByTorch.find_kernel)


def test_auto_on_a_cpu_is_a_backend_that_fits_there() -> None:
    row = choose_attention("auto", CPU_USE)
    assert registry.resolve("attention", row).complaint(CPU_USE) is None


@pytest.mark.usefixtures("gpu")
def test_auto_on_cuda_takes_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("auto", GPU_USE) == "flash"
    small_blocks = dataclasses.replace(GPU_USE, block_size=16)
    assert choose_attention("auto", small_blocks) == "triton"
    monkeypatch.setattr(TritonAttention, "complaint", classmethod(lambda cls, use: "not here"))
    assert choose_attention("auto", small_blocks) == "sdpa"


def test_every_backend_that_auto_may_take_is_in_the_registry() -> None:
    rows = {row for best in choice.BEST.values() for row in best} | {choice.EVERYWHERE}
    assert rows <= set(registry.names("attention"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": torch.device("cpu")}, "got device cpu, expected cuda"),
        ({"dtype": torch.float32}, "got dtype float32, expected bfloat16 or float16"),
        ({"block_size": 16}, "got block_size 16, expected a multiple of 256"),
        ({"head_dim": 260}, "got heads of 260, expected a multiple of 8 up to 256"),
        ({"head_dim": 100}, "got heads of 100, expected a multiple of 8 up to 256"),
    ],
)
def test_flash_says_what_does_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_attention("flash", dataclasses.replace(GPU_USE, **changes))  # type: ignore[arg-type]


@pytest.mark.usefixtures("gpu")
def test_flash_says_which_gpu_and_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashAttention, "find_kernel", staticmethod(lambda: None))
    with pytest.raises(ConfigError, match=r"expected 2\.12 or later, or the package flash-attn"):
        choose_attention("flash", GPU_USE)
    monkeypatch.setattr(flash, "compute_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match="older than Ampere"):
        choose_attention("flash", GPU_USE)


def test_triton_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.layers.attention.triton.find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="got device cpu, expected cuda"):
        choose_attention("triton", CPU_USE)
    monkeypatch.setattr("vllm_omni.layers.attention.triton.missing_to_compile", lambda: None)
    with pytest.raises(ConfigError, match="got heads of 512, expected at most 256"):
        choose_attention("triton", dataclasses.replace(GPU_USE, head_dim=512))
    monkeypatch.setattr("vllm_omni.layers.attention.triton.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton"):
        choose_attention("triton", GPU_USE)


def test_triton_without_a_compiler_is_passed_over_and_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are compiled by triton itself, what launches them by the C compiler of the machine."""
    monkeypatch.setattr("vllm_omni.layers.attention.triton.find_spec", lambda name: object())
    monkeypatch.setattr("vllm_omni.layers.triton.library.shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    small_blocks = dataclasses.replace(GPU_USE, dtype=torch.float32, block_size=16)
    monkeypatch.setattr(flash, "compute_capability", lambda device: (9, 0))
    assert choose_attention("auto", small_blocks) == "sdpa"
    with pytest.raises(ConfigError, match="needs a C compiler"):
        choose_attention("triton", small_blocks)


def test_the_stand_in_for_torchs_function_has_its_signature() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (stand_ins.varlen_attn, varlen_attn))
    if "block_table" not in theirs:
        pytest.skip("torch older than 2.12")
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_the_stand_ins_for_the_packages_functions_have_their_signatures(name: str) -> None:
    package = pytest.importorskip("flash_attn")
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (stand_ins, package))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
