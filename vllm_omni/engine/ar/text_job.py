"""One task of words in an AR stage: its samples, what they have written, and the answer that they make. Schedules and
computes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARJob, Generation
from vllm_omni.engine.ar.prompt import PreparedPrompt
from vllm_omni.engine.ar.tapped_states import TappedStates
from vllm_omni.engine.ar.text_stream import TextStream
from vllm_omni.layers.sampler import SampledToken, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import StageEvent, StageProgress, StageTask
from vllm_omni.worker.ar.media_inputs import MediaInputs

TOLD_TOGETHER = 32  # tokens of a sample that are told at once where nobody waits for them


@dataclass(slots=True)
class Sample:
    """One of a request's n texts."""

    index: int  # which of them
    generation: Generation
    stream: TextStream
    room_limit: str | None  # of PreparedPrompt
    runs_last_token: bool  # whether the token that max_tokens ended with is computed as well: its states are read
    logprobs: list[Mapping[int, float]] = field(default_factory=list)  # the chosen token first
    num_read: int = 0  # written tokens that the stream has
    num_told: int = 0  # that callers were told of

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to compute."""
        if self.generation.finish_reason == "length" and self.runs_last_token:
            return self.generation.sequence.num_uncomputed_tokens == 0
        return self.generation.finish_reason is not None

    def write(self, token: SampledToken) -> None:
        """Appends a sampled token, which may be the last."""
        generation = self.generation
        generation.write(token.token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        if generation.finish_reason is not None or self.stream.has_stop_strings:
            self._read()
            if self.stream.is_stopped:
                generation.end("stop")
            if generation.finish_reason is not None:
                self.stream.finish()

    @property
    def has_much_to_tell(self) -> bool:
        """Whether enough has been written since the last `news`, or all of it."""
        generation = self.generation
        return generation.finish_reason is not None or generation.num_written - self.num_told >= TOLD_TOGETHER

    def news(self, num_samples: int) -> StageProgress:
        """What it has written since the last time."""
        generation, start = self.generation, self.num_told
        sequence = generation.sequence
        self.num_told = generation.num_written
        self._read()
        return StageProgress(
            sequence.request_id,
            generation.num_written,
            generation.max_new_tokens,
            self.stream.give(),
            token_ids=tuple(sequence.token_ids[sequence.num_prompt_tokens + start :]),
            logprobs=None if generation.row.num_logprobs is None else tuple(self.logprobs[start:]),
            finish_reason=generation.finish_reason,
            sample=self.index,
            num_samples=num_samples,
        )

    def completion(self) -> dict[str, Any]:
        """The fields of a Completion as plain JSON; logprobs: for every position the pairs [token, log probability]."""
        self._read()
        logprobs = [[[token, value] for token, value in position.items()] for position in self.logprobs]
        return {
            "text": self.stream.text,
            "token_ids": list(self.generation.sequence.output_token_ids),
            "finish_reason": self.generation.finish_reason,
            "logprobs": None if self.generation.row.num_logprobs is None else logprobs,
            "note": self._note(),
        }

    def _read(self) -> None:
        """Makes text of what has been written; a token that ends it is no part of it."""
        generation = self.generation
        stop = generation.num_written - (generation.finish_reason == "stop")
        if self.num_read < stop:
            sequence, start, self.num_read = generation.sequence, self.num_read, stop
            written = sequence.token_ids[sequence.num_prompt_tokens + start : sequence.num_prompt_tokens + stop]
            self.stream.push(written, can_stop=generation.num_written >= generation.row.min_tokens)

    def _note(self) -> str | None:
        """Why it has ended, where the request did not ask for that."""
        if self.room_limit is None or self.generation.finish_reason != "length":
            return None
        return f"ended after {self.generation.num_written} tokens, at {self.room_limit}"


class TextJob(ARJob):
    """A prompt and its sequences: one for each of n samples when it writes, one and no sample when it only encodes.

    states: of the first sequence; several have no reader of them.
    """

    def __init__(
        self,
        task: StageTask,
        prompt: PreparedPrompt,
        sequences: list[Sequence],
        samples: list[Sample],
        states: TappedStates,
        media: MediaInputs | None,
        sections: tuple[str, ...],
    ) -> None:
        super().__init__(task)
        self.sequences = sequences
        self.samples = {sample.generation.sequence.sequence_id: sample for sample in samples}
        self._prompt = prompt
        self._states = states
        self._media = media
        self._sections = sections

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        return None if self._media is None else self._media.between(chunk.start, chunk.end)

    def row_of(self, sequence: Sequence) -> SamplingRow:
        return self.samples[sequence.sequence_id].generation.row

    def record(self, sequence: Sequence, token: SampledToken | None) -> list[StageEvent]:
        events: list[StageEvent] = []
        if token is not None:
            sample = self.samples[sequence.sequence_id]
            sample.write(token)
            if self.task.is_watched or sample.has_much_to_tell:
                events.append(sample.news(len(self.samples)))
        if self._states.are_streamed and sequence is self.sequences[0]:
            events += self._states.rows(self.is_over(sequence))
        return events

    @property
    def is_done(self) -> bool:
        return all(self.is_over(sequence) for sequence in self.sequences)

    def is_over(self, sequence: Sequence) -> bool:
        sample = self.samples.get(sequence.sequence_id)
        return sequence.num_uncomputed_tokens == 0 if sample is None else sample.is_done

    def tensors(self) -> dict[str, Tensor]:
        return self._states.tensors()

    def meta(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self._prompt.num_tokens,
            "truncated_tokens": self._prompt.num_truncated,
        }
        if not self.samples:
            return counts
        completions = self.words()["completions"]
        first = completions[0]
        words = {key: first[key] for key in ("text", "token_ids", "finish_reason")}
        return {**words, **read_sections(first["text"], self._sections), "completions": completions, **counts}

    def words(self) -> dict[str, Any]:
        return {"completions": [sample.completion() for sample in self.samples.values()]} if self.samples else {}

    def metrics(self) -> dict[str, int]:
        """cache_hits: prompt tokens that the prefix cache served, of all samples. cached_tokens: of the first, which is
        what other requests have left.
        """
        num_prompt = self._prompt.num_tokens
        num_written = sum(sample.generation.num_written for sample in self.samples.values())
        metrics = {
            "steps": self.num_steps,
            "tokens": num_written if self.samples else num_prompt,
            "prompt_tokens": num_prompt,
            "cached_tokens": self._num_cached(self.sequences[0]),
            "cache_hits": sum(map(self._num_cached, self.sequences)),
            "preemptions": sum(sequence.num_preemptions for sequence in self.sequences),
        }
        if self._prompt.num_truncated:
            metrics["truncated_tokens"] = self._prompt.num_truncated
        return metrics

    def _num_cached(self, sequence: Sequence) -> int:
        """Pads behind the prompt are no tokens of it."""
        return min(sequence.num_cached_tokens or 0, self._prompt.num_tokens)


def read_sections(text: str, labels: Collection[str]) -> dict[str, str]:
    """Label -> the words of the first line that begins with `label:`, stripped; labels without such a line are left
    out.
    """
    found: dict[str, str] = {}
    for line in text.split("\n"):
        label, colon, words = line.partition(":")
        if colon and label in labels:
            found.setdefault(label, words.strip())
    return found
