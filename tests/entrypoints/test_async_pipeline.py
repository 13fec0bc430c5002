"""AsyncOmni over the real stages of the shipped model."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from vllm_omni import AsyncOmni, DiffusionParams, Omni, RequestStatus
from vllm_omni.errors import RequestAbortedError, RequestTimeoutError

WORDS = ["a ball", "please paint a crimson box", "a violet star above a golden ring"]
FEW_STEPS = DiffusionParams(seed=3, num_inference_steps=2)


def test_concurrent_requests_equal_the_offline_ones() -> None:
    async def concurrently() -> list[object]:
        async with AsyncOmni("tiny_scene.yaml") as omni:
            return list(await asyncio.gather(*(omni.generate(words, FEW_STEPS) for words in WORDS)))

    with Omni("tiny_scene.yaml", progress=False) as omni:
        offline = omni.generate(WORDS, FEW_STEPS)
    for here, there in zip(asyncio.run(concurrently()), offline, strict=True):
        assert here.text == there.text  # type: ignore[attr-defined]
        difference = np.asarray(here.images[0]).astype(int) - np.asarray(there.images[0]).astype(int)  # type: ignore[attr-defined]
        assert np.abs(difference).max() <= 1


def test_a_stream_gives_words_and_steps_then_one_final_output() -> None:
    async def collect() -> list[object]:
        async with AsyncOmni("tiny_scene.yaml") as omni:
            return [part async for part in omni.stream("a violet star", FEW_STEPS)]

    parts = asyncio.run(collect())
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]  # type: ignore[attr-defined]
    written = "".join(part.text or "" for part in parts[:-1])  # type: ignore[attr-defined]
    assert written == parts[-1].text  # type: ignore[attr-defined]
    steps = [part.metrics["image"]["step"] for part in parts[:-1] if "image" in part.metrics]  # type: ignore[attr-defined]
    assert steps == [1, 2]


def test_stopping_a_stream_and_missing_a_deadline_leave_nothing_behind() -> None:
    async def scenario() -> None:
        async with AsyncOmni("tiny_scene.yaml") as omni:
            stream = omni.stream("a ball", DiffusionParams(seed=1, num_inference_steps=500))
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            late = await omni.generate({"prompt": "a box", "timeout_s": 0.05}, DiffusionParams(num_inference_steps=900))
            assert late.status is RequestStatus.FAILED and isinstance(late.error, RequestTimeoutError)
            fine = await omni.generate("a ring", FEW_STEPS)
            assert fine.error is None
            stages = (await omni.get_metrics())["stages"]
            assert stages["image"]["running"] == 0 and stages["image"]["step_cache_used_bytes"] == 0
            assert stages["writer"]["num_free_blocks"] == stages["writer"]["num_blocks"]

    asyncio.run(scenario())


def test_aborting_by_id_ends_the_request() -> None:
    async def scenario() -> None:
        async with AsyncOmni("tiny_scene.yaml") as omni:
            params = DiffusionParams(seed=1, num_inference_steps=900)
            task = asyncio.create_task(omni.generate({"prompt": "a ball", "request_id": "mine"}, params))
            await asyncio.sleep(0.3)
            omni.abort("mine")
            output = await asyncio.wait_for(task, 20)
            assert output.status is RequestStatus.ABORTED and isinstance(output.error, RequestAbortedError)

    asyncio.run(scenario())


@pytest.mark.parametrize("config", ["tiny_image.yaml", "tiny_scene.yaml"])
def test_shipped_configs_load_with_a_small_pool(config: str) -> None:
    """Every stage of a shipped config still works when its KV pool holds little more than one request."""
    stage = "text" if config == "tiny_image.yaml" else "writer"
    with Omni(config, overrides=[f"{stage}.num_blocks=6"], progress=False) as omni:
        outputs = omni.generate(WORDS, FEW_STEPS)
    assert all(output.error is None for output in outputs)
