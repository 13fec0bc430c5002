"""What comes into a stage as sound: from whatever a caller passes to samples at the rate and channels of a model.

Headers are read first, and every limit is checked before a sample is decoded; then blocks are decoded, mixed and
resampled one after the other, so that memory follows the result, not the source.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soxr
import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, Audio
from vllm_omni.media.audio_containers import ContainerAudioReader
from vllm_omni.media.audio_files import BLOCK_FRAMES, AudioHeader, AudioReader, Samples, UnreadableSoundError
from vllm_omni.media.mixing import check_channels, mixed
from vllm_omni.media.source_files import caller_media, check_num_bytes, num_bytes_of, open_source_file
from vllm_omni.utils.checks import check_number, did_you_mean, number_complaint

# Full scale of integer samples, and what they hold at rest.
INTEGER_SCALES = {"int16": (2.0**15, 0.0), "int32": (2.0**31, 0.0), "uint8": (2.0**7, 2.0**7)}
FLOATS = ("float16", "float32", "float64")
RATE_KEYS = ("sampling_rate", "sample_rate")
ARRAY_KEYS = frozenset({"array", *RATE_KEYS, "path"})  # `path` stands there in what `datasets` gives
MAX_SAMPLE = 8.0  # 18 dB above full scale: what is louder was never divided
SOURCES = (
    "a path, the bytes of a file, an Audio, (array, sampling rate) or {'array': ..., 'sampling_rate': ...}; arrays are "
    "numpy, torch or lists of floats, [n] or [channels, n]"
)


@caller_media()
def check_audio(source: object, *, channels: int, limits: LimitsConfig, name: str) -> float:
    """Everything that can be checked without decoding -> seconds of the source. Arguments as `read_audio`."""
    with ExitStack() as stack:
        return _opened(source, channels, limits, name, stack).header.duration_s


@caller_media()
def read_audio(
    source: object,
    *,
    sample_rate: int,
    channels: int,
    limits: LimitsConfig,
    name: str,
    stop: Callable[[], None] = lambda: None,
) -> Samples:
    """The samples of a source, float32 [channels, n] at `sample_rate` Hz.

    source: see SOURCES; a path or bytes hold any container that libsndfile or FFmpeg reads, also that of a film. One
    channel is repeated into several, up to eight are mixed into two or one (`mixing`), other differences are refused.
    Integer arrays (int16, int32, uint8) are scaled to full scale; floats far beyond it are refused. Rates are converted
    by soxr, quality HQ. name: how messages call the source. stop: called before every block, raises where nobody wants
    the samples any more. InvalidRequestError for anything that cannot be read, is longer or larger than `limits`, or
    holds samples that are not finite.
    """
    with ExitStack() as stack:
        sound = _opened(source, channels, limits, name, stack)
        blocks = (mixed(block, channels) for block in _checked(sound.blocks(), name, stop))
        rate = sound.header.sample_rate
        parts = list(blocks if rate == sample_rate else _resampled(blocks, rate, sample_rate, channels))
    samples = np.ascontiguousarray(np.concatenate([*parts, np.empty((0, channels), np.float32)]).T)
    if not samples.shape[1]:
        raise InvalidRequestError(
            f"{name}: got {sound.header.num_frames} samples at {rate} Hz, expected at least one at {sample_rate} Hz"
        )
    return samples


class _Sound(ABC):
    """A source that is open: its header, and its samples as float32 [frames, channels] blocks."""

    header: AudioHeader

    @abstractmethod
    def check_whole(self) -> None:
        """Raises where the source shows without decoding that it is not what its header says."""

    @abstractmethod
    def blocks(self) -> Iterator[Samples]: ...


class _ArraySound(_Sound):
    """samples: [channels, n], of a dtype that is known."""

    def __init__(self, samples: npt.NDArray[Any], sample_rate: int) -> None:
        self._samples = samples
        self.header = AudioHeader(sample_rate, *samples.shape)

    def check_whole(self) -> None: ...

    def blocks(self) -> Iterator[Samples]:
        scale, rest = INTEGER_SCALES.get(self._samples.dtype.name, (1.0, 0.0))
        for start in range(0, self.header.num_frames, BLOCK_FRAMES):
            block = self._samples[:, start : start + BLOCK_FRAMES].T
            if self._samples.dtype.name in INTEGER_SCALES:
                block = (block.astype(np.float64) - rest) / scale
            with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite, which is refused
                block = block.astype(np.float32)
            yield block


class _FileSound(_Sound):
    def __init__(self, reader: AudioReader | ContainerAudioReader) -> None:
        self._reader = reader
        self.header = reader.header

    def check_whole(self) -> None:
        self._reader.check_whole()

    def blocks(self) -> Iterator[Samples]:
        return self._reader.blocks()


def _opened(source: object, channels: int, limits: LimitsConfig, name: str, stack: ExitStack) -> _Sound:
    """The source, within its limits; what was opened for it is closed by `stack`."""
    if isinstance(source, str | os.PathLike):
        sound = _open_file(source, limits, name, stack)
    elif isinstance(source, bytes | bytearray | memoryview):
        _check_size(memoryview(source).nbytes, limits, name)
        sound = _FileSound(_reader(io.BytesIO(source), name, stack))
    else:
        sound = _open_array(source, limits, name)
    _check_header(sound.header, channels, limits, name)
    sound.check_whole()
    return sound


def _open_file(source: str | os.PathLike[str], limits: LimitsConfig, name: str, stack: ExitStack) -> _Sound:
    file = stack.enter_context(open_source_file(source, name, "a sound file"))
    _check_size(num_bytes_of(file), limits, name)
    return _FileSound(_reader(file, name, stack))


def _reader(file: BinaryIO, name: str, stack: ExitStack) -> AudioReader | ContainerAudioReader:
    """libsndfile where it can: it is exact where FFmpeg adds or cuts what encoders pad with."""
    try:
        return stack.enter_context(AudioReader(file, name))
    except UnreadableSoundError:
        file.seek(0)
        return stack.enter_context(ContainerAudioReader(file, name))


def _open_array(source: object, limits: LimitsConfig, name: str) -> _Sound:
    array, rate = _parted(source, name)
    check_number(
        f"{name}: sampling rate",
        rate,
        MIN_SAMPLE_RATE,
        MAX_SAMPLE_RATE,
        integer=True,
        raises=InvalidRequestError,
        hint=" (Hz)",
    )
    if isinstance(array, list | tuple):
        array = _listed(array, limits, name)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if not isinstance(array, np.ndarray):
        raise InvalidRequestError(f"{name}: got an array of type {type(array).__name__}, expected {SOURCES}")
    if array.dtype.name not in (*FLOATS, *INTEGER_SCALES):
        raise InvalidRequestError(
            f"{name}: got an array of {array.dtype.name}, expected {', '.join((*FLOATS, *INTEGER_SCALES))}"
        )
    if array.ndim not in (1, 2):
        raise InvalidRequestError(f"{name}: got the shape {list(array.shape)}, expected [n] or [channels, n]")
    _check_size(array.nbytes, limits, name)
    return _ArraySound(np.atleast_2d(array), int(rate))


def _listed(values: list[Any] | tuple[Any, ...], limits: LimitsConfig, name: str) -> npt.NDArray[Any]:
    """An array of a list of samples, or of one list for each channel."""
    rows = values if values and isinstance(values[0], list | tuple) else [values]
    _check_size(sum(len(row) for row in rows if isinstance(row, list | tuple)) * 8, limits, name)
    try:
        return np.asarray(values)
    except Exception:  # lists of several lengths, or whatever foreign values raise
        raise InvalidRequestError(
            f"{name}: got a list that is no array, expected floats, or a list of as many floats for each channel"
        ) from None


def _parted(source: object, name: str) -> tuple[Any, Any]:
    """The array and the rate of an Audio, a pair or a mapping."""
    if isinstance(source, Audio):
        return source.samples, source.sample_rate
    if isinstance(source, tuple | list) and len(source) == 2 and _is_pair(source):
        return source[0], source[1]
    if isinstance(source, Mapping) and "array" in source and any(key in source for key in RATE_KEYS):
        for key in source:
            if key not in ARRAY_KEYS:
                raise InvalidRequestError(f"{name}[{key!r}]: unknown key{did_you_mean(str(key), ARRAY_KEYS)}")
        return source["array"], next(source[key] for key in RATE_KEYS if key in source)
    keys = f" with the keys {sorted(map(str, source))}" if isinstance(source, Mapping) else ""
    if isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        keys = " without its rate"
    raise InvalidRequestError(f"{name}: got {type(source).__name__}{keys}, expected {SOURCES}")


def _is_pair(source: tuple[Any, ...] | list[Any]) -> bool:
    """Rather than a list of two samples, or of two channels."""
    return isinstance(source, tuple) or (
        number_complaint("", source[0]) is not None and number_complaint("", source[1]) is None
    )


def _check_size(num_bytes: int, limits: LimitsConfig, name: str) -> None:
    check_num_bytes(num_bytes, limits.max_audio_mb, name, "max_audio_mb")


def _check_header(header: AudioHeader, channels: int, limits: LimitsConfig, name: str) -> None:
    check_number(
        f"{name}: sample rate",
        header.sample_rate,
        MIN_SAMPLE_RATE,
        MAX_SAMPLE_RATE,
        raises=InvalidRequestError,
        hint=" (Hz)",
    )
    check_channels(header.num_channels, channels, name)
    if header.num_frames < 1:
        raise InvalidRequestError(f"{name}: got a sound of no length, expected at least one sample")
    if header.duration_s > limits.max_audio_s:
        raise InvalidRequestError(
            f"{name}: got {header.duration_s:.2f} s, expected at most {limits.max_audio_s:g} s (limits.max_audio_s); "
            "cut it"
        )


def _checked(blocks: Iterator[Samples], name: str, stop: Callable[[], None]) -> Iterator[Samples]:
    for block in blocks:
        stop()
        if not np.isfinite(block).all():
            raise InvalidRequestError(f"{name}: got samples that are NaN or infinite, expected finite numbers")
        if len(block) and np.abs(block).max() > MAX_SAMPLE:
            raise InvalidRequestError(
                f"{name}: got samples up to {np.abs(block).max():g}, expected -1 to 1 at full scale; divide them "
                "(those of 16 bit by 32768), or give an array of integers as it is"
            )
        yield block


def _resampled(blocks: Iterator[Samples], source_rate: int, target_rate: int, channels: int) -> Iterator[Samples]:
    resampler = soxr.ResampleStream(source_rate, target_rate, channels, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(np.ascontiguousarray(block))
    yield resampler.resample_chunk(np.empty((0, channels), np.float32), last=True)
