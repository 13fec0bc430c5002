"""One task of a stage: what it was given and what it has told, so that it can be run again and nobody notices.

A task is a function of its seed and its inputs. So a further run tells the same again: that is compared with what was
told before, kept back, and only what is new goes on. Knows no engine, and not when a run ends or begins.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.messages import ChunkConsumed, StageDone, StageEvent, StageProgress, StageRows, StageTask
from vllm_omni.payload import StagePayload, StreamChunk

MAX_HELD_BYTES = 64 << 20  # of inputs and of rows that were told, of one task; with more it is not run again
# How far rows of a further run may be from those of the first, in parts of the largest of them: a batch of other
# neighbours rounds differently.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
COARSE_TOLERANCE = 2e-2  # of bfloat16 and float16

S = TypeVar("S", str, tuple[Any, ...])


class Replay:
    """Of one task, its inputs cut. streamed_ports: the outputs that another stage reads row by row."""

    def __init__(self, task: StageTask, streamed_ports: frozenset[str]) -> None:
        self.task = task
        self.is_paused = False
        self.can_run_again = True
        self.has_caught_up = True  # the run that is under way has told something new
        self.made: StagePayload | None = None  # what the last run had made when it was lost
        self._is_watched = task.is_watched
        self._streamed_ports = streamed_ports
        self._is_again = False  # the run that is under way is not the first
        self._held_bytes = 0
        self._chunks: list[tuple[str, StreamChunk]] = []
        self._ports: dict[str, _Rows] = {}
        self._samples: dict[int, _Words] = {}
        self._num_consumed: Counter[str] = Counter()
        self._num_consumed_before: Counter[str] = Counter()
        for value in task.inputs.values():
            self._hold(value.rows if isinstance(value, StreamChunk) else value)

    @property
    def request_id(self) -> str:
        return self.task.request_id

    def fed(self, port: str, chunk: StreamChunk) -> None:
        """One more chunk of a streamed input."""
        if self.can_run_again:
            self._chunks.append((port, chunk))
            self._hold(chunk.rows)

    @property
    def chunks(self) -> Iterator[tuple[str, StreamChunk]]:
        """Port and chunk, of all that came after the task itself."""
        return iter(self._chunks)

    def lose(self, made: StagePayload | None) -> None:
        """The run is lost. made: what there was of a result."""
        if self.has_caught_up:
            self.made = made
        self._is_again, self.has_caught_up = True, False
        self._num_consumed_before |= self._num_consumed
        self._num_consumed = Counter()
        for rows in self._ports.values():
            rows.position = 0
        for words in self._samples.values():
            words.position = (0, 0)

    def receive(self, event: StageEvent) -> StageEvent | None:
        """What of an event is new; StageError where a further run tells something else than was told before."""
        if isinstance(event, StageRows) and event.rows.dim():
            new: StageEvent | None = self._new_rows(event)
        elif isinstance(event, StageProgress) and isinstance(event.text, str):
            new = self._new_words(event)
        elif isinstance(event, ChunkConsumed):
            new = self._new_consumption(event)
        else:
            if isinstance(event, StageDone):
                self._check_complete()
            return event
        self.has_caught_up = self.has_caught_up or new is not None
        return new

    def _new_rows(self, event: StageRows) -> StageRows | None:
        told = self._ports.setdefault(event.port, _Rows())
        start, stop = told.position, told.position + len(event.rows)
        told.position = stop
        num_old = max(min(stop, told.num_told) - start, 0)
        if num_old and self._is_seen(event.port) and not told.matches(start, event.rows[:num_old]):
            raise StageError(f"rows {start} to {start + num_old} of {event.port!r} are others than those told before")
        is_last = event.is_last and not told.is_complete
        if num_old == len(event.rows) and not is_last and (num_old or told.is_complete):
            return None
        rows = event.rows[num_old:]
        told.num_told, told.is_complete = stop, told.is_complete or event.is_last
        if self._is_seen(event.port) and self.can_run_again:
            told.pieces.append(rows)
            self._hold(rows)
        return dataclasses.replace(event, rows=rows) if num_old else event

    def _new_words(self, event: StageProgress) -> StageProgress | None:
        told = self._samples.setdefault(event.sample, _Words())
        if not self._is_watched:
            is_further, told.step = event.step > told.step, max(told.step, event.step)
            return event if is_further else None
        text_at, token_at = told.position
        told.position = (text_at + len(event.text), token_at + len(event.token_ids))
        if not self._is_again:
            return told.tell(event)
        text = _behind(event.text, text_at, told.text)
        token_ids = _behind(event.token_ids, token_at, tuple(told.token_ids))
        if text is None or token_ids is None:
            raise StageError("it wrote other words than those told before")
        reason = event.finish_reason if told.end is None else None
        if not (text or token_ids or reason or event.step > told.step):
            return None
        num_old = len(event.token_ids) - len(token_ids)
        logprobs = None if event.logprobs is None else event.logprobs[num_old:]
        rest = dataclasses.replace(event, text=text, token_ids=token_ids, logprobs=logprobs, finish_reason=reason)
        return told.tell(rest)

    def _new_consumption(self, event: ChunkConsumed) -> ChunkConsumed | None:
        self._num_consumed[event.port] += 1
        is_new = self._num_consumed[event.port] > self._num_consumed_before[event.port]
        return event if is_new else None

    def _check_complete(self) -> None:
        """A run that ends has told all that was told before."""
        short = [port for port, rows in self._ports.items() if rows.position < rows.num_told and self._is_seen(port)]
        if self._is_watched:
            reached = all(words.position == (len(words.text), len(words.token_ids)) for words in self._samples.values())
            short += [] if reached else ["text"]
        if short:
            raise StageError(f"it made less of {', '.join(short)} than was told before")

    def _is_seen(self, port: str) -> bool:
        return self._is_watched or port in self._streamed_ports

    def _hold(self, value: Any) -> None:
        """Counts what is kept; too much of it is let go, and with it the chance of a further run."""
        if isinstance(value, Tensor):
            self._held_bytes += value.numel() * value.element_size()
        if self._held_bytes > MAX_HELD_BYTES and self.can_run_again:
            self.can_run_again = False
            self._chunks.clear()
            for rows in self._ports.values():
                rows.pieces.clear()


@dataclass(slots=True)
class _Rows:
    """Of one output port."""

    pieces: list[Tensor] = field(default_factory=list)  # what was told, where somebody saw it
    num_told: int = 0
    is_complete: bool = False  # the last was told
    position: int = 0  # rows of the run that is under way

    def matches(self, start: int, rows: Tensor) -> bool:
        """Whether these are the rows that were told from `start` on."""
        first = 0
        for piece in self.pieces:
            low, high = max(start, first), min(start + len(rows), first + len(piece))
            if low < high and not _is_same(piece[low - first : high - first], rows[low - start : high - start]):
                return False
            first += len(piece)
        return True


@dataclass(slots=True)
class _Words:
    """Of one sample."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    end: str | None = None  # its finish reason, once it was told
    step: int = 0  # the furthest
    position: tuple[int, int] = (0, 0)  # characters and tokens of the run that is under way

    def tell(self, event: StageProgress) -> StageProgress:
        self.text += event.text
        self.token_ids += event.token_ids
        self.end = self.end or event.finish_reason
        self.step = max(self.step, event.step)
        return event


def _behind(piece: S, at: int, told: S) -> S | None:
    """What of a piece that begins at `at` lies behind what was told; None where the two differ."""
    num_old = max(min(at + len(piece), len(told)) - at, 0)
    return piece[num_old:] if piece[:num_old] == told[at : at + num_old] else None


def _is_same(told: Tensor, again: Tensor) -> bool:
    if told.shape != again.shape or told.dtype != again.dtype:
        return False
    again = again.to(told.device)
    if not told.is_floating_point():
        return torch.equal(told, again)
    limit = TOLERANCE.get(told.dtype, COARSE_TOLERANCE) * told.abs().max()
    return bool((told - again).abs().max() <= limit)
