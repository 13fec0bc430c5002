"""A diffusion transformer whose blocks several ranks share, along each axis and along several: the same pictures as on
one, whatever the batch and the step cache.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import dit, flux2, qwen_image
from support.ranks import CPU, ThreadGroup

from vllm_omni.config.schema import OmniConfig, ParallelConfig
from vllm_omni.engine.base import EngineContext
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.errors import ConfigError
from vllm_omni.messages import StageDone, StageFailed
from vllm_omni.params import DiffusionParams
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool
from vllm_omni.worker.parallel.blocks import BlocksLead, row_shares, shards_of

SMALL = DiffusionParams(height=64, width=64, num_inference_steps=6, guidance_scale=3.0, seed=1)
PARAMS = {
    "guided": SMALL,
    "wide": dataclasses.replace(SMALL, width=96, guidance_scale=0.0, seed=2),
    "two": dataclasses.replace(SMALL, num_outputs=2, seed=3),
}
LAYOUTS = {
    "tensor 2": ParallelConfig(tensor=2),
    "sequence 2": ParallelConfig(sequence=2),
    "guidance 2": ParallelConfig(guidance=2),
    "tensor 2, sequence 2": ParallelConfig(tensor=2, sequence=2),
    "sequence 2, guidance 2": ParallelConfig(sequence=2, guidance=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("z_image")
    dit.random_pipeline(folder, n_heads=4, n_kv_heads=4, dim=96, axes_dims=[8, 8, 8])
    return folder


def make_spec(folder: Path, parallel: ParallelConfig, policy: str = "none", threshold: float | None = None) -> Any:
    whole = dit.spec(folder, cache=dit.cache_keys(policy, threshold))
    config = OmniConfig()
    return DiffusionSpec(dataclasses.replace(whole.stage, parallel=parallel), config, ModelFolders())


def load(spec: DiffusionSpec) -> DiffusionEngine:
    return spec.load(EngineContext(CPU, torch.float32, ModelPool(), Background(), dit.BOTH))


def made(engine: DiffusionEngine, **params: DiffusionParams) -> dict[str, tuple[torch.Tensor, int]]:
    """Latents by request, and how many rows of steps a cache served."""
    for number, (name, each) in enumerate(params.items()):
        engine.submit(dit.task(name, each, seed=number))
    events = dit.run(engine)
    assert all(isinstance(event, StageDone) for event in events.values()), events
    done = {name: event for name, event in events.items() if isinstance(event, StageDone)}
    return {name: (each.payload.tensors["latents"], each.metrics["cache_hits"]) for name, each in done.items()}


class Shared:
    """An engine whose model is the first rank's, the others being threads."""

    def __init__(self, spec: DiffusionSpec, parallel: ParallelConfig) -> None:
        whole = dataclasses.replace(spec.stage, parallel=ParallelConfig())
        self.engine = load(DiffusionSpec(whole, OmniConfig(), ModelFolders()))
        self.group = ThreadGroup(parallel, spec.block_orders(None))  # type: ignore[arg-type]
        model: Any = spec.model.load(CPU, torch.float32, shards=shards_of(self.group.links))  # type: ignore[call-arg]
        self.group.connect()
        self.engine.model = self.engine.runner.model = model
        self.engine.runner._blocks = BlocksLead(self.group, model)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("policy", "threshold"), [("none", None), ("first_block", 1.5)])
def test_shared_blocks_make_what_one_rank_makes(
    folder: Path, layout: str, policy: str, threshold: float | None
) -> None:
    """With a step cache, too, which serves the same steps: the first rank alone decides."""
    parallel = LAYOUTS[layout]
    alone = load(make_spec(folder, ParallelConfig(), policy, threshold))
    expected = made(alone, **PARAMS)
    shared = Shared(make_spec(folder, parallel, policy, threshold), parallel)
    found = made(shared.engine, **PARAMS)
    single = made(shared.engine, guided=PARAMS["guided"])
    shared.group.close()
    for name, (theirs, num_served) in expected.items():
        assert (found[name][0] - theirs).norm() <= 1e-4 * theirs.norm(), name
        assert found[name][1] == num_served
    assert torch.equal(single["guided"][0], found["guided"][0])
    total = sum(num_served for _, num_served in expected.values())
    assert (0 < total < 7 * 5) == (policy != "none"), "some steps are served, and some are not"


@pytest.mark.parametrize("family", [flux2, qwen_image])
def test_other_families_draw_the_same_with_shared_layers(family: Any, tmp_path: Path) -> None:
    family.random_pipeline(tmp_path)
    parallel = ParallelConfig(tensor=2, guidance=2)
    params = {"guided": SMALL, "wide": dataclasses.replace(SMALL, width=96, seed=2)}
    expected = made(load(make_spec(tmp_path, ParallelConfig())), **params)
    shared = Shared(make_spec(tmp_path, parallel), parallel)
    found = made(shared.engine, **params)
    shared.group.close()
    for name, (theirs, _) in expected.items():
        assert (found[name][0] - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_rows_are_shared_out_by_their_tokens() -> None:
    assert row_shares([10, 10], 2) == [[0], [1]]
    assert row_shares([10], 2) == [[], [0]] or row_shares([10], 2) == [[0], []]
    assert row_shares([30, 10, 10, 10], 2) == [[0], [1, 2, 3]]


def test_processes_draw_what_one_does_and_end_with_a_rank(folder: Path) -> None:
    expected = dit.pictures(_run(load(make_spec(folder, ParallelConfig())), SMALL))["r"]
    engine = load(make_spec(folder, ParallelConfig(guidance=2)))
    assert (dit.pictures(_run(engine, SMALL))["r"].int() - expected.int()).abs().max() <= 1
    assert engine._group is not None
    pid = engine._group.pids[0]
    engine.submit(dit.task("r", SMALL))
    engine.step()
    os.kill(pid, signal.SIGKILL)
    failed = dit.run(engine)["r"]
    assert isinstance(failed, StageFailed) and "rank 1 of 2 was killed by SIGKILL" in str(failed.error)
    assert engine.breakdown() is not None
    engine.close()


def _run(engine: DiffusionEngine, params: DiffusionParams) -> Any:
    engine.submit(dit.task("r", params))
    return dit.run(engine)


@pytest.mark.parametrize(
    ("parallel", "complaint"),
    [
        (
            ParallelConfig(tensor=3),
            "parallel.tensor: got 3, by which 4 heads, 256 widths of the feed-forward are not divisible",
        ),
        (ParallelConfig(tensor=4, sequence=2), "parallel.tensor * sequence: got 8, by which 4 heads"),
    ],
)
def test_what_cannot_be_shared_is_a_config_error(folder: Path, parallel: ParallelConfig, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_spec(folder, parallel)
    assert complaint in str(raised.value)
