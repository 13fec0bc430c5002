"""What one request asks of ACE-Step, decided once: MusicRequest for the stage that reads it, MusicOutline for the stage
that makes the audio. Knows neither where the values come from nor how they are checked (request_reader.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALWAYS_NEEDED = frozenset({"prompt_embeds", "lyric_embeds", "music"})


@dataclass(frozen=True, slots=True)
class MusicSources:
    """What the keys of a request show before their values are checked; a key that is None is as if it were not there.
    It decides which ports the request needs, which is asked before any stage runs.
    """

    task_type: Any
    has_audio: bool
    has_reference_audio: bool
    has_audio_codes: bool
    is_weakened: bool  # a cover is asked for that follows its source less than wholly

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> MusicSources:
        task_type, strength = fields.get("task_type"), fields.get("audio_cover_strength")
        return cls(
            task_type="text2music" if task_type is None else task_type,
            has_audio=fields.get("audio") is not None,
            has_reference_audio=fields.get("reference_audio") is not None,
            has_audio_codes=fields.get("audio_codes") is not None,
            is_weakened=isinstance(strength, int | float) and strength < 1,
        )

    @property
    def is_cover(self) -> bool:
        """Whether the request itself makes it one; a language model that writes codes does too."""
        return self.task_type == "cover" or self.has_audio_codes

    @property
    def needed_ports(self) -> frozenset[str]:
        """Words and `music` always. The audio that the request brings. Audio codes for text to music and for a cover
        without source audio: they are empty where the request brings none, and a language model's where one is
        connected. The plain prompt for a cover of strength below 1.
        """
        ports = {
            "source_audio": self.has_audio,
            "reference_audio": self.has_reference_audio,
            "audio_codes": not self.has_audio and self.task_type != "repaint",
            "plain_prompt_embeds": self.is_weakened,
        }
        return ALWAYS_NEEDED | {port for port, is_needed in ports.items() if is_needed}


@dataclass(frozen=True, slots=True)
class MusicOutline:
    """Everything but words and samples: the value of the port `music`."""

    task_type: str  # what the model does: "text2music", "cover" (also text to music by audio codes) or "repaint"
    duration_s: float  # of the result
    num_frames: int  # latent frames of the result
    cover_strength: float = 1.0  # how far a cover follows its source; 1 is wholly
    repaint_frames: tuple[int, int | None] | None = None  # first one made anew, and the one behind the last; None: end
    has_source_audio: bool = False
    has_reference_audio: bool = False
    has_audio_codes: bool = False  # the request's own, or a language model's

    @property
    def is_audio_cover(self) -> bool:
        """Whether the source audio is followed in what is played alone, not in how it sounds."""
        return self.has_source_audio and self.task_type == "cover"

    def to_json(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        return {**value, "repaint_frames": None if self.repaint_frames is None else list(self.repaint_frames)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MusicOutline:
        frames = value["repaint_frames"]
        return cls(**{**value, "repaint_frames": None if frames is None else tuple(frames)})


@dataclass(frozen=True, slots=True)
class MusicRequest:
    """A checked request."""

    caption: str
    lyrics: str
    language: str
    instruction: str | None  # None: the task's own
    bpm: int | None
    keyscale: str | None  # as ACE-Step writes it: "F# minor"
    timesignature: str | None
    audio: Any  # the source as the caller gave it, None where there is none
    reference_audio: Any  # likewise
    audio_codes: str  # empty where the request brings none
    outline: MusicOutline

    @property
    def given_audio(self) -> dict[str, Any]:
        """By port: the audio that the request brings, not decoded."""
        sources = {"source_audio": self.audio, "reference_audio": self.reference_audio}
        return {port: source for port, source in sources.items() if source is not None}
