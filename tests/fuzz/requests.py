"""Odd requests: each is answered or refused, and the good request behind it is answered as if it had come alone."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutation import odd_value
from PIL import Image
from support.ar import make_model_folder
from support.odd_values import ODD

from vllm_omni import DiffusionParams, Omni, OmniOutput, OmniRequest, SamplingParams
from vllm_omni.config.loader import load_config
from vllm_omni.errors import OmniError
from vllm_omni.params import StageParams

SAMPLING = list(SamplingParams.__slots__)
DIFFUSION = list(DiffusionParams.__slots__)
PICTURE_KEYS = ["image", "mask", "strength"]
KEYS = [
    "prompt",
    "messages",
    "negative_prompt",
    "priority",
    "timeout_s",
    "request_id",
    "params",
    "images",
    "x",
    "speaker",
    *PICTURE_KEYS,
]
GOOD = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
FIELDS = [name for name in OmniRequest.__slots__ if name != "prompt"]
SMALL = {"max_tokens": 4}


class Requests:
    """A language model that writes and one that draws, in one config each."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = make_model_folder(Path(self._folder.name) / "model")
        stage = {"kind": "ar", "model": str(folder), "device": "cpu", "dtype": "float32", "kv_memory_mb": 4}
        self._text = Omni(load_config({"stages": {"text": stage}, "outputs": ["text"]}), progress=False)
        limits = {"max_pixels": 128 * 128, "max_inference_steps": 4, "max_outputs": 2}
        config = load_config("tiny_image", [f"limits.{key}={value}" for key, value in limits.items()])
        self._image = Omni(config, progress=False)
        self._expected = self._good().token_ids

    def __call__(self, random: Random) -> str:
        omni = self._text if random.random() < 0.8 else self._image
        outputs = omni.generate([_prompt(random)], _params(random, omni is self._image))
        for output in outputs:
            assert output.finished and (output.error is None or isinstance(output.error, OmniError))
            str(output.error).encode("utf-8")
        good = self._good()
        assert good.error is None and good.token_ids == self._expected, "the next request is answered otherwise"
        if outputs[0].error is not None:
            raise outputs.pop().error  # no local name keeps the error, whose frames keep the locals
        return "answered"

    def close(self) -> None:
        self._text.close()
        self._image.close()
        self._folder.cleanup()

    def _good(self) -> OmniOutput:
        return self._text.generate([[5, 6, 7, 8]], GOOD)[0]


def _value(random: Random) -> Any:
    return random.choice(ODD) if random.random() < 0.5 else odd_value(random)


def _prompt(random: Random) -> Any:
    form = random.random()
    if form < 0.2:
        return _value(random)
    if form < 0.35:
        return [random.choice([5, 6, -1, 10**9, 319, 320, 1.5, True, "x", None]) for _ in range(random.randrange(1, 6))]
    if form < 0.55:
        return [_message(random) for _ in range(random.randrange(1, 4))]
    given: dict[Any, Any] = {"prompt": random.choice(["red", [5, 6], _value(random)])}
    for _ in range(random.randrange(4)):
        given[random.choice([*KEYS, "k" * 5_000, 3, "\ud800"])] = _value(random)
    if form < 0.9:
        return given
    return OmniRequest(prompt="red", **{name: _value(random) for name in random.sample(FIELDS, random.choice([1, 2]))})


def _message(random: Random) -> Any:
    message: dict[Any, Any] = {"role": "user", "content": "red"}
    if random.random() < 0.6:
        message[random.choice(["role", "content", "name", "tool_calls", "x"])] = _value(random)
    if random.random() < 0.3:
        kind = random.choice(["text", "image", "audio", "video", "image_url", 3])
        message["content"] = [{"type": kind, str(kind): _value(random)}]
    return message


def _picture(random: Random) -> Any:
    """A small PNG, mostly with a few bytes changed."""
    file = io.BytesIO()
    sides = (random.choice([1, 16, 33, 64]), random.choice([16, 40]))
    Image.new(random.choice(["RGB", "RGBA", "L", "P", "1", "I;16"]), sides).save(file, "PNG")
    content = bytearray(file.getvalue())
    for _ in range(random.choice([0, 1, 3])):
        content[random.randrange(len(content))] = random.randrange(256)
    return bytes(content)


def _params(random: Random, is_image: bool) -> Any:
    if random.random() < 0.1:
        return _value(random)
    kind: type[StageParams] = DiffusionParams if is_image != (random.random() < 0.1) else SamplingParams
    names = DIFFUSION if kind is DiffusionParams else SAMPLING
    given: dict[str, Any] = {"num_inference_steps": 1} if kind is DiffusionParams else dict(SMALL)
    for _ in range(random.choice([0, 1, 1, 2, 3])):
        name = random.choice(names)
        given[name] = random.choice([_value(random), random.choice([0, 1, 2, 0.5, "a", [1], [0.5]])])
        if name in PICTURE_KEYS and random.random() < 0.5:
            given["image"] = _picture(random)
    made = kind(**given)
    return {random.choice(["text", "image", "x", 3]): made} if random.random() < 0.1 else made
