"""Every kernel equals its definition in torch, in each variant that this processor runs; rows depend on no others."""

from __future__ import annotations

import copy
import ctypes.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata
from vllm_omni.layers.attention.native import NativeAttention
from vllm_omni.layers.attention.reference import ReferenceAttention
from vllm_omni.layers.decoder import Decoder, DecoderConfig, DecoderMLP
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.halves import multiply_halves
from vllm_omni.layers.linear import Embedding, Linear, pack_linears, quantize_linears
from vllm_omni.layers.moe import SparseMLP
from vllm_omni.layers.native import library, structures
from vllm_omni.layers.native.packed import NativePacking
from vllm_omni.layers.native.structures import interface
from vllm_omni.layers.native.vocabulary import MOST_TOP, find_largest, find_top
from vllm_omni.layers.quantization import dequantize, multiply_quantized, quantize_weight
from vllm_omni.layers.sampler import largest

DTYPES = (torch.float32, torch.bfloat16)
SIZE = 16  # of a block
# Rows, half of the inputs, panels of outputs, and whether there is a bias
PRODUCTS = (st.integers(0, 70), st.integers(1, 70) | st.sampled_from([16, 48, 96]), st.integers(1, 5), st.booleans())


def test_a_variant_is_used_that_gets_a_product_right(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = library.built_variants().values()
    assert library.multiplies(file)
    functions = library.load(file)[torch.float32]
    monkeypatch.setattr(functions, "multiply", lambda *arguments: None)
    assert not library.multiplies(file)


def test_what_is_no_library_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "_avx2.so"
    file.write_bytes(b"made for another system")
    assert not library.multiplies(file)


def close(result: Tensor, expected: Tensor, steps: float = 1.0) -> None:
    """bfloat16: to `steps` of its 8 bits, where sums that are rounded once are compared."""
    tolerance = 2e-5 if result.dtype == torch.float32 else steps * 2**-7
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(*PRODUCTS, st.sampled_from(DTYPES), st.integers(0, 9))
@torch.inference_mode()
def test_products_equal_torchs(rows: int, half: int, panels: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    layer = Linear(2 * half, 32 * panels, bias=bias).to(dtype)
    x = torch.randn(rows, 2 * half, dtype=dtype)
    expected = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None).to(dtype)
    layer.packing = NativePacking.find(layer.weight)
    assert layer.packing is not None
    layer.weight = torch.nn.Parameter(layer.packing.pack(layer.weight.detach()), requires_grad=False)
    close(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [96, 2048])  # rows of 2048 are copied apart
@torch.inference_mode()
def test_a_row_is_the_same_alone_and_among_others(dtype: torch.dtype, inputs: int) -> None:
    packing = NativePacking.find(torch.empty(160, inputs, dtype=dtype))
    assert packing is not None
    packed = packing.pack(torch.randn(160, inputs).to(dtype))
    x = torch.randn(1100, inputs).to(dtype)
    together = packing.multiply(x, packed, None)
    for start, stop in ((0, 1), (7, 9), (100, 116), (43, 1000)):
        assert torch.equal(packing.multiply(x[start:stop], packed, None), together[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_packed_embeddings_are_read_as_they_were(dtype: torch.dtype) -> None:
    embedding = Embedding(96, 34, is_head=True).to(dtype)
    weight, ids = embedding.weight.detach().clone(), torch.tensor([0, 95, 31, 32, 33, 31])
    embedding.pack()
    assert embedding.packing is not None and not torch.equal(embedding.weight, weight)
    assert torch.equal(embedding(ids), weight[ids])


@settings(max_examples=40)
@given(*PRODUCTS, st.integers(0, 9))
@torch.inference_mode()
def test_products_with_bfloat16_beside_float32_are_those_of_float32_bit_for_bit(
    rows: int, half: int, panels: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, held = torch.randn(rows, 2 * half), torch.randn(32 * panels, 2 * half).bfloat16()
    added = torch.randn(32 * panels) if bias else None
    packing, whole = NativePacking.find(held, torch.float32), NativePacking.find(held.float())
    assert packing is not None and whole is not None
    product = packing.multiply(x, packing.pack(held.clone()), added)
    assert torch.equal(product, whole.multiply(x, whole.pack(held.float()), added))
    close(product, multiply_halves(x, held, added))


def test_kernels_take_no_numbers_that_they_would_have_to_round() -> None:
    weight = torch.zeros(32, 32)
    assert NativePacking.find(weight, torch.bfloat16) is None
    assert NativePacking.find(weight.half(), torch.float32) is None


@torch.inference_mode()
def test_packed_embeddings_in_bfloat16_are_read_in_float32() -> None:
    held, ids = torch.randn(96, 34).bfloat16(), torch.tensor([0, 95, 31, 32, 33, 31])
    packing = NativePacking.find(held, torch.float32)
    assert packing is not None
    assert torch.equal(packing.rows(packing.pack(held.clone()), ids), held[ids].float())


@settings(max_examples=60)
@given(
    st.integers(0, 70),
    st.integers(1, 40) | st.sampled_from([48, 80, 270]),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
@torch.inference_mode()
def test_products_with_int8_equal_their_definition_bit_for_bit(
    rows: int, quarter: int, panels: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, 4 * quarter) * torch.rand(rows, 1)).to(dtype)
    weight, scales = quantize_weight(torch.randn(32 * panels, 4 * quarter))
    weight[torch.rand(weight.shape) < 0.01] = -128  # as others publish
    added = torch.randn(32 * panels).to(dtype) if bias else None
    packing = NativePacking.find(weight, dtype, scales)
    assert packing is not None
    product = packing.multiply(x, packing.pack(weight.clone()), added)
    assert torch.equal(product, multiply_quantized(x, weight, scales, added))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_the_largest_numbers_of_int8_are_not_cut(dtype: torch.dtype) -> None:
    weight, scales = torch.full((32, 4096), -128, dtype=torch.int8), torch.ones(32)
    weight[::2] = 127
    x = torch.ones(5, 4096, dtype=dtype)
    x[1:] *= -1
    packing = NativePacking.find(weight, dtype, scales)
    assert packing is not None
    product = packing.multiply(x, packing.pack(weight.clone()), None)
    assert torch.equal(product, multiply_quantized(x, weight, scales, None))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 21, 35])
@torch.inference_mode()
def test_a_row_that_is_not_finite_spoils_its_own_product_with_int8_alone(odd: float, place: int) -> None:
    weight, scales = quantize_weight(torch.randn(32, 36))
    packing = NativePacking.find(weight, torch.float32, scales)
    assert packing is not None
    packed = packing.pack(weight)
    x = torch.randn(3, 36)
    expected = packing.multiply(x, packed, None)
    x[1, place] = odd
    product = packing.multiply(x, packed, None)
    assert not product[1].isfinite().any()
    assert torch.equal(product[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_packed_embeddings_in_int8_are_read_as_they_were(dtype: torch.dtype) -> None:
    weight, scales = quantize_weight(torch.randn(96, 36))
    ids = torch.tensor([0, 95, 31, 32, 33, 31])
    packing = NativePacking.find(weight, dtype, scales)
    assert packing is not None
    rows = packing.rows(packing.pack(weight.clone()), ids)
    assert torch.equal(rows, dequantize(weight, scales)[ids].to(dtype))


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 80), st.sampled_from(DTYPES), st.integers(0, 99), st.booleans())
def test_the_first_of_the_largest_is_found(rows: int, size: int, dtype: torch.dtype, seed: int, spoils: bool) -> None:
    torch.manual_seed(seed)
    logits = torch.randint(-3, 4, (rows, size)).to(dtype)  # many are equal
    expected = [row.tolist().index(row.max()) for row in logits]
    if spoils:
        logits[rows - 1, size // 2] = [math.nan, math.inf, -math.inf][seed % 3]
        expected[-1] = -1
    found = find_largest(logits)
    assert found is not None and found.tolist() == expected == largest(logits).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 65, 5000])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_top_are_the_first_of_a_stable_sort(dtype: torch.dtype, size: int, count: int) -> None:
    logits = torch.randn(9, size).mul(4).round().to(dtype)
    logits[1] = torch.arange(size)
    logits[2, size // 2 :] = -torch.inf
    logits[3] = 2.0
    found = find_top(logits, count)
    assert found is not None and find_top(logits, MOST_TOP + 1) is None
    values, places = logits.float().sort(descending=True, stable=True)
    is_there = values[:, :count] > -torch.inf
    num_found = is_there.shape[1]
    assert torch.equal(found[0][:, :num_found], values[:, :count])
    assert torch.equal(found[1][:, :num_found][is_there], places[:, :count][is_there])
    assert (found[0][:, num_found:] == -torch.inf).all() and not found[1][found[0] == -torch.inf].any()


class Step:
    """Sequences of (tokens before, tokens now) over shuffled blocks, keys and values of the past in them."""

    def __init__(self, shapes: list[tuple[int, int]], num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        needed = [-(-(past + new) // SIZE) for past, new in shapes]
        shuffled = torch.randperm(sum(needed)).tolist()
        self.shapes = shapes
        self.tables = [[shuffled.pop() for _ in range(count)] for count in needed]
        self.num_tokens = sum(new for _, new in shapes)
        self.positions = torch.cat([torch.arange(past, past + new) for past, new in shapes])
        self.cache = torch.randn(2, 2, sum(needed), SIZE, num_kv_heads, head_dim).to(dtype)

    def metadata(self, *, only: int | None = None) -> AttentionMetadata:
        chosen = range(len(self.shapes)) if only is None else [only]
        starts = [0]
        for index in chosen:
            starts.append(starts[-1] + self.shapes[index][1])
        places = [(self.tables[i], p) for i in chosen for p in range(self.shapes[i][0], sum(self.shapes[i]))]
        return AttentionMetadata.of(
            slots=[table[place // SIZE] * SIZE + place % SIZE for table, place in places],
            query_starts=starts,
            context_lens=[sum(self.shapes[index]) for index in chosen],
            block_tables=[self.tables[index] for index in chosen],
            block_size=SIZE,
            device=torch.device("cpu"),
        )

    def rows(self, index: int) -> slice:
        start = sum(new for _, new in self.shapes[:index])
        return slice(start, start + self.shapes[index][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (16, 2), (16, 1), (6, 6)])
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("window", [None, 40])
@torch.inference_mode()
def test_long_and_wide_steps_attend_as_the_definition_says(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, window: int | None
) -> None:
    """With so many sequences a task is all heads of one; alone, where no thread is to be idle, a head of it."""
    torch.manual_seed(0)
    crowd = [(past, 1) for past in range(20)]
    step = Step([(1500, 1), (0, 70), (33, 20), (5, 1), (1023, 1), (1024, 1), *crowd], heads[1], head_dim, dtype)
    query = torch.randn(step.num_tokens, heads[0], head_dim).to(dtype)
    key, value = torch.randn(2, step.num_tokens, heads[1], head_dim).to(dtype)
    native, definition = (
        attention(step.metadata())(query, key, value, step.cache[0].clone(), window)
        for attention in (NativeAttention, ReferenceAttention)
    )
    close(native, definition)
    cache = step.cache[0].clone()
    for index in range(len(step.shapes)):
        rows = step.rows(index)
        alone = NativeAttention(step.metadata(only=index))(query[rows], key[rows], value[rows], cache, window)
        assert torch.equal(alone, native[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (16, 2)])
@torch.inference_mode()
def test_rows_of_a_prompt_have_the_same_bits_wherever_it_is_cut(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """As when its beginning was computed for another request. 60 rows leave a rest of two in tasks of 21 each."""
    torch.manual_seed(0)
    whole = Step([(0, 60)], heads[1], 32, dtype)
    query = torch.randn(60, heads[0], 32).to(dtype)
    key, value = torch.randn(2, 60, heads[1], 32).to(dtype)
    cache = whole.cache[0].clone()
    expected = NativeAttention(whole.metadata())(query, key, value, cache, None)
    for cut in (1, 16, 17, 33, 52):
        whole.shapes = [(cut, 60 - cut)]
        rest = NativeAttention(whole.metadata())(query[cut:], key[cut:], value[cut:], cache, None)
        assert torch.equal(rest, expected[cut:]), cut


def quantised(decoder: Decoder, quantization: str = "int8") -> Decoder:
    """The same with its projections held so."""
    published = {name: tensor.clone() for name, tensor in decoder.named_parameters()}
    quantize_linears(decoder, quantization)
    for name, layer in decoder.named_modules():
        if isinstance(layer, Linear):
            layer.fill(slice(None), published[f"{name}.weight"], None)
    return decoder


def make_decoder(
    dtype: torch.dtype,
    *,
    biases: bool,
    head_norms: bool,
    windows: tuple[int | None, ...] = (),
    intermediate_size: int = 96,
) -> Decoder:
    raw = {
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": intermediate_size, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    }
    config = DecoderConfig(
        **DecoderConfig.fields_from(raw, "config.json", head_dim=None),
        qkv_bias=biases,
        output_bias=biases,
        head_norms=head_norms,
        mlp_bias=biases,
        windows=windows,
    )
    decoder = Decoder(config).to(dtype).requires_grad_(False).eval()
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 2 else 0.3) + (parameter.ndim == 1))
    return decoder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [[(20, 1)], [(20, 1), (0, 1), (37, 1)], [(0, 40), (8, 1), (16, 9)]])
@pytest.mark.parametrize(("biases", "head_norms", "windows"), [(False, True, ()), (True, False, (None, 12))])
@pytest.mark.parametrize("in_int8", [False, True])
@torch.inference_mode()
def test_layers_in_one_call_equal_them_one_by_one(
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    biases: bool,
    head_norms: bool,
    windows: tuple[int | None, ...],
    in_int8: bool,
) -> None:
    torch.manual_seed(0)
    step = Step(shapes, 2, 32, dtype)
    decoder = make_decoder(dtype, biases=biases, head_norms=head_norms, windows=windows)
    states = torch.randn(step.num_tokens, 64).to(dtype)

    def run(
        model: Decoder,
        attention: type[NativeAttention] | type[ReferenceAttention],
        cache: Tensor,
        only: int | None = None,
        wanted: list[int] | None = None,
    ) -> Tensor:
        rows = slice(None) if only is None else step.rows(only)
        wanted_rows = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
        context = ForwardContext(attention(step.metadata(only=only)), cache, 2, wanted_rows=wanted_rows)
        result: Tensor = model(states[rows], step.positions[rows], context)
        return result

    plain_cache, native_cache = step.cache.clone(), step.cache.clone()
    plain_decoder = copy.deepcopy(quantised(decoder) if in_int8 else decoder)
    if in_int8:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "built_variants", dict)
            pack_linears(plain_decoder)
    plain = run(plain_decoder, ReferenceAttention, plain_cache)
    pack_linears(decoder)
    assert decoder.native() is not None
    native = run(decoder, NativeAttention, native_cache)
    # a number that is rounded otherwise before it is quantised moves by a whole step of int8
    close(native, plain, steps=16 if in_int8 else 8)
    close(native_cache, plain_cache, steps=16 if in_int8 else 8)
    for index in range(len(shapes)):
        assert torch.equal(run(decoder, NativeAttention, step.cache.clone(), index), native[step.rows(index)])
    last = [step.rows(index).stop - 1 for index in range(len(shapes))]
    for wanted in ([], last, last[-1:], list(range(step.num_tokens))):
        cache = step.cache.clone()
        assert torch.equal(run(decoder, NativeAttention, cache, wanted=wanted), native[wanted])
        assert torch.equal(cache, native_cache)


def test_layers_are_run_one_by_one_where_a_panel_holds_gates_and_ups() -> None:
    decoder = make_decoder(torch.float32, biases=False, head_norms=True, intermediate_size=48)
    pack_linears(decoder)
    assert all(isinstance(part.packing, NativePacking) for part in decoder.modules() if isinstance(part, Linear))
    assert decoder.native() is None


@torch.inference_mode()
def test_layers_whose_weights_are_in_bfloat16_are_those_of_float32_bit_for_bit() -> None:
    torch.manual_seed(0)
    step = Step([(20, 1), (0, 40), (16, 9)], 2, 32, torch.float32)
    whole = make_decoder(torch.float32, biases=True, head_norms=True)
    for part in whole.modules():
        if isinstance(part, Linear):
            part.weight.copy_(part.weight.bfloat16())
    held = quantised(copy.deepcopy(whole), "bfloat16")
    states = torch.randn(step.num_tokens, 64)

    def run(model: Decoder) -> tuple[Tensor, Tensor]:
        cache = step.cache.clone()
        pack_linears(model)
        assert model.native() is not None
        return model(states, step.positions, ForwardContext(NativeAttention(step.metadata()), cache, 2)), cache

    for found, expected in zip(run(held), run(whole), strict=True):
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_a_pool_where_one_of_another_size_was_is_read_as_it_is() -> None:
    """As when a stage is built anew, or an engine after another with the same weights."""
    torch.manual_seed(0)
    decoder = make_decoder(torch.float32, biases=False, head_norms=True)
    states = torch.randn(1, 64)
    steps = [Step([(past, 1)], 2, 32, torch.float32) for past in (40, 20)]

    def run(attention: type[NativeAttention] | type[ReferenceAttention], step: Step, cache: Tensor) -> Tensor:
        result: Tensor = decoder(states, step.positions, ForwardContext(attention(step.metadata()), cache, 2))
        return result

    plain = [run(ReferenceAttention, step, step.cache.clone()) for step in steps]
    pack_linears(decoder)
    memory = torch.empty(max(step.cache.numel() for step in steps))
    for step, expected in zip(steps, plain, strict=True):
        cache = memory[: step.cache.numel()].view(step.cache.shape)
        close(run(NativeAttention, step, cache.copy_(step.cache)), expected, steps=8)


def make_experts(num_experts: int, num_chosen: int, dtype: torch.dtype) -> SparseMLP:
    """Of 64 in 96, packed; the second of two such has its experts run one by one."""
    config = DecoderConfig(
        **dict.fromkeys(("vocab_size", "num_layers", "num_heads", "num_kv_heads", "max_position_embeddings"), 1),
        hidden_size=64,
        intermediate_size=96,
        head_dim=2,
        rms_norm_eps=1e-6,
        rope={"rope_type": "default", "rope_theta": 1e4},
        qkv_bias=False,
        output_bias=False,
        head_norms=False,
    )
    torch.manual_seed(0)
    layer = SparseMLP(
        64,
        lambda: DecoderMLP(config),
        num_experts=num_experts,
        num_chosen=num_chosen,
        normalises=True,
        shared=DecoderMLP(config),
    )
    layer = layer.to(dtype).requires_grad_(False)
    pack_linears(layer)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_experts", "num_chosen"), [(0, 4, 2), (1, 4, 1), (5, 40, 6), (90, 7, 3)])
@torch.inference_mode()
def test_experts_in_one_call_are_those_one_by_one(
    dtype: torch.dtype, rows: int, num_experts: int, num_chosen: int
) -> None:
    layer = make_experts(num_experts, num_chosen, dtype)
    native = layer.native()
    assert native is not None
    states = torch.randn(rows, 64).to(dtype)
    weights, chosen = layer.route(states)
    mixed = native.mix(states, chosen, weights)
    close(mixed, layer._mix(states, chosen, weights) if rows else mixed)
    for row in range(rows):
        alone = native.mix(states[row : row + 1], chosen[row : row + 1], weights[row : row + 1])
        torch.testing.assert_close(alone[0], mixed[row], rtol=0, atol=0)
    shared = layer.shared_expert_gate(states).sigmoid() * layer.shared_expert(states)  # type: ignore[misc]
    torch.testing.assert_close(layer(states), mixed + shared, rtol=0, atol=0)


@torch.inference_mode()
def test_experts_of_other_kinds_and_in_int8_are_run_one_by_one() -> None:
    layer = make_experts(4, 2, torch.bfloat16)
    layer.experts[2] = torch.nn.Identity()
    assert layer.native() is None
    with torch.device("meta"):
        blank = make_experts(4, 2, torch.bfloat16)
    quantize_linears(blank)
    assert blank.native() is None


def test_kernels_of_another_version_are_not_called(
    variant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Arguments in other places would be read as pointers."""
    file = library.built_variants()[variant]
    library.load.cache_clear()
    assert library.load(file)
    library.load.cache_clear()
    monkeypatch.setattr(library, "interface", lambda: interface() + 1)
    assert library.load(file) == {}
    assert "another version" in caplog.text and "make setup" in caplog.text
    library.load.cache_clear()


def test_a_library_that_says_no_version_is_not_called(caplog: pytest.LogCaptureFixture) -> None:
    other = ctypes.util.find_library("m")
    assert other is not None
    library.load.cache_clear()
    assert library.load(Path(other)) == {} and "another version" in caplog.text


def test_what_describes_the_calls_is_read_without_torch() -> None:
    code = f"import runpy, sys; print(runpy.run_path({structures.__file__!r})['interface'](), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(interface()), "False"]
