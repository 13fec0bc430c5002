"""A text read out by a Qwen3-TTS checkpoint, in a named, a described or a cloned voice, into a WAV that grows.

    python examples/qwen3_tts.py "Good morning." --model path/to/Qwen3-TTS-12Hz-0.6B-CustomVoice --voice vivian
    python examples/qwen3_tts.py "Good morning." --model path/to/...-VoiceDesign --instructions "An old man, amused."
    python examples/qwen3_tts.py "Good morning." --model path/to/...-Base --ref-audio me.wav --ref-text "What I said."

Prints when each piece came. Writes speech.wav, or what -o names.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import soundfile

from vllm_omni import Omni, SamplingParams

NO_MODEL = """\
--model: this example needs the folder of a Qwen3-TTS checkpoint. Get one, about 2.5 GB, and name it:
  hf download Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice --local-dir Qwen3-TTS-CustomVoice
  python examples/qwen3_tts.py --model Qwen3-TTS-CustomVoice"""
FRAMES_PER_S = 12.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="A lighthouse tells ships where they are.")
    parser.add_argument("--model", help="a folder with a Qwen3-TTS checkpoint")
    parser.add_argument("--voice", help="a voice of a CustomVoice checkpoint, such as vivian or ryan")
    parser.add_argument("--language", default="auto", help="auto, english, chinese, ...")
    parser.add_argument("--instructions", help="how it is to be said, or by whom (VoiceDesign)")
    parser.add_argument("--ref-audio", type=Path, help="a recording whose voice speaks (Base)")
    parser.add_argument("--ref-text", help="the words of that recording; without them its voice alone is taken")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="most seconds of speech")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("speech.wav"))
    args = parser.parse_args()
    if args.model is None:
        raise SystemExit(NO_MODEL)
    params = SamplingParams(max_tokens=round(args.max_seconds * FRAMES_PER_S), seed=args.seed)
    with Omni(model=args.model) as omni:
        speak(omni, prompt_of(args), params, args.output)


def prompt_of(args: argparse.Namespace) -> dict[str, Any]:
    """The text, and beside it what was said of how it is to be spoken. In the place of the text an iterator may stand
    that gives it in pieces, as a language model writes them: `iter(["Good ", "morning."])`.
    """
    prompt: dict[str, Any] = {"prompt": args.text, "language": args.language}
    named = {"voice": args.voice, "instructions": args.instructions, "ref_text": args.ref_text}
    prompt |= {key: value for key, value in named.items() if value is not None}
    if args.ref_audio is not None:
        prompt |= {"ref_audio": str(args.ref_audio), "x_vector_only_mode": args.ref_text is None}
    return prompt


def speak(omni: Omni, prompt: dict[str, Any], params: SamplingParams, path: Path) -> None:
    """The pieces go into the file as they come."""
    begin, file = time.perf_counter(), None
    with closing(omni.stream(prompt, params)) as stream:
        for output in stream:
            for piece in () if output.finished else output.audios:
                if file is None:
                    file = soundfile.SoundFile(path, "w", samplerate=piece.sample_rate, channels=piece.num_channels)
                file.write(piece.samples.T)
                start_s, now_s = piece.start / piece.sample_rate, time.perf_counter() - begin
                print(f"{now_s:7.2f} s  {piece.duration_s:.2f} s of audio from {start_s:.2f} s on")
    if file is not None:
        file.close()
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    print(f"{path}: {output.audios[0].duration_s:.2f} s, seed {output.seed}")


if __name__ == "__main__":
    main()
