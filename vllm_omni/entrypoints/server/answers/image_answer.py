"""Pictures of one request, whole and as a stream of events: previews while they emerge, then the pictures."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from PIL import Image

from vllm_omni.entrypoints.server.answers.encoding import image_base64
from vllm_omni.entrypoints.server.answers.provenance import Provenance
from vllm_omni.entrypoints.server.answers.usage import media_usage
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.schemas.images import ImageBody
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.request import OmniOutput

SAME_FOR_ALL = {"background": "opaque", "quality": "auto"}


class ImageAnswer:
    """kind: what the events are called after, `image_generation` or `image_edit`."""

    def __init__(self, made: Provenance, body: ImageBody, stages: Sequence[str], kind: str) -> None:
        self._made = made
        self._body = body
        self._stages = stages
        self._kind = kind
        self._created = int(time.time())
        self._num_previews = 0

    async def whole(self, output: OmniOutput) -> dict[str, Any]:
        images = self._images(output)
        revised = {} if output.text is None else {"revised_prompt": output.text}
        data = [{"b64_json": await self._encoded(*image), **revised} for image in images]
        return {
            "created": self._created,
            "data": data,
            "output_format": self._body.output_format,
            "size": _size(images[0][0]),
            "usage": self._usage(output),
            **SAME_FOR_ALL,
        }

    async def events(self, parts: AsyncGenerator[OmniOutput, None]) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(parts):
            async for output in parts:
                for preview in self._previews(output):
                    more = {"partial_image_index": self._num_previews}
                    self._num_previews += 1
                    yield await self._event("partial_image", preview, more)
                if output.finished:
                    for image, metadata in self._images(output):
                        yield await self._event("completed", image, {"usage": self._usage(output)}, metadata)

    def _images(self, output: OmniOutput) -> list[tuple[Image.Image, MediaMetadata]]:
        found = list(self._made.images(output, self._stages))
        if not found:
            said = f"; it wrote: {output.text:.200}" if output.text else ""
            raise ApiError(400, f"prompt: the model made no picture of it{said}", code="no_image", param="prompt")
        return found

    def _previews(self, output: OmniOutput) -> Iterator[Image.Image]:
        for stage in self._stages:
            if stage in output.results:
                yield from output.results[stage].previews

    async def _event(
        self, name: str, image: Image.Image, more: dict[str, Any], metadata: MediaMetadata | None = None
    ) -> dict[str, Any]:
        return {
            "type": f"{self._kind}.{name}",
            "b64_json": await self._encoded(image, metadata),
            "created_at": self._created,
            "output_format": self._body.output_format,
            "size": _size(image),
            **SAME_FOR_ALL,
            **more,
        }

    async def _encoded(self, image: Image.Image, metadata: MediaMetadata | None) -> str:
        return await image_base64(image, self._body.output_format, self._body.output_compression, metadata)

    def _usage(self, output: OmniOutput) -> dict[str, Any]:
        usage = media_usage(self._made.model, output)
        return {**usage, "input_tokens_details": {"text_tokens": usage["input_tokens"], "image_tokens": 0}}


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
