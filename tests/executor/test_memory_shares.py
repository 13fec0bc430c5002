"""KV pools of no given size share what the memory budget leaves, and a text that ends for lack of room says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ar import make_model_folder
from vllm_omni import Omni, SamplingParams
from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli import main
from vllm_omni.errors import ResourceError
from vllm_omni.executor import memory
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.pipeline import Pipeline

GB, MB = 2**30, 2**20
POSITIONS = 40_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model", max_position_embeddings=POSITIONS)


@pytest.fixture(autouse=True)
def much_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 1000 * GB)


def config(folder: Path, max_memory_gb: float = 1.0, num_stages: int = 1, **keys: Any) -> dict[str, Any]:
    stages = {f"text{n or ''}": {"kind": "ar", "model": str(folder), **keys} for n in range(num_stages)}
    resources = {"max_memory_gb": max_memory_gb}
    return {"stages": stages, "outputs": list(stages), "device": "cpu", "dtype": "float32", "resources": resources}


def pool_bytes(given: dict[str, Any]) -> list[int]:
    pipeline = Pipeline(load_config(given))
    plans = plan_memory(pipeline)
    reserve_memory(pipeline.config, plans)
    return [plan.kv_pool_bytes for plan in plans.values()]


def test_the_pool_takes_what_the_budget_leaves(folder: Path) -> None:
    """768 bytes a token; 64 MB are for prompt embeddings."""
    smaller, larger = (pool_bytes(config(folder, gb))[0] for gb in (0.25, 0.5))
    assert larger - smaller == pytest.approx(0.25 * GB, rel=0.01)
    pipeline = Pipeline(load_config(config(folder, 0.5)))
    total = sum(plan.total_bytes for plan in plan_memory(pipeline).values())
    assert 0.5 * GB - 64 * MB - 20_000 < total <= 0.5 * GB - 64 * MB


def test_the_pool_is_no_larger_than_the_model_could_use(folder: Path) -> None:
    (held,) = pool_bytes(config(folder, 16.0, max_num_seqs=2))
    assert held == 2 * POSITIONS * 768


def test_half_of_the_free_memory_is_left_to_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 400 * MB)
    (held,) = pool_bytes(config(folder, 16.0))
    assert 190 * MB < held < 200 * MB


def test_without_free_memory_one_sequence_of_the_default_length_remains(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 0)
    assert pool_bytes(config(folder)) == [4096 * 768]
    assert pool_bytes(config(folder, max_model_len=10_000)) == [10_000 * 768]


def test_several_stages_share_and_none_takes_what_it_cannot_use(folder: Path) -> None:
    first, second = pool_bytes(config(folder, 0.5, num_stages=2))
    assert first == pytest.approx(second, rel=0.001) and first + second > 400 * MB
    given = config(folder, 0.5, num_stages=2)
    given["stages"]["text"]["max_num_seqs"] = 1
    first, second = pool_bytes(given)
    assert first == POSITIONS * 768 and first + second > 400 * MB


def test_what_is_given_is_kept(folder: Path) -> None:
    assert pool_bytes(config(folder, num_blocks=100)) == [100 * 16 * 768]
    assert pool_bytes(config(folder, kv_memory_mb=3.0)) == [3 * MB]
    given = config(folder, 0.5, num_stages=2)
    given["stages"]["text"]["num_blocks"] = 100
    assert pool_bytes(given)[0] == 100 * 16 * 768


def test_a_budget_below_one_sequence_is_refused_with_its_key(folder: Path) -> None:
    with pytest.raises(ResourceError, match=r"resources.max_memory_gb: .*raise resources.max_memory_gb.*kv_memory_mb"):
        pool_bytes(config(folder, 0.065))


def test_check_shows_the_pool(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"stages: {{text: {{kind: ar, model: {folder}, max_num_seqs: 1, device: cpu}}}}\noutputs: [text]\n")
    assert main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "KV pool of 40,000 tokens, as max_num_seqs sets it" in shown


LONG = SamplingParams(temperature=0, ignore_eos=True)
ENDS: dict[str, tuple[dict[str, Any], SamplingParams, str | None]] = {
    "the pool": (
        {"num_blocks": 4},
        LONG,
        "ended after 59 tokens, at the KV pool (64 tokens, prompt included, as num_blocks sets it); "
        "raise kv_memory_mb, num_blocks or resources.max_memory_gb",
    ),
    "the length of the model": (
        {"max_model_len": 40, "num_blocks": 40},
        LONG,
        "ended after 35 tokens, at max_model_len (40 tokens, prompt included)",
    ),
    "a wish beyond the pool": ({"kv_memory_mb": 0.05}, SamplingParams(temperature=0, max_tokens=900), "KV pool (64"),
    "the wish itself": ({"num_blocks": 4}, SamplingParams(temperature=0, ignore_eos=True, max_tokens=5), None),
    "a stop": ({"num_blocks": 4}, SamplingParams(temperature=0, stop_token_ids=list(range(320))), None),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_text_that_ends_at_a_limit_names_it(folder: Path, name: str) -> None:
    keys, params, note = ENDS[name]
    with Omni(config(folder, chat_template=False, **keys), progress=False) as omni:
        (output,) = omni.generate({"prompt_token_ids": [5, 6, 7, 8, 9]}, params)
    (completion,) = output.completions
    assert completion.finish_reason == ("stop" if name == "a stop" else "length")
    assert completion.note == note or (note is not None and note in str(completion.note))
