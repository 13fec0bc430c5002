"""Whether the shipped models still give the same outputs, byte for byte: tokens, pictures, waveforms, hidden states.

    python tools/same_outputs.py write before.json      # at one commit
    python tools/same_outputs.py compare before.json    # at another, on the same machine

Every output is a sha256, so that the file is small and says which one differs. Equal digests are to be expected on one
machine, under one torch and one number of threads alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_omni import DiffusionParams, Omni, OmniOutput, SamplingParams
from vllm_omni.config.loader import load_config

WRITES = SamplingParams(max_tokens=24, temperature=0.8, seed=3, logprobs=2)
DRAWS = DiffusionParams(seed=7, num_inference_steps=6)
SCENES = ["a red circle left of a blue square", "a large pink star", "two things: a gold ring above a dark triangle"]
SOUNDS = ["C4 then E4 then G4, square, fast", "A3, plucked string"]
LOOSE = ["show me a scarlet ball and play a C4 on a string", "please play c4 then e4 quickly", "draw a golden hoop"]
# config, its model, overrides, prompts, parameters: every stage kind, model, cache and edge that ships
CASES: dict[str, tuple[str, str | None, list[str], list[Any], Any]] = {
    "tiny_image": ("tiny_image", None, [], SCENES, DRAWS),
    "tiny_image, guided": (
        "tiny_image",
        None,
        ["outputs=[image, text.hidden_states, image.latents]"],
        [{"prompt": scene, "negative_prompt": "a green square"} for scene in SCENES],
        [
            DiffusionParams(seed=n, num_inference_steps=5, guidance_scale=2.0, height=96, width=64 + 32 * n)
            for n in range(3)
        ],
    ),
    "tiny_image, cached": ("tiny_image", None, ["image.cache.policy=first_block"], SCENES, DiffusionParams(seed=1)),
    "tiny_scene": ("tiny_scene", None, [], LOOSE, {"writer": WRITES, "image": DRAWS}),
    "tiny_audio": ("tiny_audio", None, [], SOUNDS, DRAWS),
    "tiny_omni": ("tiny_omni", None, [], LOOSE, DRAWS),
    "tiny_speech": ("tiny_speech", None, [], ["can you read out: 3 7 red?", "read 5"], DiffusionParams(seed=2)),
    "qwen_omni": (
        "qwen_omni",
        "asset://tiny-speech",
        ["thinker.defaults={temperature: 0, max_tokens: 24}", "talker.defaults={temperature: 0, max_tokens: 60}"],
        ["read 3 7"],
        DiffusionParams(seed=2),
    ),
    "qwen3": (
        "qwen3",
        "asset://tiny-image/text_encoder",
        ["text.tokenizer=asset://tiny-image/tokenizer"],
        SCENES,
        WRITES,
    ),
    "z_image": ("z_image", "asset://tiny-image", [], SCENES, DiffusionParams(seed=4, height=128, width=96)),
    "ace_step": ("ace_step", "asset://tiny-audio", [], [{"prompt": "C4", "lyrics": "la", "duration_s": 2.0}], DRAWS),
    "diffusers adapter": (
        {
            "stages": {"image": {"kind": "diffusers", "model": "asset://tiny-image", "output": "image"}},
            "outputs": ["image"],
        },
        None,
        [],
        SCENES[:2],
        DiffusionParams(seed=5, num_inference_steps=3, height=64, width=64),
    ),
}  # type: ignore[dict-item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    found = {"machine": machine(), "outputs": dict(all_digests())}
    if args.action == "write":
        args.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{len(found['outputs'])} outputs -> {args.file}")
        return
    before = json.loads(args.file.read_text(encoding="utf-8"))
    if before["machine"] != found["machine"]:
        print(f"note: written on {before['machine']}, compared on {found['machine']}")
    different = complaints(before["outputs"], found["outputs"])
    print("\n".join(different) or f"all {len(found['outputs'])} outputs are the same")
    sys.exit(bool(different))


def machine() -> list[str]:
    """What digests may depend on besides the code."""
    return [
        platform.machine(),
        torch.__version__,
        f"{torch.get_num_threads()} threads",
        torch.backends.cpu.get_cpu_capability(),
    ]


def all_digests() -> Iterator[tuple[str, str]]:
    """(case / how it ran / prompt / part, digest) of everything that the cases give: in a batch, and one streamed."""
    for name, (config, model, overrides, prompts, params) in tqdm(CASES.items(), disable=None):
        with Omni(load_config(config, overrides, model), progress=False, device="cpu", dtype="float32") as omni:
            for number, output in enumerate(omni.generate(prompts, params)):
                yield from digests(f"{name} / batch / {number}", output)
            first = params[0] if isinstance(params, list) else params
            for part in omni.stream(prompts[0], first):
                if part.finished:
                    yield from digests(f"{name} / stream / 0", part)


def digests(where: str, output: OmniOutput) -> Iterator[tuple[str, str]]:
    """Of every part of one output."""
    if output.error is not None:
        raise SystemExit(f"{where}: {output.error}")
    for number, completion in enumerate(output.completions):
        words = [completion.text, completion.token_ids, completion.finish_reason, _plain(completion.logprobs)]
        yield f"{where} / text {number}", _sha256(json.dumps(words).encode())
    for number, image in enumerate(output.images):
        yield f"{where} / image {number}", _sha256(f"{image.size}".encode() + image.tobytes())
    for number, audio in enumerate(output.audios):
        yield f"{where} / audio {number}", _sha256(f"{audio.sample_rate}".encode() + audio.samples.tobytes())
    for key, tensor in output.tensors.items():
        yield f"{where} / {key}", _sha256(f"{list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())


def complaints(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for every output that is missing, new or different."""
    keys = sorted(before.keys() | now.keys())
    words = {key: "missing" if key not in now else "new" if key not in before else "different" for key in keys}
    return [f"{key}: {words[key]}" for key in keys if before.get(key) != now.get(key)]


def _plain(logprobs: Any) -> Any:
    return None if logprobs is None else [[[token, value.hex()] for token, value in row.items()] for row in logprobs]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
