"""What a notebook shows of an answer: everything there is, nothing that could run, and never too much."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from vllm_omni import Audio
from vllm_omni.errors import StageError
from vllm_omni.request import Completion, OmniOutput, RequestStatus, StageResult


def shown(status: RequestStatus = RequestStatus.FINISHED, **fields: Any) -> str:
    return OmniOutput(request_id="r", status=status, **fields)._repr_html_()


def text(words: str) -> StageResult:
    return StageResult(completions=(Completion(text=words, token_ids=(), finish_reason="stop"),))


def test_texts_pictures_and_sounds_are_there() -> None:
    picture, tone = Image.new("RGB", (900, 300), (7, 8, 9)), Audio(np.full((1, 800), 0.25, np.float32), 8000)
    found = shown(
        results={"writer": text("hello"), "image": StageResult(images=(picture,)), "song": StageResult(audios=(tone,))},
        metrics={"image": {"seed": 7}},
        tensors={"writer.states": torch.zeros(3, 4)},
    )
    assert ">hello</pre>" in found and "seed 7" in found and "writer.states: [3, 4]" in found
    image = re.search(r'src="data:image/png;base64,([^"]+)"', found)
    sound = re.search(r'<audio controls src="data:audio/wav;base64,([^"]+)"', found)
    assert image and sound
    small = Image.open(io.BytesIO(base64.b64decode(image[1])))
    assert small.size == (512, 171) and small.getpixel((3, 3)) == (7, 8, 9) and picture.size == (900, 300)
    assert np.allclose(soundfile.read(io.BytesIO(base64.b64decode(sound[1])))[0], 0.25)


def test_nothing_that_somebody_wrote_is_markup() -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    found = shown(RequestStatus.FAILED, results={bad: text(bad)}, error=StageError(bad), tensors={bad: torch.zeros(1)})
    assert "<script" not in found and "<img" not in found and found.count("&lt;script&gt;") == 4
    assert "StageError: " in found


def test_the_size_is_bounded() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    long = Audio(np.random.default_rng(0).uniform(-1, 1, (2, 110 * 48_000)).astype(np.float32), 48_000)
    many = StageResult(
        completions=text("x" * 1_000_000).completions * 40, images=(Image.fromarray(noise),) * 40, audios=(long,) * 3
    )
    found = shown(results={"all": many})
    assert len(found) < 8_500_000 and "and 24 more" in found and "too much to show here" in found
    assert "(1000000 characters)" in found and "Audio(110.00 s, stereo, 48000 Hz)" in found


def test_modes_that_no_png_holds_and_empty_answers_are_shown() -> None:
    odd = StageResult(images=(Image.new("CMYK", (4, 4)), Image.new("F", (4, 4))))
    assert "4x4" in shown(results={"image": odd})
    assert "rejected" in shown(RequestStatus.REJECTED, error=StageError("no"))
