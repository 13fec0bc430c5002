"""A language model whose layers several ranks share: the same answers as on one, only their own rows and columns read,
and a rank that dies or hangs ends the group with its cause.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.ar import GREEDY, make_model_folder, make_spec, make_stage, shared_text_config
from support.language_models import TINY, load_model, save_random_model, write
from support.ranks import ThreadGroup

from vllm_omni import Omni, OmniOutput, SamplingParams
from vllm_omni.config.schema import ParallelConfig
from vllm_omni.errors import ConfigError
from vllm_omni.layers import weights
from vllm_omni.layers.shard import Shard
from vllm_omni.worker.ar.kv_pool import KVLayout
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.parallel.decoder import DecoderLead, decoder_orders

CPU = torch.device("cpu")
WIDE = {**TINY, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
SPARSE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Qwen3, biased": ("Qwen3", {"attention_bias": True}),
    "Qwen3, a window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "Qwen2": ("Qwen2", {}),
    "Llama": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": 7}),
    "Qwen3-MoE": ("Qwen3Moe", SPARSE),
}
PROMPTS = [[5, 6, 7, 8], [100, 101], [9] * 11, [3, 30, 33, 200, 7]]
DEADLINE_S = 4.0  # worker_timeout_s


def make_folder(folder: Path, family: str, **changes: Any) -> Path:
    build = getattr(transformers, f"{family}ForCausalLM")
    return save_random_model(build, getattr(transformers, f"{family}Config")(**{**WIDE, **changes}), folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_layers_write_what_one_rank_writes(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    folder = make_folder(tmp_path / "model", family, **changes)
    expected = write(load_model(folder), PROMPTS, 8)
    # four ranks of one family, two of the others
    model, parallel = LanguageModelFolder.open(folder), ParallelConfig(tensor=4 if name == "Qwen3" else 2)
    layout = KVLayout.of(model.config, can_write=True, tapped_layers=())
    orders = decoder_orders(
        model, layout, num_blocks=64, block_size=4, attention="sdpa", dtype=torch.float32, quantization=None
    )
    group = ThreadGroup(parallel, orders)
    shard = group.links.shard("tensor")
    share = model.load(CPU, torch.float32, shard=shard)
    group.connect()
    lead = DecoderLead(group)  # type: ignore[arg-type]
    found = write(share, PROMPTS, 8, shard=shard, lead=lead)
    alone = write(share, PROMPTS[:1], 8, shard=shard, lead=lead)
    group.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    assert alone[0].token_ids == found[0].token_ids
    torch.testing.assert_close(torch.stack(alone[0].logits), torch.stack(found[0].logits), rtol=1e-5, atol=1e-5)


def test_a_rank_reads_only_its_rows_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model", "Qwen3")
    model, num_read = LanguageModelFolder.open(folder), [0]
    whole_fill = weights._fill

    def counted(module: Any, target: Any, published: torch.Tensor, *rest: Any) -> None:
        num_read[0] += published.nbytes
        whole_fill(module, target, published, *rest)

    monkeypatch.setattr(weights, "_fill", counted)
    whole = sum(p.numel() for p in model.build().parameters()) * 4
    around = sum(p.numel() for name, p in model.build().named_parameters() if not name.startswith("decoder.")) * 4
    norms = sum(p.numel() for name, p in model.build().named_parameters() if "norm" in name) * 4
    model.load_decoder(CPU, torch.float32, None, Shard(1, 2))
    assert num_read[0] == (whole - around - norms) // 2 + norms
    num_read[0] = 0
    model.load(CPU, torch.float32, shard=Shard(0, 2))
    assert num_read[0] == (whole - around - norms) // 2 + norms + around == model.weights_bytes(4, shard=Shard(0, 2))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_shares_of_all_ranks_are_the_published_weights(axis: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "Qwen2")
    model = LanguageModelFolder.open(folder)
    published = transformers.Qwen2ForCausalLM.from_pretrained(folder).state_dict()
    name = ("self_attn.k_proj.weight", "mlp.down_proj.weight")[axis]
    shares = []
    for rank in range(4):
        share = model.build(Shard(rank, 4))
        weights.allocate(share, CPU, torch.float32)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(weights, "pack_linears", lambda module: None)
            weights.load_weights(share, folder)
        layer: Any = share.get_submodule("decoder.layers.1")
        merged = layer.self_attn.qkv_proj
        shares.append(merged.weight[merged.rows("k_proj")] if axis == 0 else layer.mlp.down_proj.weight)
    assert torch.equal(torch.cat(shares, dim=axis), published[f"model.layers.1.{name}"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


def config(folder: Path, **stage: Any) -> dict[str, Any]:
    return shared_text_config(folder, stage=stage, scheduler={"worker_timeout_s": DEADLINE_S})


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with Omni(config=config(folder, parallel={"tensor": 2})) as omni:
        yield omni


def follower(omni: Omni) -> int:
    engine: Any = omni._executor._stages["text"].hosts[0].executor._engine  # type: ignore[attr-defined]
    return int(engine._group.pids[0])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def token_ids(output: OmniOutput) -> list[int]:
    assert output.error is None, output.error
    return list(output.token_ids or ())


def test_two_processes_write_what_one_does(omni: Omni, folder: Path) -> None:
    prompts = ["a red circle", "the end of the world and", "x", "a red circle"]
    sampled = SamplingParams(temperature=0.8, seed=3, max_tokens=10, ignore_eos=True)
    with Omni(config=config(folder)) as alone:
        for params in (GREEDY, sampled):
            expected = [token_ids(output) for output in alone.generate(prompts, params)]
            assert [token_ids(output) for output in omni.generate(prompts, params)] == expected
            assert token_ids(omni.generate(prompts[1], params)[0]) == expected[1]  # alone as in the batch
    assert omni.get_metrics()["stages"]["text"]["num_ranks"] == 2


def ready_again(omni: Omni) -> list[int]:
    """What the stage writes when it has been rebuilt."""
    until_s = time.monotonic() + 60
    while (output := omni.generate("a red circle", GREEDY)[0]).error is not None:
        assert time.monotonic() < until_s, output.error
        time.sleep(0.1)
    return token_ids(output)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def test_a_rank_that_dies_between_requests_is_noticed_before_the_next(omni: Omni) -> None:
    pid = follower(omni)
    kill(pid)
    until_s = time.monotonic() + 1.0
    while omni._executor._stages["text"].hosts[0].executor.breakdown() is None:  # type: ignore[attr-defined]
        assert time.monotonic() < until_s
        time.sleep(0.01)
    breakdown = omni._executor._stages["text"].hosts[0].executor.breakdown()  # type: ignore[attr-defined]
    assert "rank 1 of 2 was killed by SIGKILL" in str(breakdown)


@pytest.mark.parametrize(
    ("harm", "cause", "within_s"), [(stop, "which is stopped", 6.0), (kill, "rank 1 of 2 was killed by SIGKILL", 2.0)]
)
def test_a_lost_rank_ends_the_step_and_its_request_is_answered_by_the_rebuilt_stage(
    omni: Omni, harm: Callable[[int], None], cause: str, within_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    ready_again(omni)
    params = dataclasses.replace(GREEDY, max_tokens=200)
    pid, stream = follower(omni), omni.stream("a red circle", params)
    next(iter(stream))
    harm(pid)
    began_s = time.time()
    last = list(stream)[-1]
    (told,) = [record for record in caplog.records if cause in record.getMessage()]
    assert told.created - began_s < within_s
    assert last.metrics["text"]["retried"] == 1
    assert not is_alive(pid) and follower(omni) != pid
    again = omni.generate("a red circle", params)[0]
    assert token_ids(last) == token_ids(again) and len(token_ids(again)) == 200


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parallel": {"tensor": 4}}, "stages.text.parallel.tensor: got 4, by which 2 key-value heads"),
        ({"parallel": {"tensor": 3}}, "expected one of 1, 2"),
        ({"parallel": {"sequence": 2}}, "stages.text.parallel.sequence: got 2, but a stage of kind 'ar' has one rank"),
        ({"parallel": {"tensor": 0}}, "stages.text.parallel.tensor: got 0"),
        ({"parallel": {"tensors": 2}}, "stages.text.parallel.tensors: unknown key"),
        ({"parallel": {"tensor": 2}, "lora": {"folders": ["."]}}, "adapters need whole layers"),
    ],
)
def test_what_cannot_be_shared_is_a_config_error(folder: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Omni(config=config(folder, **changes))
    assert complaint in str(raised.value)


def test_memory_is_planned_for_each_rank(folder: Path) -> None:
    one, two = (
        make_spec(dataclasses.replace(make_stage(folder, num_blocks=50), parallel=ParallelConfig(tensor=size)))
        for size in (1, 2)
    )
    alone, shared = one.plan_memory(), two.plan_memory()
    assert shared.kv_pool_bytes * 2 == alone.kv_pool_bytes and shared.weights_bytes < alone.weights_bytes
    assert shared.total_bytes == 2 * shared.rank_bytes and "on each of 2 ranks" in shared.remark
