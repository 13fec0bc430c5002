"""A graph with two pictures: a stream gives each once, whichever is finished first."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

from PIL import Image

from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.entrypoints.server.answers.chat_answer import ChatAnswer
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.schemas.chat import StreamOptions
from vllm_omni.request import OmniOutput

TEXT: dict[str, Any] = {
    "kind": "ar",
    "model": "asset://tiny-image/text_encoder",
    "task": "encode",
    "tokenizer": "asset://tiny-image/tokenizer",
    "outputs": {"hidden_states": {"layers": [-2]}},
}


def picture(steps: int, size: int) -> dict[str, Any]:
    defaults = {"num_inference_steps": steps, "guidance_scale": 0.0, "height": size, "width": size}
    inputs = {"prompt_embeds": "text.hidden_states"}
    return {"kind": "dit", "model": "asset://tiny-image", "inputs": inputs, "defaults": defaults}


def sizes(content: list[Any]) -> list[tuple[int, int]]:
    urls = [part["image_url"]["url"] for part in content]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]


def test_of_two_pictures_each_is_given_once_whichever_is_first() -> None:
    stages = {"text": TEXT, "slow": picture(12, 64), "fast": picture(2, 32)}
    model = ServedModel("two", open_pipeline({"stages": stages, "outputs": ["slow", "fast"]}))
    answer = ChatAnswer(model, "r", ("slow", "fast"), None, None)

    async def main() -> tuple[list[Any], list[Any]]:
        await model.load()
        finals: list[OmniOutput] = []

        async def parts() -> Any:
            async for output in model.omni.stream("a red circle"):
                finals.extend([output] if output.finished else [])
                yield output

        chunks = [chunk async for chunk in answer.chunks(parts(), StreamOptions())]
        whole = await answer.whole(finals[0])
        await model.shutdown(drain=True)
        deltas = [chunk["choices"][0]["delta"].get("content") or [] for chunk in chunks]
        return [part for delta in deltas for part in delta], whole["choices"][0]["message"]["content"]

    streamed, whole = asyncio.run(main())
    assert sizes(streamed) == [(32, 32), (64, 64)]  # the fast one came first
    assert sizes(whole) == [(64, 64), (32, 32)]
