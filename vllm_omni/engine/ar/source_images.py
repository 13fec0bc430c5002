"""The pictures of a request that stand in the prompt of a stage, before its words: what is to be edited, or looked at.
Opens none of them.
"""

from __future__ import annotations

from typing import Any

from vllm_omni.engine.ar.options import AROptions
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.messages import MediaPart, is_messages, media_parts
from vllm_omni.request import Messages, OmniRequest, Prompt

IMAGE = "image"  # the key of `OmniRequest.fields`


def source_images(options: AROptions, request: OmniRequest) -> list[MediaPart]:
    """In order; none where the stage's template has no place for them."""
    if options.prompt_template is None or options.prompt_template.images is None:
        return []
    given = request.source_image()
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        return [MediaPart(IMAGE, given, IMAGE)]
    return [MediaPart(IMAGE, source, f"{IMAGE}[{index}]") for index, source in enumerate(given)]


def with_images(prompt: Prompt, images: list[MediaPart]) -> tuple[Messages, list[MediaPart]]:
    """The prompt as messages with these pictures before the words of the first, and all media of it in order."""
    messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt  # type: ignore[assignment]
    if not is_messages(messages):
        raise InvalidRequestError("prompt: got token ids with `image`, expected words, before which the pictures stand")
    parts: list[dict[str, Any]] = [{"type": IMAGE, IMAGE: image.source} for image in images]
    words = messages[0].get("content", "")
    content = [*parts, {"type": "text", "text": words}] if isinstance(words, str) else [*parts, *words]
    return [{**messages[0], "content": content}, *messages[1:]], [*images, *media_parts(messages)]
