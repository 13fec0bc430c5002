"""What a notebook shows of an answer: HTML of bounded size, in which everything that somebody wrote is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_TEXT = 10_000  # characters of each text
MAX_ITEMS = 16  # texts, pictures, sounds and videos that are shown of each stage
MAX_SIDE = 512  # pixels of a picture
MAX_BYTES = 8_000_000  # of all pictures, sounds and videos, as they stand in the HTML


def output_html(output: Any) -> str:
    """output: an OmniOutput. Every stage's texts, pictures (made smaller), sounds and videos, and the error; what is
    too much is counted or named.
    """
    seed = "" if output.seed is None else f", seed {output.seed}"
    parts = [f"<div><code>{html.escape(output.request_id[:80])}</code> {output.status.value}{seed}</div>"]
    if output.error is not None:
        words = html.escape(f"{type(output.error).__name__}: {output.error}")
        parts.append(f'<pre style="color: #b00020; white-space: pre-wrap">{words}</pre>')
    num_left = MAX_BYTES
    for stage, result in output.results.items():
        parts.append(f"<div><b>{html.escape(stage)}</b></div>")
        for part, large in _items(result):
            fits = len(part) <= num_left
            num_left -= len(part) if fits else 0
            parts.append(part if fits else f"<div><code>{html.escape(large)}</code>: too much to show here</div>")
    parts += _tensors(output.tensors)
    return f"<div>{''.join(parts)}</div>"


def _items(result: Any) -> Iterator[tuple[str, str]]:
    """HTML, and what stands for it where there is no room."""
    for completion in result.completions[:MAX_ITEMS]:
        text = completion.text
        shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"
        yield f'<pre style="white-space: pre-wrap">{html.escape(shown)}</pre>', "a text"
    for image in result.images[:MAX_ITEMS]:
        yield _picture(image), f"{image.width}x{image.height} pixels"
    for audio in result.audios[:MAX_ITEMS]:
        yield f"<div>{audio._repr_html_()}</div>", repr(audio)
    for video in result.videos[:MAX_ITEMS]:
        yield f"<div>{video._repr_html_()}</div>", repr(video)
    for items in (result.completions, result.images, result.audios, result.videos):
        if len(items) > MAX_ITEMS:
            yield f"<div>and {len(items) - MAX_ITEMS} more</div>", "more"


def _picture(image: Image) -> str:
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    content = small._repr_png_()
    if content is None:  # a mode that no PNG holds
        return f"<div><code>{image.width}x{image.height} pixels, mode {html.escape(image.mode)}</code></div>"
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{data}" title="{image.width}x{image.height}">'


def _tensors(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in list(tensors.items())[:MAX_ITEMS]:
        yield f"<div><code>{html.escape(name)}: {list(tensor.shape)}</code></div>"
