"""What becomes of the answers of a command: files, lines on stderr, one JSON document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_omni.entrypoints.cli.as_json import answers_as_json, print_json
from vllm_omni.entrypoints.cli.console import complain, say
from vllm_omni.entrypoints.cli.interrupts import interrupts_raise

if TYPE_CHECKING:
    from vllm_omni.entrypoints.cli.output_contents import Provenance
    from vllm_omni.entrypoints.cli.output_files import OutputFiles
    from vllm_omni.request import OmniOutput


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="image (.png .jpg .webp .avif .tiff), audio (.wav .flac .ogg .opus .mp3 .aac .pcm), video (.mp4 .webm "
        ".gif .webp), text (.txt .json .jsonl) or folder (default: out.png, out.wav, out.mp4)",
    )
    parser.add_argument(
        "--no-prompt-metadata", action="store_true", help="files say seed, parameters and model, but not what was asked"
    )
    parser.add_argument("--metrics", action="store_true", help="print what every stage did for every prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON document of answers, metrics and files")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no names of written files")


def hand_out(
    outputs: Sequence[OmniOutput],
    texts: Sequence[str],
    files: OutputFiles,
    provenance: Provenance,
    args: argparse.Namespace,
) -> int:
    """Writes files and says what went wrong; the exit code: 1 where some request failed. texts: the prompts."""
    _report(outputs, args)
    with interrupts_raise():
        written = files.write(outputs, texts, provenance, lambda path: say(f"wrote {path}", args.quiet))
    if args.json:
        print_json(answers_as_json(texts, outputs, written))
    return int(any(output.error is not None for output in outputs))


def _report(outputs: Sequence[OmniOutput], args: argparse.Namespace) -> None:
    for index, output in enumerate(outputs):
        if output.error is not None:
            complain(output.error, f"prompt {index}: ")
        if vars(args).get("seed") is None and output.seed is not None:
            say(f"prompt {index}: seed {output.seed}" if len(outputs) > 1 else f"seed {output.seed}", args.quiet)
        for stage, metrics in output.metrics.items() if args.metrics else ():
            words = (f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items())
            say(f"prompt {index}  {stage}  {'  '.join(words)}")
