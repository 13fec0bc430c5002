"""Decode steps that are begun before anybody has read the tokens of the step before: the device goes on while the host
looks at what it wrote. Knows no scheduler; who begins a step has made sure that it will most likely be wanted.

What was begun in vain (a sequence has ended, another came in) harms nothing: its keys and values stand in the slots of
tokens that are either computed again to the same numbers, or of blocks that are written before they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.worker.ar.batch import DecodeBatch
from vllm_omni.worker.ar.decode_graphs import DecodeGraphs
from vllm_omni.worker.ar.step_logits import ChosenTokens, StepLogits

NOT_BEGUN: tuple[int, int, list[int]] = (-1, -1, [])


@dataclass(frozen=True, slots=True)
class Begun:
    """A step on its way. rows: by sequence id, its row, the position that it computes, and the block table by which its
    keys and values went to the pool: one that loses its blocks gets another list.
    """

    tokens: ChosenTokens
    rows: dict[int, tuple[int, int, list[int]]]


class DecodeAhead:
    """The captured steps of one model, each begun when it is asked for or a step earlier."""

    def __init__(self, graphs: DecodeGraphs, batch: DecodeBatch) -> None:
        self._graphs = graphs
        self._batch = batch
        self._begun: Begun | None = None
        self._last_rows: list[int] | None = None  # of each chunk of the last step, where a step may be begun behind it

    def run(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs]) -> StepLogits:
        """The step of chunks that fit the batch and fill its buffers."""
        begun, self._begun = self._begun, None
        rows = None if begun is None else self._rows_of(begun, chunks)
        if begun is not None and rows is not None:
            self._last_rows = rows
            return StepLogits(None, chosen=begun.tokens.of_rows(rows))
        step = self._graphs.run(self._batch.fill(chunks, inputs))
        can_follow = not inputs and all(chunk.samples and not chunk.draft for chunk in chunks)
        self._last_rows = list(range(len(chunks))) if can_follow else None
        return step

    def begin(self, chunks: Many[Chunk], goes_on: Many[bool], choose: Callable[[StepLogits], ChosenTokens]) -> None:
        """The step after that of these chunks, which ran last and whose tokens are chosen on the device. goes_on: which
        of them have a token more, the block of it taken. choose: begins to choose the tokens of the new step.
        """
        if self._last_rows is None:
            return
        batch = self._batch.fill_next(chunks, goes_on, self._last_rows, self._graphs.chosen)
        tokens = choose(self._graphs.run(batch))
        rows = {
            chunk.sequence.sequence_id: (row, chunk.end, chunk.sequence.block_table)
            for row, (chunk, does) in enumerate(zip(chunks, goes_on, strict=True))
            if does
        }
        self._begun = Begun(tokens, rows)

    def forget(self) -> None:
        """Another step runs in between."""
        self._begun = self._last_rows = None

    def _rows_of(self, begun: Begun, chunks: Many[Chunk]) -> list[int] | None:
        """The row of each chunk; None where one was not begun."""
        rows: list[int] = []
        for chunk in chunks:
            row, start, table = begun.rows.get(chunk.sequence.sequence_id, NOT_BEGUN)
            is_same = start == chunk.start and table is chunk.sequence.block_table
            if not is_same or not chunk.samples or chunk.draft:
                return None
            rows.append(row)
        return rows
