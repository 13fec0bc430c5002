"""A question about a picture and a sound, answered in words and in speech by a Qwen2.5-Omni or
Qwen3-Omni checkpoint.

    python examples/speech_chat.py "Who is this?" --model path/to/Qwen2.5-Omni-3B --image cat.png -o reply.wav

Without --image and --audio it shows a red ball on blue and plays a tone of 440 Hz, both made here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vllm_omni import Audio, DiffusionParams, Omni, SamplingParams

NO_MODEL = """\
--model: this example needs the folder of a Qwen2.5-Omni checkpoint. Get one, about 12 GB, and name it:
  hf download Qwen/Qwen2.5-Omni-3B --local-dir Qwen2.5-Omni-3B
  python examples/speech_chat.py --model Qwen2.5-Omni-3B"""
CODES_PER_S = 50
FRAMES_PER_S = 12.5  # of Qwen3-Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What do you see and hear?")
    parser.add_argument("--model", help="a folder with a Qwen2.5-Omni checkpoint")
    parser.add_argument("--image", type=Path, help="a picture to ask about")
    parser.add_argument("--audio", type=Path, help="a sound to ask about")
    parser.add_argument("--speaker", help="a voice of the checkpoint, such as Chelsie or Ethan")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of the answer")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="most seconds of speech")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("reply.wav"), help="a .wav, .flac or .ogg file")
    args = parser.parse_args()
    if args.model is None:
        raise SystemExit(NO_MODEL)

    parts: list[dict[str, Any]] = []
    if args.image is not None or args.audio is None:
        parts.append({"type": "image", "image": args.image or ball()})
    if args.audio is not None or args.image is None:
        parts.append({"type": "audio", "audio": args.audio or tone()})
    parts.append({"type": "text", "text": args.question})
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": parts}]}
    if args.speaker is not None:
        prompt["speaker"] = args.speaker
    with Omni(model=args.model) as omni:
        draws_noise = "token2wav" in omni.config.stages  # else every code is one of a frame, and audio follows of them
        rate = CODES_PER_S if draws_noise else FRAMES_PER_S
        params: dict[str, Any] = {
            "thinker": SamplingParams(max_tokens=args.max_tokens, seed=args.seed),
            "talker": SamplingParams(max_tokens=round(args.max_seconds * rate), seed=args.seed),
            **({"token2wav": DiffusionParams(seed=args.seed)} if draws_noise else {}),
        }
        (output,) = omni.generate(prompt, params)
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    speech = output.audios[0]
    speech.save(args.output)
    print(f"asked   {args.question}  ({', '.join(part['type'] for part in parts[:-1])})")
    print(f"wrote   {output.text}")
    print(f"spoke   {args.output}: {speech.duration_s:.2f} s at {speech.sample_rate} Hz")


def ball() -> Image.Image:
    picture = Image.new("RGB", (224, 224), "#204080")
    ImageDraw.Draw(picture).ellipse((62, 62, 162, 162), fill="#d02020")
    return picture


def tone(hertz: float = 440.0, seconds: float = 1.0, rate: int = 16_000) -> Audio:
    times = np.arange(round(seconds * rate), dtype=np.float32) / rate
    return Audio((0.3 * np.sin(2 * np.pi * hertz * times))[None].astype(np.float32), rate)


if __name__ == "__main__":
    main()
