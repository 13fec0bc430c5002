"""One task that writes codes of speech: its sequence, and the rows of codes that it gives. Knows no model."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARJob, Generation
from vllm_omni.engine.ar.talker.inputs import TalkerInputs
from vllm_omni.layers.sampler import SampledToken, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import StageEvent, StageProgress, StageRows, StageTask

CODES = "codes"


class CodesJob(ARJob):
    """gives_rows and gives_codes: whether codes are read row by row, and whole. A job whose text is empty is silent: it
    has no generation, and no codes.
    """

    def __init__(self, task: StageTask, gives_rows: bool, gives_codes: bool) -> None:
        super().__init__(task)
        self._gives_rows, self._gives_codes = gives_rows, gives_codes
        self._generation: Generation | None = None
        self._inputs: TalkerInputs | None = None
        self._is_silent = False

    @abstractmethod
    def codes(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...] int64: what was written at these places."""

    def consumed(self, sequence: Sequence) -> list[StageEvent]:
        """Chunks of streamed inputs that have been used up."""
        return []

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        return None if self._inputs is None else self._inputs.between(chunk.start, chunk.end)

    def row_of(self, sequence: Sequence) -> SamplingRow:
        return self._started.row

    def record(self, sequence: Sequence, token: SampledToken | None) -> list[StageEvent]:
        events = self.consumed(sequence)
        if token is None:
            return events
        generation = self._started
        generation.write(token.token_id)
        events.append(StageProgress(sequence.request_id, generation.num_written, generation.max_new_tokens))
        if self._gives_rows and generation.finish_reason != "stop":
            last = generation.num_written
            events.append(StageRows(sequence.request_id, CODES, self.codes(last - 1, last)))
        return events

    @property
    def is_done(self) -> bool:
        return self._is_silent or (self._generation is not None and self._generation.finish_reason is not None)

    def is_over(self, sequence: Sequence) -> bool:
        return self.is_done

    def tensors(self) -> dict[str, Tensor]:
        return {CODES: self.codes(0, self._num_spoken)} if self._gives_codes else {}

    def meta(self) -> dict[str, Any]:
        if self._is_silent:
            return {"finish_reason": "stop", "prompt_tokens": 0}
        generation = self._started
        return {
            "finish_reason": generation.finish_reason,
            "prompt_tokens": generation.sequence.num_prompt_tokens,
        }

    def metrics(self) -> dict[str, int]:
        if self._is_silent:
            return dict.fromkeys(("steps", "tokens", "prompt_tokens", "cache_hits", "preemptions"), 0)
        sequence = self._started.sequence
        return {
            "steps": self.num_steps,
            "tokens": len(sequence.output_token_ids),
            "prompt_tokens": sequence.num_prompt_tokens,
            "cache_hits": sequence.num_cached_tokens or 0,
            "preemptions": sequence.num_preemptions,
        }

    @property
    def _started(self) -> Generation:
        assert self._generation is not None
        return self._generation

    @property
    def _num_spoken(self) -> int:
        """Places whose codes are spoken: all that were written but the end."""
        if self._is_silent:
            return 0
        generation = self._started
        return generation.num_written - (generation.finish_reason == "stop")
