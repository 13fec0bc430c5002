"""Where `vllm-omni generate -o` puts pictures, text and tensors. Knows outputs and names of files, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_omni.errors import ConfigError
from vllm_omni.request import OmniOutput

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULT_FILE = "out.png"


class OutputFiles:
    """A picture file (out.png; several become out-0.png, out-1.png, ...) or a folder, which takes text and tensors too.

    In a folder the n-th prompt's files are n.png (n-0.png, n-1.png, ... when it has several), n.txt and n.safetensors.
    """

    def __init__(self, target: str | None) -> None:
        """target: a name without a suffix is a folder. ConfigError for a suffix that is no picture's."""
        self._is_given = target is not None
        self._path = Path(target or DEFAULT_FILE).expanduser()
        self._is_folder = target is not None and (target.endswith("/") or self._path.is_dir() or not self._path.suffix)
        if not self._is_folder and self._path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ConfigError(
                f"-o: got {target!r}, expected a folder or a file that ends in {', '.join(IMAGE_SUFFIXES)}"
            )

    def write(self, outputs: Sequence[OmniOutput]) -> list[Path]:
        """Writes what there is and returns the files; ConfigError when a file was asked for and there is no picture."""
        folder = self._path if self._is_folder else self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return self._write_folder(outputs) if self._is_folder else self._write_images(outputs)
        except OSError as error:
            raise ConfigError(
                f"-o: {error.filename or folder} cannot be written ({error.strerror or error})"
            ) from error

    def _write_images(self, outputs: Sequence[OmniOutput]) -> list[Path]:
        images = [image for output in outputs for image in output.images]
        if not images and self._is_given and all(output.error is None for output in outputs):
            raise ConfigError(
                f"-o: got {str(self._path)!r}, but no stage in `outputs` draws; give a folder to keep text"
            )
        paths = [self._path]
        if len(images) != 1:
            paths = [self._path.with_stem(f"{self._path.stem}-{index}") for index in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        return paths

    def _write_folder(self, outputs: Sequence[OmniOutput]) -> list[Path]:
        written: list[Path] = []
        for index, output in enumerate(outputs):
            stems = [f"{index}-{n}" for n in range(len(output.images))] if len(output.images) > 1 else [str(index)]
            for stem, image in zip(stems, output.images, strict=False):
                written.append(self._path / f"{stem}.png")
                image.save(written[-1])
            if output.completions:
                written.append(self._path / f"{index}.txt")
                written[-1].write_text("\n".join(item.text for item in output.completions) + "\n", encoding="utf-8")
            if output.tensors:
                from safetensors.torch import save_file

                written.append(self._path / f"{index}.safetensors")
                save_file({name: tensor.contiguous() for name, tensor in output.tensors.items()}, str(written[-1]))
        return written
