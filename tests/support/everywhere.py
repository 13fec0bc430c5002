"""One graph of whole pipelines that is run by every executor: words to text to a picture, text to speech that is
streamed from stage to stage, words to a tune. Who compares the results needs the same number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from vllm_omni import OmniOutput
from vllm_omni.config.shipped import shipped_configs

SCENE, SPEECH, TUNE = ("writer", "image"), ("thinker", "token2wav"), ("planner", "sound")
COUNTS = ("steps", "tokens", "prompt_tokens", "seed", "skipped", "reason")  # of a stage's metrics; no times
APART = ("writer", "teller", "image", "talker", "token2wav", "sound_prompt")  # the others are in the loop's process


def everywhere_config(**changes: Any) -> dict[str, Any]:
    """Stages of three shipped configs in one."""
    stages = {**_stages("tiny_scene"), **_stages("tiny_speech")}
    stages["teller"] = {key: value for key, value in stages["writer"].items() if key != "outputs"}
    stages["image"]["lora"] = _stages("tiny_image")["image"]["lora"]
    tune = _stages("tiny_omni")
    stages["planner"] = tune["thinker"]
    for name in ("sound_prompt", "sound_text", "lyrics", "sound"):
        stages[name] = tune[name]
    stages["sound_prompt"]["inputs"]["prompt"]["from"] = "planner.sound"
    outputs = [*SCENE, *SPEECH, *TUNE, "teller", "writer.hidden_states", "image.latents"]
    return {"name": "everywhere", "stages": stages, "outputs": outputs, "resources": {"threads": 1}, **changes}


def _stages(config: str) -> dict[str, Any]:
    text = shipped_configs()[config].read_text()
    model = yaml.safe_load(text).get("model", "")
    stages: dict[str, Any] = yaml.safe_load(text.replace("${model}", model))["stages"]
    return stages


def content(output: OmniOutput) -> dict[str, Any]:
    """What a caller gets, comparable."""
    return {
        "status": output.status,
        "error": None if output.error is None else [type(output.error).__name__, str(output.error)],
        "texts": [[each.text, each.token_ids, each.finish_reason, each.logprobs] for each in output.completions],
        "images": [np.asarray(image).tobytes() for image in output.images],
        "audios": [(audio.sample_rate, audio.samples.tobytes()) for audio in output.audios],
        "tensors": {name: tensor.tolist() for name, tensor in output.tensors.items()},
        "metrics": {name: [counts.get(key) for key in COUNTS] for name, counts in output.metrics.items()},
        "params": output.params,
    }


def told(parts: Sequence[OmniOutput]) -> list[Any]:
    """What a stream gives: words, steps and previews in their order; pieces of audio by where they begin."""
    *partial, final = parts
    written = [part.completions for part in partial if part.completions]
    return [
        ["".join(each[sample].text for each in written) for sample in range(len(final.completions))],
        [part.progress["image"] for part in partial if "image" in part.metrics],
        [np.asarray(image).tobytes() for part in partial for image in part.previews],
        [(piece.start, piece.samples.tobytes()) for part in partial for piece in part.audios],
        content(final),
    ]
