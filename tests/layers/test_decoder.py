"""The decoder takes another MLP, computes what is wanted of its last layer, and says what of a config.json it does not
support.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.attention.base import AttentionMetadata
from vllm_omni.layers.attention.reference import ReferenceAttention
from vllm_omni.layers.decoder import Decoder, DecoderConfig, DecoderMLP
from vllm_omni.layers.forward_context import ForwardContext, HiddenStateTaps
from vllm_omni.layers.lora import AdapterMix, adapted
from vllm_omni.layers.token_inputs import DeepRows

RAW: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def make_config(**own: Any) -> DecoderConfig:
    fields = DecoderConfig.fields_from(RAW, "config.json", head_dim=None)
    return DecoderConfig(**fields, qkv_bias=False, output_bias=False, head_norms=False, **own)


class Silent(nn.Module):
    """An MLP that adds nothing."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width = config.hidden_size

    def forward(self, states: Tensor) -> Tensor:
        assert states.shape[1] == self.width
        return torch.zeros_like(states)


class Counting(DecoderMLP):
    """Keeps how many rows it was given."""

    def forward(self, states: Tensor) -> Tensor:
        self.num_rows = len(states)
        return super().forward(states)


@torch.no_grad()
def run(
    decoder: Decoder,
    states: Tensor,
    wanted: list[int] | None = None,
    taps: HiddenStateTaps | None = None,
    deep: DeepRows | None = None,
) -> Tensor:
    count = len(states)
    metadata = AttentionMetadata.of(
        slots=list(range(count)),
        query_starts=[0, count],
        context_lens=[count],
        block_tables=[[0]],
        block_size=count,
        device=states.device,
    )
    cache = torch.zeros(2, 2, 1, count, 2, 4)
    wanted_rows = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
    context = ForwardContext(ReferenceAttention(metadata), cache, 2, taps, wanted_rows=wanted_rows)
    result: Tensor = decoder(states, torch.arange(count), context, deep)
    return result


def test_a_decoder_is_built_with_the_mlp_it_is_given() -> None:
    torch.manual_seed(0)
    plain, silent = Decoder(make_config()), Decoder(make_config(), lambda _index: Silent(make_config()))
    silent.load_state_dict({name: t for name, t in plain.state_dict().items() if ".mlp." not in name})
    states = torch.randn(3, 8)
    assert not torch.allclose(run(plain, states), run(silent, states))
    for layer in plain.layers:
        nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.testing.assert_close(run(plain, states), run(silent, states), rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [[], [4], [0, 2, 3]])
def test_the_last_layer_computes_the_wanted_rows_alone(wanted: list[int]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(make_config(), lambda _index: Counting(make_config()))
    states = torch.randn(5, 8)
    torch.testing.assert_close(run(decoder, states, wanted), run(decoder, states)[wanted])
    assert [layer.mlp.num_rows for layer in decoder.layers] == [5, 5]
    run(decoder, states, wanted)
    assert [layer.mlp.num_rows for layer in decoder.layers] == [5, len(wanted)]


@pytest.mark.parametrize("needs_all", ["taps", "deep", "adapters"])
def test_all_rows_of_the_last_layer_are_computed_where_they_are_needed(needs_all: str) -> None:
    torch.manual_seed(0)
    decoder = Decoder(make_config(), lambda _index: Counting(make_config()))
    states = torch.randn(5, 8)
    taps = HiddenStateTaps([2], 5, 8, states.dtype, states.device) if needs_all == "taps" else None
    deep = DeepRows(torch.tensor([0, 4]), [torch.randn(2, 8)] * 2) if needs_all == "deep" else None
    expected = run(decoder, states, deep=deep)
    with adapted([AdapterMix("of none", ())]) if needs_all == "adapters" else nullcontext():
        found = run(decoder, states, [1, 4], taps, deep)
    assert torch.equal(found, expected[[1, 4]])
    assert [layer.mlp.num_rows for layer in decoder.layers] == [5, 5]
    if taps is not None:
        assert torch.equal(taps.read([2], torch.arange(5)), expected)


@pytest.mark.parametrize("has_bias", [False, True])
def test_both_projections_of_the_mlp_have_biases_or_none_has(has_bias: bool) -> None:
    mlp = DecoderMLP(make_config(mlp_bias=has_bias))
    assert [mlp.gate_up_proj.bias is not None, mlp.down_proj.bias is not None] == [has_bias, has_bias]


def test_a_key_is_refused_unless_the_family_reads_it_itself() -> None:
    raw = {**RAW, "mlp_bias": True}
    with pytest.raises(ConfigError, match=r"config\.json: mlp_bias: got True, expected False"):
        DecoderConfig.fields_from(raw, "config.json", head_dim=None)
    DecoderConfig.fields_from(raw, "config.json", head_dim=None, own_keys=("mlp_bias",))
