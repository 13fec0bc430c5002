"""Speech while it is made: the pieces of a Qwen2.5-Omni checkpoint's answer go into one WAV as they come.

    python examples/stream_speech.py "Tell me a story about a lighthouse." --model path/to/Qwen2.5-Omni-3B -o out/

Prints the words, when each piece came and what it holds, and how soon the whole could have begun to play without a gap.
Writes speech.wav and timeline.png: when thinker, talker and token2wav worked side by side.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import soundfile

from vllm_omni import Audio, DiffusionParams, Omni, SamplingParams

NO_MODEL = """\
--model: this example needs the folder of a Qwen2.5-Omni checkpoint. Get one, about 12 GB, and name it:
  hf download Qwen/Qwen2.5-Omni-3B --local-dir Qwen2.5-Omni-3B
  python examples/stream_speech.py --model Qwen2.5-Omni-3B"""
CODES_PER_S = 50


class SpeechFile:
    """A WAV that grows with every piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = ExitStack()
        self._file: soundfile.SoundFile | None = None

    def write(self, piece: Audio) -> None:
        if self._file is None:
            opened = soundfile.SoundFile(self._path, "w", samplerate=piece.sample_rate, channels=piece.num_channels)
            self._file = self._files.enter_context(opened)
        self._file.write(piece.samples.T)
        self._file.flush()

    def close(self) -> None:
        self._files.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Tell me in two sentences what a lighthouse is for.")
    parser.add_argument("--model", help="a folder with a Qwen2.5-Omni checkpoint")
    parser.add_argument("--speaker", help="a voice of the checkpoint, such as Chelsie or Ethan")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of the answer")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="most seconds of speech")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="a folder")
    args = parser.parse_args()
    if args.model is None:
        raise SystemExit(NO_MODEL)

    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": args.question}]}
    if args.speaker is not None:
        prompt["speaker"] = args.speaker
    params = {
        "thinker": SamplingParams(max_tokens=args.max_tokens, seed=args.seed),
        "talker": SamplingParams(max_tokens=round(args.max_seconds * CODES_PER_S), seed=args.seed),
        "token2wav": DiffusionParams(seed=args.seed),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with Omni(model=args.model) as omni:
        stream_to(args.output, omni, prompt, params)


def stream_to(folder: Path, omni: Omni, prompt: dict[str, Any], params: dict[str, Any]) -> None:
    """One request: its pieces as they come, then what they were together."""
    begin, wait_s, num_pieces = time.perf_counter(), 0.0, 0
    with closing(SpeechFile(folder / "speech.wav")) as file, closing(omni.stream(prompt, params)) as stream:
        for output in stream:
            now_s = time.perf_counter() - begin
            if output.finished:
                break
            if output.text:
                print(f"{now_s:7.2f} s  {output.text!r}")
            for piece in output.audios:
                file.write(piece)
                start_s = piece.start / piece.sample_rate
                num_pieces, wait_s = num_pieces + 1, max(wait_s, now_s - start_s)
                print(f"{now_s:7.2f} s  piece {num_pieces}: {piece.duration_s:.2f} s of sound from {start_s:.2f} s on")
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    output.plot_timeline(folder / "timeline.png")
    print(f"wrote {output.text}")
    speech = output.audios[0]
    print(f"{folder / 'speech.wav'}: {speech.duration_s:.2f} s in {num_pieces} pieces, done after {now_s:.2f} s")
    print(
        f"Begun {wait_s:.2f} s after the question it plays without a gap. {folder / 'timeline.png'} shows the stages."
    )


if __name__ == "__main__":
    main()
