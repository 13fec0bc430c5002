"""A caller that does not read what is streamed to it holds the writers of its own request back, and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest
from support.loop import engine

from vllm_omni import AsyncOmni, OmniOutput, SamplingParams
from vllm_omni.entrypoints.async_omni import MAX_UNREAD

LONG = SamplingParams(max_tokens=600, ignore_eos=True, temperature=0)
PROMPT = {"prompt": "show me a scarlet ball", "outputs": ["thinker"]}
BLOCK_SIZE = 16
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def omni() -> Iterator[AsyncOmni]:
    omni = AsyncOmni("tiny_omni")
    yield omni
    asyncio.run(omni.shutdown(drain=False))


def test_unread_parts_hold_their_writer_back(omni: AsyncOmni) -> None:
    async def main() -> tuple[int, int]:
        stream = omni.stream(PROMPT, LONG)
        await anext(stream)
        before = await _settled(omni)
        await asyncio.sleep(0.3)
        after = await _settled(omni)
        await stream.aclose()
        return before, after

    before, after = asyncio.run(asyncio.wait_for(main(), LIMIT_S))
    whole = 600 // BLOCK_SIZE
    assert 0 < before == after < whole // 2  # it runs, and nothing more was written while nobody read


def test_a_slow_reader_gets_the_same_words(omni: AsyncOmni) -> None:
    async def main() -> tuple[list[OmniOutput], OmniOutput]:
        parts = []
        async for part in omni.stream(PROMPT, LONG):
            parts.append(part)
            if len(parts) % MAX_UNREAD == 1:
                await asyncio.sleep(0.2)
        return parts, await omni.generate(PROMPT, LONG)

    parts, whole = asyncio.run(asyncio.wait_for(main(), LIMIT_S))
    assert parts[-1].text == whole.text
    assert "".join(part.text or "" for part in parts[:-1]) == whole.text


def test_others_go_on_while_one_is_held_back(omni: AsyncOmni) -> None:
    async def main() -> OmniOutput:
        stalled = omni.stream(PROMPT, LONG)
        await anext(stalled)
        await _settled(omni)
        other = await omni.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0))
        await stalled.aclose()
        return other

    assert asyncio.run(asyncio.wait_for(main(), LIMIT_S)).error is None


def test_a_held_request_can_be_aborted_and_frees_all(omni: AsyncOmni) -> None:
    async def main() -> None:
        stream: AsyncGenerator[OmniOutput, None] = omni.stream(PROMPT, LONG)
        await anext(stream)
        await _settled(omni)
        await stream.aclose()
        while omni.get_status()["running_requests"]:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))
    blocks = engine(omni, "thinker").get_stats()
    assert blocks["num_free_blocks"] == blocks["num_blocks"]


async def _settled(omni: AsyncOmni) -> int:
    """Blocks that the writer holds, once it takes no more."""
    last, now = -1, 0
    while last != now:
        await asyncio.sleep(0.2)
        stats = (await omni.get_metrics())["stages"]["thinker"]
        last, now = now, int(stats["num_blocks"] - stats["num_free_blocks"])
    return now
