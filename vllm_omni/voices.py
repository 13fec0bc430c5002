"""Voices that a user keeps: each a reference sound, its words, and who agreed to it, in one file of one folder.

The sound is kept, not what a model makes of it: so a voice serves every checkpoint, and adding one needs none. Knows no
model, and no format of sounds but its own.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_omni.config.schema import VoicesConfig
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, ResourceError
from vllm_omni.utils.checkpoint_files import check_file
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.files import user_path, write_whole

logger = logging.getLogger(__name__)

Samples = npt.NDArray[np.float32]

SAMPLE_RATE = 24_000  # Hz
MIN_SOUND_S, MAX_SOUND_S = 0.5, 60.0
MAX_TEXT, MAX_CONSENT = 2_000, 500  # characters
MAX_FILES = 20_000  # of the folder that are looked at
SUFFIX = ".safetensors"
FORMAT = "vllm-omni voice 1"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME_RULE = "1 to 64 letters, digits, - and _"


@dataclass(frozen=True, slots=True)
class VoiceFacts:
    """What is known of a kept voice besides its sound."""

    name: str
    text: str | None  # what is said in the sound; None: the speaker is imitated, not the way of speaking
    consent: str  # who agreed, and how, in the words of whoever added it
    created: int  # seconds since 1970
    duration_s: float
    num_bytes: int  # of its file


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """sound: [n] float32, SAMPLE_RATE Hz, one channel."""

    sound: Samples
    facts: VoiceFacts


class VoiceStore:
    """The voices of one folder, read anew at every call: several processes may share it. Safe to ask from any
    thread.
    """

    def __init__(self, config: VoicesConfig) -> None:
        """ConfigError for a path that is no folder; one that is not there yet is made with the first voice."""
        self.config = config
        self._folder = user_path("voices.folder", config.folder, raises=ConfigError)
        if self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"voices.folder: got {brief(config.folder)}, which is no folder")
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        paths = islice(self._folder.iterdir(), MAX_FILES)
        return sorted(path.stem for path in paths if path.suffix == SUFFIX and NAME.fullmatch(path.stem))

    def facts(self) -> list[VoiceFacts]:
        """Of all voices, by name; headers alone are read. A damaged file is left out, and a warning says which."""
        return [facts for name in self.names() if (facts := _facts_if_there(self._path(name))) is not None]

    def get(self, name: object) -> Voice:
        """InvalidRequestError for a voice that is not there, CheckpointError for a damaged file."""
        path = self._existing(name)
        facts = _read_facts(path)
        with safe_open(path, "numpy") as file:
            sound: Samples = file.get_tensor("sound")
        if not np.isfinite(sound).all():
            raise _damaged(path, "holds samples that are NaN or infinite")
        return Voice(sound, facts)

    def add(self, name: str, sound: Samples, *, text: str | None, consent: str | None) -> VoiceFacts:
        """Keeps a sound, [n] at SAMPLE_RATE Hz, that `check_reference` has let pass. InvalidRequestError for a name
        that is taken and for words that are missing or too long, ResourceError where the folder is full.
        """
        path = self._path(name)
        text = _checked_words("text", text, MAX_TEXT)
        agreed = _checked_words("consent", consent, MAX_CONSENT)
        if agreed is None:
            raise InvalidRequestError(
                "consent: got none, expected who agreed that this voice is cloned, and how; nobody's voice is kept "
                "without that"
            )
        check_reference(len(sound) / SAMPLE_RATE, sound)
        metadata = {"format": FORMAT, "text": text, "consent": agreed, "created": str(int(time.time()))}
        tensor = {"sound": np.ascontiguousarray(sound, np.float32)}
        content = save(tensor, {key: value for key, value in metadata.items() if value is not None})
        with self._lock:
            self._check_room(name, len(content))
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
            except OSError as error:
                raise ResourceError(f"{path}: cannot be written ({error.strerror or error})") from error
        return _read_facts(path)

    def remove(self, name: object) -> None:
        """InvalidRequestError for a voice that is not there."""
        self._existing(name).unlink(missing_ok=True)

    def _check_room(self, name: str, num_bytes: int) -> None:
        taken = self.names()
        if name.lower() in map(str.lower, taken):
            raise InvalidRequestError(f"name: got {name!r}, which is taken; choose another, or remove that voice first")
        if len(taken) >= self.config.max_voices:
            raise ResourceError(
                f"name: {len(taken)} voices are kept, expected at most {self.config.max_voices} (voices.max_voices); "
                "remove one"
            )
        total = num_bytes + sum(_size(self._path(each)) for each in taken)
        if total > self.config.max_mb * 1e6:
            raise ResourceError(
                f"name: got {total / 1e6:.1f} MB of voices with this one, expected at most {self.config.max_mb:g} "
                "(voices.max_mb); remove one"
            )

    def _existing(self, name: object) -> Path:
        path, names = self._path(name), self.names()
        if path.stem not in names:
            raise InvalidRequestError(f"voice: got {brief(name)}{did_you_mean(path.stem, names)}")
        return path

    def _path(self, name: object) -> Path:
        """A name is no path: what is checked here cannot leave the folder."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InvalidRequestError(f"name: got {brief(name)}, expected {NAME_RULE}")
        return self._folder / f"{name}{SUFFIX}"


def check_reference(duration_s: float, sound: Samples | None = None) -> None:
    """InvalidRequestError for a sound that no voice can be heard from: too short, too long, or silent. sound: where it
    has been read already.
    """
    if not MIN_SOUND_S <= duration_s <= MAX_SOUND_S:
        raise InvalidRequestError(
            f"sound: got {duration_s:.2f} s, expected {MIN_SOUND_S:g} to {MAX_SOUND_S:g} s of one voice; 3 to 15 s do"
        )
    if sound is None:
        return
    if not np.isfinite(sound).all():
        raise InvalidRequestError("sound: got samples that are NaN or infinite, expected finite numbers")
    if float(np.abs(sound).max()) < 1e-3:
        raise InvalidRequestError("sound: got silence (below -60 dB), expected a voice")


def _facts_if_there(path: Path) -> VoiceFacts | None:
    """None for a damaged file, for one that another process has removed meanwhile, and for a link to nothing."""
    try:
        return _read_facts(path)
    except (CheckpointError, FileNotFoundError) as error:
        if path.exists():
            logger.warning("%s", error)
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # as above
        return 0


def _read_facts(path: Path) -> VoiceFacts:
    """From the header alone; CheckpointError for anything that `VoiceStore.add` would not have written."""
    check_file(path)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            part = file.get_slice("sound")
            shape, dtype = part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if metadata.get("format") != FORMAT:
        raise _damaged(path, f"says the format {brief(metadata.get('format'))}, expected {FORMAT!r}")
    if dtype != "F32" or len(shape) != 1 or not MIN_SOUND_S <= shape[0] / SAMPLE_RATE <= MAX_SOUND_S:
        raise _damaged(path, f"holds {dtype} {shape}, expected F32 [{MIN_SOUND_S:g} to {MAX_SOUND_S:g} s]")
    return _facts_of(path, metadata, shape[0])


def _facts_of(path: Path, metadata: Mapping[str, str], num_samples: int) -> VoiceFacts:
    text, consent, created = metadata.get("text"), metadata.get("consent", ""), metadata.get("created", "")
    if not (0 < len(consent) <= MAX_CONSENT and len(text or "") <= MAX_TEXT and re.fullmatch(r"\d{1,12}", created)):
        raise _damaged(path, "says no consent, no date, or too long a text")
    return VoiceFacts(path.stem, text, consent, int(created), num_samples / SAMPLE_RATE, path.stat().st_size)


def _damaged(path: Path, words: str) -> CheckpointError:
    return CheckpointError(f"{path}: {words}; remove the file, and add the voice again")


def _checked_words(name: str, words: object, most: int) -> str | None:
    """Without space around them; None for none."""
    if words is None:
        return None
    if not isinstance(words, str) or len(words) > most:
        raise InvalidRequestError(f"{name}: got {brief(words)}, expected at most {most} characters")
    return words.strip() or None
