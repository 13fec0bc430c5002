"""How one image, audio or video lies among the tokens, and the positions (time, height, width) of a whole prompt.

The layout and the numbers are those of Qwen2-VL (arXiv:2409.12191, section 2.1, "M-RoPE"), with a clock as Qwen2.5-VL
has it, and with sounds as Qwen2.5-Omni has them (arXiv:2503.20215, section 2.2, "TMRoPE"), or as Qwen3-Omni does
(arXiv:2509.17765, section 2.3). Knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MediaClock:
    """How time becomes positions."""

    positions_per_second: float  # steps of the time axis
    seconds_per_chunk: float = 1.0  # how much of a video stands before the sound track of the same seconds
    # As Qwen3-Omni has it: time is not rounded to whole steps, a video and its sound track stand token by token in the
    # order of their time instead of in chunks, and the marks around a track have positions of their own.
    is_continuous: bool = False

    @property
    def positions_per_chunk(self) -> int:
        return int(self.positions_per_second * self.seconds_per_chunk)


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """The tokens of one part of a message."""

    kind: str
    grid: tuple[int, int, int] | None = None  # (time, height, width) in tokens; None for audio
    second_per_grid: float = 0.0
    num_audio_tokens: int = 0  # of audio, or of a video's sound track

    @property
    def has_track(self) -> bool:
        return self.kind == "video" and self.num_audio_tokens > 0

    @property
    def num_grid_tokens(self) -> int:
        if self.grid is None:
            return 0
        time, height, width = self.grid
        return time * height * width

    @property
    def num_tokens(self) -> int:
        """A sound track brings a beginning and an ending token of its own."""
        return self.num_grid_tokens + self.num_audio_tokens + 2 * self.has_track

    def grid_positions(self, clock: MediaClock) -> Tensor:
        """[3, n], from 0 on: int64, or float32 by a continuous clock."""
        assert self.grid is not None
        time, height, width = self.grid
        steps = torch.arange(time) * torch.tensor(self.second_per_grid) * clock.positions_per_second
        steps = steps if clock.is_continuous and self.kind == "video" else steps.long()
        sides = (torch.arange(side).to(steps.dtype) for side in (height, width))
        axes = torch.meshgrid(steps, *sides, indexing="ij")
        return torch.stack([axis.flatten() for axis in axes])

    def audio_positions(self) -> Tensor:
        """[3, n] int64, from 0 on."""
        return torch.arange(self.num_audio_tokens).expand(3, -1)

    def pieces(self, clock: MediaClock) -> Iterator[tuple[str, Tensor]]:
        """(kind, positions [3, n]) of runs of tokens of one kind; a sound track follows its video chunk by chunk, or
        token by token.
        """
        if not self.has_track:
            yield self.kind, self.audio_positions() if self.grid is None else self.grid_positions(clock)
            return
        if clock.is_continuous:
            yield from _merged(self.grid_positions(clock), self.audio_positions())
            return
        video = _chunks(self.grid_positions(clock), clock.positions_per_chunk)
        audio = _chunks(self.audio_positions(), clock.positions_per_chunk)
        for index in range(max(len(video), len(audio))):
            for kind, chunks in (("video", video), ("audio", audio)):
                if index < len(chunks):
                    yield kind, chunks[index]


def rope_index(num_tokens: int, placed: Sequence[tuple[int, MediaSpan]], clock: MediaClock) -> tuple[Tensor, float]:
    """Positions [3, num_tokens] of a prompt, and what is added to the index of a later token to give its own: whole
    numbers, but for a video by a continuous clock.

    placed: in order, (index of the first token that stands for a part, its span). Text advances all three axes together
    from one beyond the largest position of the run of tokens before it. A sound track's beginning token has the
    position of the token before it, its ending token that of the token behind it, unless the clock is continuous.
    """
    parts: list[Tensor] = []
    done = 0
    position: float = 0
    own = int(clock.is_continuous)  # how many positions a mark around a track has
    for start, span in placed:
        parts.append(_text(position, start - done))
        position += start - done
        if span.has_track:
            parts.append(_text(position - 1 + own, 1))
            position += own
        first = position
        parts += [positions + first for _, positions in span.pieces(clock)]
        position = parts[-1].max().item() + 1
        if span.has_track:
            parts.append(_text(position, 1))
            position += own
        done = start + span.num_tokens
    parts.append(_text(position, num_tokens - done))
    positions = torch.cat(parts, dim=1)
    if bool((positions == positions.round()).all()):
        positions = positions.long()
    return positions, positions.max().item() + 1 - num_tokens


def _text(first: float, num_tokens: int) -> Tensor:
    return (torch.arange(num_tokens) + first).expand(3, -1)


def _merged(video: Tensor, audio: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Runs of a video's tokens and of its track's in the order of their time, the video first where both are due."""
    times = torch.cat([video[0], audio[0].to(video.dtype)])
    is_audio = torch.arange(len(times)) >= video.shape[1]
    order = times.argsort(stable=True)
    every = torch.cat([video, audio.to(video.dtype)], dim=1)[:, order]
    kinds = is_audio[order]
    cuts = (kinds.diff().nonzero().flatten() + 1).tolist()
    for start, stop in zip([0, *cuts], [*cuts, len(kinds)], strict=True):
        yield ("audio" if bool(kinds[start]) else "video"), every[:, start:stop]


def _chunks(positions: Tensor, length: int) -> list[Tensor]:
    """Cut where the time first reaches the end of the chunk; a jump over several ends is one cut."""
    cuts = [0]
    for index, time in enumerate(positions[0].tolist()):
        if time >= len(cuts) * length:
            cuts.append(index)
    return [positions[:, start:stop] for start, stop in zip(cuts, [*cuts[1:], positions.shape[1]], strict=True)]
