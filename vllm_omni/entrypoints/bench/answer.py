"""One answer of a load: when its parts came. Knows no wire."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# name -> what it is; seconds, from the moment at which the request was due
MEASURES = {
    "ttft": "time to the first token",
    "tpot": "time per further token",
    "preview": "time to the first preview",
    "sound": "time to the first sound",
    "e2e": "time to the end",
}
OK = "200"


@dataclass(slots=True)
class Answer:
    """Times are seconds on `time.perf_counter`. `began_s`: when the request was due, be it sent late or not."""

    work: str
    began_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    first_text_s: float | None = None
    last_text_s: float | None = None
    first_preview_s: float | None = None
    first_sound_s: float | None = None
    num_deltas: int = 0  # pieces of text
    num_tokens: int | None = None  # of the text, where the answer tells
    status: str = OK  # an HTTP status, or the word for what went wrong below it
    error: str = ""

    def note_text(self) -> None:
        self.last_text_s = time.perf_counter()
        self.num_deltas += 1
        if self.first_text_s is None:
            self.first_text_s = self.last_text_s

    def note_preview(self) -> None:
        if self.first_preview_s is None:
            self.first_preview_s = time.perf_counter()

    def note_sound(self) -> None:
        if self.first_sound_s is None:
            self.first_sound_s = time.perf_counter()

    def fail(self, status: str, error: str) -> None:
        self.status, self.error = status, " ".join(error.split())[:300]

    @property
    def is_ok(self) -> bool:
        return self.status == OK

    @property
    def tokens(self) -> int:
        return self.num_deltas if self.num_tokens is None else self.num_tokens

    def measures(self) -> dict[str, float]:
        """By the names of MEASURES; what the answer did not have is not there, and a failed one has none."""
        if not self.is_ok:
            return {}
        moments = {
            "ttft": self.first_text_s,
            "preview": self.first_preview_s,
            "sound": self.first_sound_s,
            "e2e": self.ended_s,
        }
        found = {name: moment - self.began_s for name, moment in moments.items() if moment is not None}
        # words that all came at once say nothing of the time of one
        if self.first_text_s is not None and self.last_text_s is not None and min(self.tokens, self.num_deltas) > 1:
            found["tpot"] = (self.last_text_s - self.first_text_s) / (self.tokens - 1)
        return found
