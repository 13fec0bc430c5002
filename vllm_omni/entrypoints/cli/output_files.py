"""Where `vllm-omni generate -o` puts images, audio, text and tensors. Knows outputs and file names, no engine."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vllm_omni.entrypoints.cli.as_json import output_as_json
from vllm_omni.errors import ConfigError
from vllm_omni.request import OmniOutput
from vllm_omni.utils.files import user_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl")
DEFAULT_STEM = "out"


class Saveable(Protocol):
    """A picture or a sound."""

    def save(self, path: Path, /) -> None: ...


class OutputFiles:
    """A file or a folder for what a call gives.

    A file (out.png, out.wav) names the kind that is asked for; audio beside images goes to a file of the same stem, and
    several of a kind are numbered: out-0.png, out-1.png. All text goes into one file: out.txt holds nothing else,
    out.json a list, and out.jsonl lines of an object for every prompt. In a folder, which takes tensors too, the n-th
    prompt's files are n.png, n.wav (n-0.png, n-1.png, ... when it has several), n.txt and n.safetensors.
    """

    def __init__(self, target: str | None) -> None:
        """target: a name without a suffix is a folder; None: out.png and out.wav. ConfigError for another suffix."""
        self._target = target
        self._path = user_path("-o", target or DEFAULT_STEM, raises=ConfigError)
        self._suffix = self._path.suffix.lower()
        self._is_folder = target is not None and (target.endswith("/") or _is_folder(self._path) or not self._suffix)
        known = IMAGE_SUFFIXES + AUDIO_SUFFIXES + TEXT_SUFFIXES
        if target is not None and not self._is_folder and self._suffix not in known:
            raise ConfigError(f"-o: got {target!r}, expected a folder or a file that ends in {', '.join(known)}")

    def ensure_writable(self) -> None:
        """Before the work: ConfigError where the place that was asked for could not be written."""
        if self._target is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._path.stat()  # which says that a name is too long
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, outputs: Sequence[OmniOutput], prompts: Sequence[str] = ()) -> list[Path]:
        """Writes what there is and returns the files; ConfigError when a file was asked for that nothing goes into.

        prompts: of these outputs; .json and .jsonl hold them.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._is_folder:
                return [path for index, output in enumerate(outputs) for path in self._write_output(index, output)]
            return [*self._write_text(outputs, prompts), *self._write_files(outputs)]
        except OSError as error:
            raise self._cannot_write(error) from error

    @property
    def _folder(self) -> Path:
        return self._path if self._is_folder else self._path.parent

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(f"-o: {error.filename or self._folder} cannot be written ({error.strerror or error})")

    def _write_text(self, outputs: Sequence[OmniOutput], prompts: Sequence[str]) -> list[Path]:
        if self._suffix not in TEXT_SUFFIXES:
            return []
        if not any(output.completions or output.error is not None for output in outputs):
            raise ConfigError(f"-o: got {self._target!r}, but no answer holds text; give a folder for all kinds")
        if self._suffix == ".txt":
            lines = [completion.text for output in outputs for completion in output.completions]
        else:
            answers = [output_as_json(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
            lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
            lines = lines if self._suffix == ".jsonl" else [json.dumps(answers, ensure_ascii=False, indent=2)]
        self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [self._path]

    def _write_files(self, outputs: Sequence[OmniOutput]) -> list[Path]:
        written: list[Path] = []
        for kind, suffixes, found in (
            ("an image", IMAGE_SUFFIXES, [image for output in outputs for image in output.images]),
            ("audio", AUDIO_SUFFIXES, [audio for output in outputs for audio in output.audios]),
        ):
            is_asked = self._suffix in suffixes
            if is_asked and not found and all(output.error is None for output in outputs):
                raise ConfigError(f"-o: got {self._target!r}, but no answer holds {kind}; give a folder for all kinds")
            path = self._path if is_asked else self._path.with_suffix(suffixes[0])
            written += _save_all(found, path)
        return written

    def _write_output(self, index: int, output: OmniOutput) -> list[Path]:
        """Everything that one prompt has given."""
        written = _save_all(output.images, self._path / f"{index}.png")
        written += _save_all(output.audios, self._path / f"{index}.wav")
        if output.completions:
            written.append(self._path / f"{index}.txt")
            written[-1].write_text("\n".join(item.text for item in output.completions) + "\n", encoding="utf-8")
        if output.tensors:
            from safetensors.torch import save_file

            written.append(self._path / f"{index}.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in output.tensors.items()}, str(written[-1]))
        return written


def _is_folder(path: Path) -> bool:
    """Of a name that no file could have as well."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _save_all(items: Sequence[Saveable], path: Path) -> list[Path]:
    """Saves pictures or sounds as `path`, or numbered when they are not just one."""
    paths = [path]
    if len(items) != 1:
        paths = [path.with_stem(f"{path.stem}-{number}") for number in range(len(items))]
    for item, own_path in zip(items, paths, strict=True):
        item.save(own_path)
    return paths
