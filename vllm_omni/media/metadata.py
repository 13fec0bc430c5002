"""What a made file says of how it was made, as the text that programs for pictures know as `parameters`: the prompt, a
line `Negative prompt: ...`, and a last line `Steps: 9, Seed: 7, Size: 512x512, ...`. Knows no file format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni import __version__
from vllm_omni.params import DiffusionParams, StageParams, sample_seed
from vllm_omni.request import OmniOutput

if TYPE_CHECKING:
    from PIL.Image import Image

    from vllm_omni.media.audio import Audio
    from vllm_omni.media.video import Video

VERSION = f"vllm-omni {__version__}"
NEGATIVE = "Negative prompt:"
# what the readers call our parameters; others keep their own name
LABELS = {
    "num_inference_steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "strength": "Denoising strength",
    "model": "Model",
    "version": "Version",
}
NAMES = {label: name for name, label in LABELS.items()}
# not of one sample, or said otherwise
UNSAID = frozenset(
    {
        "seed",
        "n",
        "num_outputs",
        "num_previews",
        "height",
        "width",
        "negative_prompt",
        "output_type",
        "extra",
        "image",
        "mask",
    }
)
MIN_SETTINGS = 3  # fewer are taken for words of the prompt, unless they say our version
MAX_VALUE_CHARS = 1_000  # a longer value is left out
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaMetadata:
    """How one picture, sound or video was made."""

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None  # which makes this sample alone again
    model: str | None = None  # a hub id, or the name of a folder
    version: str | None = None  # of the program that made it
    parameters: Mapping[str, Any] = field(default_factory=dict)  # plain values by name: num_inference_steps, size, ...

    @classmethod
    def of(
        cls,
        output: OmniOutput,
        stage: str,
        index: int,
        *,
        model: str | None,
        sample: Image | Audio | Video | None = None,
        prompt: str | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> MediaMetadata:
        """Of sample `index` of an output stage.

        model: as the config names it; of a local folder only its name is said. sample: of a picture or a video its
        size is said. prompt: None where the file is not to say it. inputs: what else the request asked.
        """
        params, metrics = output.params.get(stage), output.metrics.get(stage, {})
        found = dict(_plain_parameters(params))
        if isinstance(params, DiffusionParams):
            num_steps = metrics.get("steps", 0) // (params.num_outputs or 1)
            found |= {"num_inference_steps": num_steps} if num_steps else {}
        found |= _measures(sample)
        others = dict(inputs or {})
        negative = getattr(params, "negative_prompt", None) or others.pop("negative_prompt", None)
        found.update((name, value) for name, value in others.items() if _is_plain(value))
        seed = metrics.get("seed")
        return cls(
            prompt=prompt,
            negative_prompt=None if prompt is None else negative,
            seed=None if seed is None else sample_seed(seed, index),
            model=None if model is None else _model_name(model),
            version=VERSION,
            parameters=found,
        )

    @classmethod
    def parse(cls, text: str) -> MediaMetadata:
        """The reverse of `to_text`; of text without such lines, all of it is the prompt."""
        words, _, last = text.rpartition("\n")
        found = {NAMES.get(label, label): value for label, value in _settings(last)}
        if "version" not in found and len(found) < MIN_SETTINGS:
            words, found = text, {}
        start = max(words.rfind(f"\n{NEGATIVE}"), 0 if words.startswith(NEGATIVE) else -1)
        prompt, negative = (
            (words, "") if start < 0 else (words[:start], words[start:].removeprefix("\n")[len(NEGATIVE) :])
        )
        seed, model, version = (found.pop(name, None) for name in ("seed", "model", "version"))
        return cls(
            prompt=prompt or None,
            negative_prompt=negative.removeprefix(" ") or None,
            seed=seed if isinstance(seed, int) else None,
            model=None if model is None else str(model),
            version=None if version is None else str(version),
            parameters=found,
        )

    def to_text(self) -> str:
        """In characters that every format holds."""
        lines = [] if self.prompt is None else [self.prompt]
        if self.negative_prompt or (self.prompt and NEGATIVE in self.prompt):  # the last such line is read
            lines.append(f"{NEGATIVE} {self.negative_prompt or ''}")
        said = {"seed": self.seed, **self.parameters}
        names = [*(name for name in LABELS if name in said), *(name for name in said if name not in LABELS)]
        said |= {"model": self.model, "version": self.version}
        settings = [(LABELS.get(name, name), _as_text(said[name])) for name in [*names, "model", "version"]]
        lines.append(", ".join(f"{label}: {value}" for label, value in settings if value is not None))
        return "\n".join(lines).replace("\0", "").encode("utf-8", "backslashreplace").decode("utf-8")

    def shortened(self, max_chars: int) -> MediaMetadata:
        """With at most so many characters of each prompt."""
        return replace(
            self,
            prompt=None if self.prompt is None else self.prompt[:max_chars],
            negative_prompt=None if self.negative_prompt is None else self.negative_prompt[:max_chars],
        )


def _measures(sample: Image | Audio | Video | None) -> dict[str, Any]:
    """How large it is, which need not be what was asked for."""
    from PIL.Image import Image

    from vllm_omni.media.video import Video

    if isinstance(sample, Video):
        fps = int(sample.fps) if float(sample.fps).is_integer() else sample.fps
        return {"size": f"{sample.width}x{sample.height}", "num_frames": sample.num_frames, "fps": fps}
    return {"size": f"{sample.width}x{sample.height}"} if isinstance(sample, Image) else {}


def _plain_parameters(params: StageParams | None) -> Iterator[tuple[str, Any]]:
    """Those that are set, and can be written."""
    if params is None:
        return
    for item in fields(params):
        value = getattr(params, item.name)
        if item.name == "lora" and value is not None:
            value = [lora.label for lora in value]
        if value is not None and item.name not in UNSAID and _is_plain(value):
            yield item.name, value
    for name, value in (getattr(params, "extra", None) or {}).items():
        if _is_plain(value):
            yield name, value


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _model_name(model: str) -> str:
    """Nobody's folders stand in what is passed on."""
    return Path(model).name if Path(model).expanduser().exists() else model


def _as_text(value: object) -> str | None:
    """A value between commas, quoted where it would end too early, or be read as something else. None where there is
    none, or it is too long.
    """
    if isinstance(value, str):
        is_bare = value == value.strip() and value and not any(char in value for char in ',:\n"')
        text = value if is_bare and _bare_value(value) == value else json.dumps(value, ensure_ascii=False)
    else:
        text = json.dumps(json.dumps(value) if isinstance(value, list | tuple) else value)
    return None if value is None or len(text) > MAX_VALUE_CHARS else text


def _settings(line: str) -> Iterator[tuple[str, Any]]:
    for label, text in _SETTING.findall(line):
        yield label, _quoted_value(text) if text.startswith('"') else _bare_value(text.strip())


def _quoted_value(text: str) -> Any:
    """A string, or the list that stands in it."""
    try:
        inner = json.loads(text)
        value = json.loads(inner) if inner.startswith("[") else inner
    except (ValueError, RecursionError):
        return text
    return value


def _bare_value(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float) else text
