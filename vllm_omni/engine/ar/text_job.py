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
from vllm_omni.engine.ar.base import ARJob
from vllm_omni.engine.ar.prompt import PreparedPrompt
from vllm_omni.engine.ar.thinker_states import ThinkerStates
from vllm_omni.engine.ar.tokenizer import TextStream
from vllm_omni.engine.base import StageEvent, StageProgress, StageTask
from vllm_omni.layers.sampler import SampledToken, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.request import Completion
from vllm_omni.worker.ar.media_inputs import MediaInputs
from vllm_omni.worker.ar.model_runner import ModelRunner


@dataclass(slots=True)
class Sample:
    """One of a request's n texts.

    ending_ids: tokens that end the text and are no part of it. runs_last_token: whether the token that max_tokens ended
    with is computed as well, since its hidden states are wanted.
    """

    sequence: Sequence
    row: SamplingRow
    stream: TextStream
    ending_ids: frozenset[int]
    max_new_tokens: int
    runs_last_token: bool
    logprobs: list[Mapping[int, float]] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def num_written(self) -> int:
        return self.sequence.num_tokens - self.sequence.num_prompt_tokens

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to compute."""
        if self.finish_reason == "length" and self.runs_last_token:
            return self.sequence.num_uncomputed_tokens == 0
        return self.finish_reason is not None

    def write(self, token: SampledToken) -> str:
        """Takes a sampled token in; returns the text that is new."""
        self.sequence.append(token.token_id)
        self.row.record(token.token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        text = ""
        if token.token_id in self.ending_ids:
            self.finish_reason = "stop"
        else:
            text = self.stream.push(token.token_id, can_stop=self.num_written >= self.row.min_tokens)
            if self.stream.is_stopped:
                self.finish_reason = "stop"
            elif self.num_written == self.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is None:
            return text
        self.sequence.is_writing = False
        return text + self.stream.finish()

    def completion(self) -> Completion:
        logprobs = tuple(self.logprobs) if self.row.num_logprobs is not None else None
        return Completion(self.stream.text, tuple(self.sequence.output_token_ids), self.finish_reason, logprobs)


@dataclass(frozen=True, slots=True)
class TappedPort:
    """layers: indices into `hidden_states`. of_completion: the written tokens' states, else the prompt's."""

    layers: tuple[int, ...]
    of_completion: bool


class TextJob(ARJob):
    """A prompt and its sequences: n samples when it writes, one sequence and no sample when it only encodes.

    taps: the ports of tapped states that somebody reads whole, with their layers and whether they are the written
    tokens'. states: of a thinker, whose states go out row by row.
    """

    def __init__(self, task: StageTask, prompt: PreparedPrompt, runner: ModelRunner, sections: tuple[str, ...]) -> None:
        super().__init__(task)
        self.prompt = prompt
        self.samples: dict[int, Sample] = {}  # by sequence id
        self.taps: dict[str, TappedPort] = {}
        self.media: MediaInputs | None = None
        self.states: ThinkerStates | None = None
        self._runner = runner
        self._sections = sections

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        return None if self.media is None else self.media.between(chunk.start, chunk.end)

    def row_of(self, sequence: Sequence) -> SamplingRow:
        return self.samples[sequence.sequence_id].row

    def take(self, sequence: Sequence, token: SampledToken | None) -> list[StageEvent]:
        events: list[StageEvent] = []
        if token is not None:
            written = self.samples[sequence.sequence_id]
            text = written.write(token)
            if sequence is self.sequences[0]:
                events.append(StageProgress(sequence.request_id, written.num_written, written.max_new_tokens, text))
        if self.states is not None:
            events += self.states.rows(self._runner.tapped_states)
        return events

    @property
    def is_done(self) -> bool:
        if not self.samples:
            return self.sequences[0].num_uncomputed_tokens == 0
        return all(sample.is_done for sample in self.samples.values())

    def is_over(self, sequence: Sequence) -> bool:
        sample = self.samples.get(sequence.sequence_id)
        return sample is not None and sample.is_done

    def tensors(self) -> dict[str, Tensor]:
        sequence = self.sequences[0]
        found: dict[str, Tensor] = {}
        for port, tap in self.taps.items():
            bounds = (0, sequence.num_prompt_tokens)
            if tap.of_completion:
                bounds = (sequence.num_prompt_tokens, sequence.num_computed_tokens)
            found[port] = self._runner.tapped_states(sequence, tap.layers, *bounds)
        return found | (self.states.tensors(self._runner.tapped_states) if self.states is not None else {})

    def meta(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": len(self.prompt.token_ids),
            "truncated_tokens": self.prompt.num_truncated,
        }
        if not self.samples:
            return counts
        completions = [sample.completion() for sample in self.samples.values()]
        first = completions[0]
        words = {"text": first.text, "token_ids": list(first.token_ids), "finish_reason": first.finish_reason}
        return {**words, **read_sections(first.text, self._sections), "completions": completions, **counts}

    def metrics(self) -> dict[str, int]:
        """cache_hits: prompt tokens that the prefix cache served, of all samples."""
        num_prompt = len(self.prompt.token_ids)
        metrics = {
            "steps": self.num_steps,
            "tokens": sum(sample.num_written for sample in self.samples.values()) if self.samples else num_prompt,
            "prompt_tokens": num_prompt,
            "cache_hits": sum(sequence.num_cached_tokens or 0 for sequence in self.sequences),
            "preemptions": sum(sequence.num_preemptions for sequence in self.sequences),
        }
        if self.prompt.num_truncated:
            metrics["truncated_tokens"] = self.prompt.num_truncated
        return metrics


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
