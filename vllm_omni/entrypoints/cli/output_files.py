"""Where `vllm-omni generate -o` puts images, audio, videos, text and tensors. Knows outputs and file names alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from vllm_omni.entrypoints.cli.output_contents import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    VIDEO_SUFFIXES,
    Provenance,
    check_can_be_written,
    media_content,
    tensors_content,
    text_content,
)
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.request import OmniOutput
from vllm_omni.utils.files import user_path, write_whole

DEFAULT_STEM = "out"
# kind of result -> its suffixes, the first of them where none is asked for
SUFFIXES = {"image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES, "video": VIDEO_SUFFIXES, "text": TEXT_SUFFIXES}
KNOWN_SUFFIXES = tuple(dict.fromkeys(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
WORDS = {"image": "an image", "audio": "audio", "video": "a video", "text": "text"}
MEDIA = ("image", "audio", "video")
MAX_REFUGE_NAME = 100  # characters that are kept of a name which may be too long


class OutputFiles:
    """A file or a folder for what a call gives.

    A file (out.png, out.wav, out.mp4) names the kind that is asked for; audio beside images goes to a file of the same
    stem. A .webp is a picture where the config makes pictures. All text goes into one file: out.txt holds nothing else,
    out.json a list, and out.jsonl lines of an object for every prompt. In a folder, which takes tensors too, the n-th
    prompt's files are n.png, n.wav, n.mp4, n.txt and n.safetensors.

    Names say what a file is, and are the same whatever else ran: out-1-sketch-0.png is of the prompt 1 (where there are
    several), the stage `sketch` (where several give images), and its sample 0 (where it gives several).

    Every file is whole or not there. What cannot be written where it should is put into a temporary folder, and the
    error names it.
    """

    def __init__(self, target: str | None) -> None:
        """target: a name without a suffix is a folder; None: out.png, out.wav and out.mp4. ConfigError for another
        suffix.
        """
        self._target = target
        self._path = user_path("-o", target or DEFAULT_STEM, raises=ConfigError)
        self._suffix = self._path.suffix.lower()
        self._is_folder = target is not None and (target.endswith("/") or _is_folder(self._path) or not self._suffix)
        self._results: Mapping[str, Collection[str]] = {}
        self._provenance = Provenance()
        self._complaints: list[str] = []
        self._refuge: Path | None = None  # the temporary folder for what cannot be written
        if target is not None and not self._is_folder and self._suffix not in KNOWN_SUFFIXES:
            known = ", ".join(KNOWN_SUFFIXES)
            raise ConfigError(f"-o: got {target!r}, expected a folder or a file that ends in {known}")

    def expect(self, results: Mapping[str, Collection[str]]) -> None:
        """Before the work: which stages give which kinds of results. ConfigError for a file of a kind that none gives,
        and for a place that cannot be written where they need one.
        """
        self._results = results
        given = self._given
        asked = self._asked_kind
        if asked is not None and asked not in given:
            kinds = ", ".join(sorted(given)) or "tensors alone"
            raise ConfigError(f"-o: got {self._target!r}, but the config gives {kinds}; give a folder for all kinds")
        if asked is not None:
            try:
                check_can_be_written(asked, self._suffix)
            except InvalidRequestError as error:
                raise ConfigError(f"-o: got {self._target!r}: {error}") from error
        if self._target is None and given & set(MEDIA):
            self._check_place()

    def ensure_writable(self) -> None:
        """Before the work: ConfigError where the place that was asked for could not be written."""
        if self._target is not None:
            self._check_place()

    def write(
        self,
        outputs: Sequence[OmniOutput],
        prompts: Sequence[str] = (),
        provenance: Provenance | None = None,
        announce: Callable[[Path], None] = lambda path: None,
    ) -> list[Path]:
        """Writes what there is and returns the files; announce: called with each. ConfigError when a file was asked for
        that nothing goes into, and where something had to go elsewhere; all else is written before that.

        prompts: of these outputs; .json, .jsonl and the files' metadata hold them.
        """
        self._complaints, self._refuge = [], None
        self._provenance = Provenance() if provenance is None else provenance
        written = []
        for path, content in (self._in_folder if self._is_folder else self._in_files)(outputs, prompts):
            if self._save(path, content):
                written.append(path)
                announce(path)
        if self._complaints:
            raise ConfigError(f"-o: {'; '.join(dict.fromkeys(self._complaints))}")
        return written

    @property
    def _folder(self) -> Path:
        return self._path if self._is_folder else self._path.parent

    @property
    def _asked_kind(self) -> str | None:
        """The kind of the file that was asked for; of several with that suffix the first that the config gives."""
        if self._target is None or self._is_folder:
            return None
        kinds = [kind for kind, suffixes in SUFFIXES.items() if self._suffix in suffixes]
        return next((kind for kind in kinds if kind in self._given), kinds[0])

    @property
    def _given(self) -> set[str]:
        """The kinds that the config gives."""
        return {kind for kinds in self._results.values() for kind in kinds}

    def _check_place(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._path.stat()  # which says that a name is too long
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ConfigError(self._cannot_write(self._folder, error)) from error

    def _cannot_write(self, path: Path, error: OSError) -> str:
        reason = "a file stands in the place of a folder" if isinstance(error, FileExistsError) else error.strerror
        return f"{path} cannot be written ({reason or error})"

    def _save(self, path: Path, content: bytes) -> bool:
        """Whether it stands where it should; else it is elsewhere, and a complaint says where."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
            return True
        except OSError as error:
            complaint = self._cannot_write(path, error)
        try:
            self._refuge = self._refuge or Path(tempfile.mkdtemp(prefix="vllm-omni-"))
            refuge = self._refuge / path.name[-MAX_REFUGE_NAME:]
            write_whole(refuge, content)
            self._complaints.append(f"{complaint}; it is in {refuge} instead")
        except OSError as error:
            self._complaints.append(f"{complaint}, nor in {tempfile.gettempdir()} ({error.strerror}): it is lost")
        return False

    def _in_files(self, outputs: Sequence[OmniOutput], prompts: Sequence[str]) -> Iterator[tuple[Path, bytes]]:
        kind = self._asked_kind
        found = {each for output in outputs for each in _kinds(output)}
        has_failed = any(output.error is not None for output in outputs)
        if kind is not None and kind not in found and not has_failed:
            self._complaints.append(
                f"got {self._target!r}, but no answer holds {WORDS[kind]}; give a folder for all kinds"
            )
        elif kind == "text":
            yield self._path, text_content(outputs, prompts, self._suffix)
        for each in MEDIA:
            path = self._path.with_suffix(self._suffix if each == kind else SUFFIXES[each][0])
            for number in range(len(outputs)):
                own = path.with_stem(f"{path.stem}-{number}") if len(outputs) > 1 else path
                yield from self._media(each, own, number, outputs, prompts)

    def _in_folder(self, outputs: Sequence[OmniOutput], prompts: Sequence[str]) -> Iterator[tuple[Path, bytes]]:
        for number, output in enumerate(outputs):
            for kind in MEDIA:
                yield from self._media(kind, self._path / f"{number}{SUFFIXES[kind][0]}", number, outputs, prompts)
            if output.completions:
                yield self._path / f"{number}.txt", text_content([output], (), ".txt")
            if output.tensors:
                yield self._path / f"{number}.safetensors", tensors_content(output)

    def _media(
        self, kind: str, path: Path, number: int, outputs: Sequence[OmniOutput], prompts: Sequence[str]
    ) -> Iterator[tuple[Path, bytes]]:
        """The pictures, sounds or videos of one output."""
        giving = {stage for stage, kinds in self._results.items() if kind in kinds} or {
            stage for output in outputs for stage, result in output.results.items() if getattr(result, f"{kind}s")
        }
        prompt = prompts[number] if prompts else None
        for stage, result in outputs[number].results.items():
            items = getattr(result, f"{kind}s")
            for index, item in enumerate(items):
                ending = f"-{stage}" * (len(giving) > 1) + f"-{index}" * (len(items) > 1)
                metadata = self._provenance.metadata(outputs[number], prompt, stage, index, item)
                content, suffix, complaint = media_content(kind, item, path.suffix.lower(), metadata)
                if complaint:
                    self._complaints.append(complaint)
                own = path.with_stem(path.stem + ending)
                yield own if suffix == path.suffix.lower() else own.with_suffix(suffix), content


def _kinds(output: OmniOutput) -> Iterator[str]:
    found = {"image": output.images, "audio": output.audios, "video": output.videos, "text": output.completions}
    return (kind for kind, items in found.items() if items)


def _is_folder(path: Path) -> bool:
    """Of a name that no file could have as well."""
    try:
        return path.is_dir()
    except OSError:
        return False
