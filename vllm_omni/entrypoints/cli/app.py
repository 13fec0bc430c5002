"""The parser of the command line, and what becomes of an error in a command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from vllm_omni import __version__
from vllm_omni.entrypoints.cli import bench, calibrate, check, completion, generate, info, models, resume, serve, voices
from vllm_omni.entrypoints.cli.console import complain
from vllm_omni.entrypoints.cli.logs import add_verbose_option, set_up_logging
from vllm_omni.errors import OmniError

EXAMPLES = """\
examples:
  vllm-omni generate "a red circle left of a blue square" -o out.png
  vllm-omni generate "C4 then E4 then G4, square, fast" --config tiny_audio -o melody.wav --input duration_s=2
  vllm-omni generate "waves at night" --model path/to/Wan2.2-TI2V-5B --num-frames 49 -o waves.mp4
  vllm-omni generate "could you draw me a crimson ball" --config tiny_omni -o out/ --metrics
  vllm-omni generate "a lighthouse at dusk" --model path/to/Z-Image-Turbo --steps 9 --height 1024 --width 1024
  vllm-omni generate "Why is the sky blue?" --model path/to/Qwen3-0.6B --max-tokens 200
  vllm-omni generate "a large pink star" --set image.cache.policy=first_block --set image.cache.threshold=0.1
  vllm-omni generate "a lighthouse at dusk" --model path/to/Z-Image-Turbo --save-state dusk.safetensors
  vllm-omni resume dusk.safetensors --model path/to/Z-Image-Turbo -o dusk.png
  vllm-omni serve --config tiny_omni --ui
  vllm-omni bench serve --mix benchmarks/mixes/omni.yaml --concurrency 32
  vllm-omni check tiny_omni
  vllm-omni calibrate my_config.yaml --policy teacache --write
  vllm-omni info out.png
  vllm-omni voices add anna anna.wav --folder voices --text "Good morning." --consent "Anna, by letter"
  vllm-omni models
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for an error (one line on stderr), 2 for a wrong command line."""
    args = build_parser().parse_args(argv)
    set_up_logging(args.verbose)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding cannot show is replaced
            stream.reconfigure(errors="replace")
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except (
        BrokenPipeError
    ):  # the reader of a pipe (`| head`) has seen enough; keeps the interpreter from a second complaint
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OmniError as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="vllm-omni",
        description="Multi-stage omni-modal inference: language models and diffusion models as stages of one graph.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-omni {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_prompts = commands.add_parser(
        "generate",
        help="run prompts through a graph",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_arguments(run_prompts)
    resume.add_arguments(commands.add_parser("resume", help="go on with a picture or a sound whose state was saved"))
    serve.add_arguments(commands.add_parser("serve", help="serve configs over HTTP, as OpenAI's API"))
    bench.add_arguments(commands.add_parser("bench", help="measure a server under load, or a config without HTTP"))
    check.add_arguments(
        commands.add_parser("check", help="validate a config, draw its graph, plan its memory; loads no weights")
    )
    calibrate.add_arguments(
        commands.add_parser("calibrate", help="fit a step cache to a config's model, from a few prompts")
    )
    info.add_arguments(commands.add_parser("info", help="what a picture or a sound says of how it was made"))
    voices.add_arguments(commands.add_parser("voices", help="add, list and remove voices that a model may clone"))
    models.add_arguments(commands.add_parser("models", help="list shipped configs and models, and what is supported"))
    completion.add_arguments(
        commands.add_parser("completion", help="print a script that completes commands in a shell")
    )
    for command in commands.choices.values():
        add_verbose_option(command)
    return parser
