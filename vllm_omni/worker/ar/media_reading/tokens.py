"""The token ids that stand for media in the prompts of one checkpoint, and how the tokens of a span follow one another.

Reads no files: a family says which they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_omni.errors import InvalidRequestError
from vllm_omni.worker.ar.media_reading.spans import MediaClock, MediaSpan


@dataclass(frozen=True, slots=True)
class MediaTokens:
    """What stands for media, and for time."""

    placeholders: Mapping[str, int]  # kind -> the token that a chat template writes once, and that a span repeats
    clock: MediaClock
    track_ends: Mapping[str, int] = field(default_factory=dict)  # "start" and "end", around a video's sound track

    def of_span(self, span: MediaSpan) -> list[int]:
        """The tokens that replace the placeholder of a part."""
        tokens = {**self.placeholders, **self.track_ends}
        return [tokens[kind] for kind in self.kinds_of_span(span)]

    def kinds_of_span(self, span: MediaSpan) -> list[str]:
        """For every token of a span the kind that it stands for; "start" and "end" are those of a sound track."""
        kinds = [kind for kind, positions in span.pieces(self.clock) for _ in range(positions.shape[1])]
        return ["start", *kinds, "end"] if span.has_track else kinds

    def expand(self, short: Sequence[int], spans: Sequence[MediaSpan]) -> tuple[list[int], list[tuple[int, MediaSpan]]]:
        """Token ids with every placeholder replaced, and where each span begins."""
        placeholders = frozenset(self.placeholders.values())
        token_ids: list[int] = []
        placed: list[tuple[int, MediaSpan]] = []
        remaining = iter(spans)
        for token in short:
            if token not in placeholders:
                token_ids.append(token)
                continue
            span = next(remaining)
            placed.append((len(token_ids), span))
            token_ids += self.of_span(span)
        return token_ids, placed

    def check_kinds(self, token_ids: Sequence[int], kinds: Sequence[str]) -> None:
        """InvalidRequestError unless there is one placeholder for each part, in order, and the texts hold none."""
        known = {token: kind for kind, token in self.placeholders.items()}
        found = [known[token] for token in token_ids if token in known]
        if found != list(kinds):
            raise InvalidRequestError(
                f"messages: got the media {list(kinds)}, but placeholders for {found} in the text of the chat "
                "template; take the placeholders out of the texts"
            )

    def check_absent(self, token_ids: Sequence[int]) -> None:
        """InvalidRequestError for a placeholder in a prompt that brings no media."""
        for token in token_ids:
            if token in self.placeholders.values():
                raise InvalidRequestError(
                    f"prompt: got the token id {token}, which stands for media; give messages with the media in them"
                )
