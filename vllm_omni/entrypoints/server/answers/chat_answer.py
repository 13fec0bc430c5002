"""What a model says in a chat, whole and as a stream of chunks: words, pictures and sound of every choice."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from vllm_omni.entrypoints.server.answers.encoding import AudioPieces, audio_base64, image_base64
from vllm_omni.entrypoints.server.answers.logprobs import chat_logprobs
from vllm_omni.entrypoints.server.answers.provenance import Provenance
from vllm_omni.entrypoints.server.answers.usage import chat_usage
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.schemas.chat import StreamOptions
from vllm_omni.media.audio import Audio
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.request import Completion, OmniOutput

AUDIO_LIFETIME_S = 3600  # OpenAI's field; ours is not kept at all


class ChatAnswer:
    """One request's answer. audio_format: None where no sound is wanted. num_top: alternatives of each token; None
    where no log probabilities are wanted.
    """

    def __init__(
        self, model: ServedModel, run_id: str, outputs: Sequence[str], audio_format: str | None, num_top: int | None
    ) -> None:
        self._model = model
        self._id = f"chatcmpl-{run_id}"
        self._audio_id = f"audio-{run_id}"
        self._created = int(time.time())
        self._texts = [stage for stage in model.abilities.texts if stage in outputs]
        self._images = [stage for stage in model.abilities.images if stage in outputs]
        self._audios = [stage for stage in model.abilities.audios if stage in outputs][:1]  # an answer has one sound
        self._audio_format = audio_format
        self._num_top = num_top

    async def whole(self, output: OmniOutput) -> dict[str, Any]:
        choices = [await self._choice(output, index) for index in range(self._num_choices(output))]
        usage = chat_usage(self._model, output)
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def chunks(
        self, parts: AsyncGenerator[OmniOutput, None], options: StreamOptions
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks in order; words, pictures and sound together are what `whole` gives."""
        written = _Written(self._audio_format)
        async with aclosing(parts):
            async for output in parts:
                for index in range(self._num_choices(output)):
                    async for delta, logprobs in self._deltas(written, output, index):
                        role = {"role": "assistant"} if written.begin(index) else {}
                        yield self._chunk(index, {**role, **delta}, logprobs=logprobs)
                if options.include_progress and output.progress:
                    yield {**self._head("chat.completion.chunk"), "choices": [], "progress": _progress(output)}
                if output.finished:
                    for index in range(self._num_choices(output)):
                        role = {"role": "assistant", "content": ""} if written.begin(index) else {}
                        yield self._chunk(index, role, self._finish_reason(output, index))
                    if options.include_usage:
                        usage = chat_usage(self._model, output)
                        yield {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    async def _choice(self, output: OmniOutput, index: int) -> dict[str, Any]:
        completion = self._completion(output, index)
        text = None if completion is None else completion.text
        parts = [await _image_part(*image) for image in self._pictures(output, index).values()]
        content: Any = text
        if parts:
            content = [*([{"type": "text", "text": text}] if text else []), *parts]
        message = {"role": "assistant", "content": content, "refusal": None}
        sounds = self._sounds(output, index)
        if sounds and self._audio_format is not None:
            message["audio"] = {
                "id": self._audio_id,
                "data": await audio_base64(sounds[0], self._audio_format),
                "expires_at": self._created + AUDIO_LIFETIME_S,
                "transcript": text or "",
            }
        logprobs = None if completion is None else self._logprobs(completion, 0)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(output, index),
        }

    async def _deltas(
        self, written: _Written, output: OmniOutput, index: int
    ) -> AsyncGenerator[tuple[dict[str, Any], Any], None]:
        """What is new of one choice."""
        completion = self._completion(output, index)
        if completion is not None:
            text = written.new_text(index, completion.text, output.finished)
            logprobs = self._logprobs(completion, written.new_tokens(index, completion, output.finished))
            if text or logprobs:
                heard = {"audio": {"id": self._audio_id, "transcript": text}} if self._audios else {}
                yield {"content": text, **heard}, logprobs
        for preview in self._previews(output, index):
            yield {"preview": await _image_part(preview)}, None
        for image in written.new_images(index, self._pictures(output, index)):
            yield {"content": [await _image_part(*image)]}, None
        if self._audio_format is not None:
            sounds = self._sounds(output, index)
            data = await written.new_sound(index, sounds, output.finished)
            if data:
                rate = {"sample_rate": sounds[0].sample_rate} if sounds else {}
                yield {"audio": {"id": self._audio_id, "data": base64.b64encode(data).decode(), **rate}}, None

    def _num_choices(self, output: OmniOutput) -> int:
        results = output.results.values()
        counts = [max(map(len, (r.completions, r.images, r.previews, r.audios))) for r in results]
        return max(counts, default=1 if output.finished else 0)

    def _completion(self, output: OmniOutput, index: int) -> Completion | None:
        found = [output.results[stage].completions for stage in self._texts if stage in output.results]
        return found[0][index] if found and index < len(found[0]) else None

    def _pictures(self, output: OmniOutput, index: int) -> dict[str, Any]:
        """By stage, with what their files say, which is the words of nobody: who chats has them already."""
        found = {stage: list(Provenance(self._model).images(output, [stage])) for stage in self._images}
        return {stage: images[index] for stage, images in found.items() if index < len(images)}

    def _previews(self, output: OmniOutput, index: int) -> list[Any]:
        found = [output.results[stage].previews for stage in self._images if stage in output.results]
        return [previews[index] for previews in found if index < len(previews)]

    def _sounds(self, output: OmniOutput, index: int) -> list[Audio]:
        found = [output.results[stage].audios for stage in self._audios if stage in output.results]
        return [audios[index] for audios in found if index < len(audios)]

    def _finish_reason(self, output: OmniOutput, index: int) -> str:
        completion = self._completion(output, index)
        return (completion.finish_reason if completion is not None else None) or "stop"

    def _logprobs(self, completion: Completion, start: int) -> dict[str, Any] | None:
        return None if self._num_top is None else chat_logprobs(self._model, completion, self._num_top, start)

    def _chunk(
        self, index: int, delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}


class _Written:
    """What a stream has given already, by choice: the final output holds all of it again."""

    def __init__(self, audio_format: str | None) -> None:
        self._begun: set[int] = set()
        self._text: dict[int, str] = {}
        self._num_tokens: dict[int, int] = {}
        self._images: set[tuple[int, str]] = set()
        self._audio_format = audio_format
        self._sound: dict[int, AudioPieces] = {}

    def begin(self, index: int) -> bool:
        """Whether this is the choice's first chunk."""
        is_first = index not in self._begun
        self._begun.add(index)
        return is_first

    def new_text(self, index: int, text: str, is_whole: bool) -> str:
        given = self._text.get(index, "")
        new = text[len(given) :] if is_whole else text
        self._text[index] = given + new
        return new

    def new_tokens(self, index: int, completion: Completion, is_whole: bool) -> int:
        """The position in the completion's tokens from which on they are new."""
        start = self._num_tokens.get(index, 0) if is_whole else 0
        self._num_tokens[index] = self._num_tokens.get(index, 0) + len(completion.token_ids) - start
        return start

    def new_images(self, index: int, images: Mapping[str, Any]) -> Sequence[Any]:
        """images: by the stage that made them; whichever is finished first is given first."""
        new = [stage for stage in images if (index, stage) not in self._images]
        self._images.update((index, stage) for stage in new)
        return [images[stage] for stage in new]

    async def new_sound(self, index: int, sounds: Sequence[Audio], is_whole: bool) -> bytes:
        assert self._audio_format is not None
        pieces = self._sound.setdefault(index, AudioPieces(self._audio_format))
        data = b"".join([await pieces.add(sound) for sound in sounds])
        return data + (await pieces.close() if is_whole else b"")


async def _image_part(image: Any, metadata: MediaMetadata | None = None) -> dict[str, Any]:
    content = await image_base64(image, metadata=metadata)
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def _progress(output: OmniOutput) -> dict[str, Any]:
    return {stage: {"step": at.step, "num_steps": at.num_steps} for stage, at in output.progress.items()}
