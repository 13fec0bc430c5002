"""Blocks that torch compiles: the same numbers, for so many mixes of sizes; what cannot be compiled is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_omni import Omni
from vllm_omni.errors import ConfigError
from vllm_omni.layers import lora
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.transformer import ZImageTransformer
from vllm_omni.worker.diffusion import compiled_blocks
from vllm_omni.worker.diffusion.compiled_blocks import CompiledStack

CONFIG = ZImageConfig(
    dim=64,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    in_channels=4,
    cap_feat_dim=32,
    norm_eps=1e-5,
    qk_norm=True,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=(8, 12, 12),
    axes_lens=(64, 64, 64),
)
SMALL, LARGE = (4, 8, 8), (4, 16, 16)


def make_transformer(device: torch.device) -> ZImageTransformer:
    generator = torch.Generator().manual_seed(0)
    transformer = ZImageTransformer(CONFIG)
    for parameter in transformer.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.08).to(device)
    return transformer.requires_grad_(False).eval()


@torch.inference_mode()
def velocities(transformer: ZImageTransformer, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    texts = [torch.randn(32, CONFIG.dim, generator=torch.Generator().manual_seed(2)).to(device) for _ in shapes]
    return [found.cpu() for found in transformer(latents, torch.full((len(shapes),), 0.5, device=device), texts)]


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at most; torch keeps what it has compiled of the same function."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled_blocks, "MAX_CLASSES", 2)


@pytest.mark.usefixtures("classes")
def test_compiled_blocks_give_the_same_and_only_so_many_mixes_are_compiled() -> None:
    """Traced whole, and once for all blocks; generating code is left out here."""
    cpu = torch.device("cpu")
    transformer = make_transformer(cpu)
    mixes = [(SMALL,), (SMALL, SMALL), (LARGE,)]
    plain = [velocities(transformer, cpu, *mix) for mix in mixes]
    stack = CompiledStack(transformer, backend="aot_eager")
    compiled = [velocities(transformer, cpu, *mix) for mix in mixes]
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-4)
    assert torch.equal(compiled[2][0], plain[2][0]), "a third mix is computed as without compiling"
    assert stack.num_classes == 2
    found = torch._dynamo.utils.counters
    assert found["stats"]["unique_graphs"] == 2 and not found["graph_break"]
    torch.testing.assert_close(compiled[1][0], compiled[0][0], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("classes")
def test_rows_with_adapters_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = CompiledStack(make_transformer(torch.device("cpu")), backend="aot_eager")
    monkeypatch.setattr(compiled_blocks, "acting", lambda: lora.AdaptedRows(()))
    assert not stack.takes((torch.zeros(1),)) and stack.num_classes == 0


def test_a_compiled_model_is_freed_at_once() -> None:
    transformer = make_transformer(torch.device("cpu"))
    CompiledStack(transformer, backend="aot_eager")
    watched = weakref.ref(transformer)
    gc.disable()
    try:
        del transformer
        assert watched() is None
    finally:
        gc.enable()


def test_where_nothing_is_compiled_the_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile: got true on cpu, expected cuda"):
        Omni("tiny_image", device="cpu", overrides=["image.compile=true"], progress=False)


@pytest.mark.cuda
@pytest.mark.usefixtures("classes")
def test_generated_code_gives_the_same(gpu: torch.device) -> None:
    transformer = make_transformer(gpu)
    plain = velocities(transformer, gpu, SMALL, SMALL)
    CompiledStack(transformer)
    compiled: list[Any] = velocities(transformer, gpu, SMALL, SMALL)
    torch.testing.assert_close(torch.stack(compiled), torch.stack(plain), rtol=0, atol=2e-3)
