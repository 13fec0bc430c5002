"""The command line: generate, check, models. Parses, calls and prints; only a command that needs torch imports it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni import __version__
from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.request import TEXT_KEYS
from vllm_omni.utils.checks import number_complaint

if TYPE_CHECKING:
    from vllm_omni.config.schema import OmniConfig
    from vllm_omni.params import StageParams
    from vllm_omni.request import OmniOutput

DEFAULT_CONFIG = "tiny_image"
EXAMPLES = """\
examples:
  vllm-omni generate "a red circle left of a blue square" -o out.png
  vllm-omni generate "C4 then E4 then G4, square, fast" --config tiny_audio -o melody.wav --input duration_s=2
  vllm-omni generate "could you draw me a crimson ball" --config tiny_omni -o out/ --metrics
  vllm-omni generate "a lighthouse at dusk" --model path/to/Z-Image-Turbo --steps 9 --height 1024 --width 1024
  vllm-omni generate "Why is the sky blue?" --model path/to/Qwen3-0.6B --max-tokens 200
  vllm-omni generate "a large pink star" --set image.cache.policy=first_block --set image.cache.threshold=0.1
  vllm-omni check tiny_omni
  vllm-omni models
"""
# flag -> the fields of a stage's params that it may fill; the first that any stage has is filled in all that have it
PARAM_FLAGS: Mapping[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "steps": ("num_inference_steps",),
    "height": ("height",),
    "width": ("width",),
    "guidance": ("guidance_scale",),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
    "n": ("num_outputs", "n"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for an error (one line on stderr), 2 for a wrong command line."""
    args = build_parser().parse_args(argv)
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
        _complain(error)
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
    _add_generate(commands)

    check = commands.add_parser("check", help="validate a config, draw its graph, plan its memory; loads no weights")
    check.set_defaults(run=_check)
    check.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a shipped config")
    _add_config_options(check)

    models = commands.add_parser("models", help="list shipped configs and models, and what is supported")
    models.set_defaults(run=_models)
    return parser


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="run prompts through a graph",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="one request each")
    generate.add_argument("--config", metavar="X", help=f"a stage config (default: the model's, else {DEFAULT_CONFIG})")
    _add_config_options(generate)
    generate.add_argument(
        "-o", "--output", metavar="PATH", help="picture, sound (.wav .flac .ogg) or folder (default: out.png, out.wav)"
    )
    generate.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help='what a stage reads besides the prompt: bpm=90, lyrics="la la", audio=song.wav',
    )
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what guidance steers away from")
    _add_param_options(generate)
    generate.add_argument("--metrics", action="store_true", help="print what every stage did for every prompt")
    generate.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no names of written files")


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="a folder, a hub id owner/name, or asset://name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: image.cache.threshold=0.1"
    )


def _add_param_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parameters (default: the config's `defaults`)")
    group.add_argument("--seed", type=int, help="the same seed gives the same answer")
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--guidance", type=float, help="guidance scale")
    group.add_argument("--max-tokens", type=int, help="most tokens that a stage writes")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--n", type=int, help="pictures or sounds per prompt (texts, where the config makes none)")


def _generate(args: argparse.Namespace) -> int:
    from vllm_omni.config.loader import load_config
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.entrypoints.output_files import OutputFiles

    files = OutputFiles(args.output)
    inputs = prompt_inputs(args.input, args.negative_prompt)
    config = load_config(args.config or _config_of_model(args.model), args.set, args.model)
    params = stage_params(config, vars(args))
    prompts = [{"prompt": prompt, **inputs} for prompt in args.prompts]
    with Omni(config, progress=not args.quiet) as omni:
        outputs = omni.generate(prompts, params)
    for output in outputs:
        for completion in output.completions:
            print(completion.text)
    _report(outputs, args)
    for path in files.write(outputs):
        _say(f"wrote {path}", args.quiet)
    return int(any(output.error is not None for output in outputs))


def _config_of_model(model: str | None) -> Path | str:
    if model is None:
        return DEFAULT_CONFIG
    from vllm_omni.config.shipped import config_for_model
    from vllm_omni.utils.files import resolve_model_folder

    return config_for_model(resolve_model_folder(model))


def prompt_inputs(given: Sequence[str], negative_prompt: str | None) -> dict[str, str | float]:
    """Keys of a prompt dict, of every `--input key=value`. A value that is a number, or a string in double quotes, is
    read as JSON ('90', '"90"', '"two\\nlines"'), any other as it stands.

    Raises InvalidRequestError for a key that is missing, given twice, or said by another argument.
    """
    inputs: dict[str, str | float] = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    for item in given:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise InvalidRequestError(f"--input: got {item!r}, expected key=value such as duration_s=30")
        if key in (*TEXT_KEYS, *inputs):
            raise InvalidRequestError(f"--input {key}: the command line says it already; give it once")
        inputs[key] = _input_value(text)
    return inputs


def _input_value(text: str) -> str | float:
    try:
        value: str | float = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_taken = isinstance(value, str) or number_complaint("", value) is None
    return value if is_taken else text


def stage_params(config: OmniConfig, flags: Mapping[str, Any]) -> dict[str, StageParams]:
    """Stage -> the params that the given flags fill; only stages with a result of their own (no encoders) take part.

    Raises InvalidRequestError for a flag that no stage takes.
    """
    from vllm_omni.executor.pipeline import Pipeline

    types = {name: spec.params_type for name, spec in Pipeline(config).specs.items() if spec.signature.results}
    fields = {name: {field.name for field in dataclasses.fields(params_type)} for name, params_type in types.items()}
    given: dict[str, dict[str, Any]] = {}
    for flag, candidates in PARAM_FLAGS.items():
        if flags[flag] is None:
            continue
        taken = [c for c in candidates if any(c in known for known in fields.values())]
        if not taken:
            raise InvalidRequestError(
                f"--{flag.replace('_', '-')}: no stage of {config.name!r} takes {candidates[0]!r}"
            )
        for name, known in fields.items():
            if taken[0] in known:
                given.setdefault(name, {})[taken[0]] = flags[flag]
    return {name: types[name](**values) for name, values in given.items()}


def _report(outputs: Sequence[OmniOutput], args: argparse.Namespace) -> None:
    for index, output in enumerate(outputs):
        if output.error is not None:
            _complain(output.error, f"prompt {index}: ")
        for stage, metrics in output.metrics.items() if args.metrics else ():
            words = (f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items())
            _say(f"prompt {index}  {stage}  {'  '.join(words)}")


def _check(args: argparse.Namespace) -> int:
    from vllm_omni.config.loader import load_config
    from vllm_omni.entrypoints.check import describe
    from vllm_omni.executor.memory import plan_memory, reserve_memory
    from vllm_omni.executor.pipeline import Pipeline

    pipeline = Pipeline(load_config(args.config, args.set, args.model))
    plans = plan_memory(pipeline)
    print(describe(pipeline, plans))
    reserve_memory(pipeline.config, plans)
    return 0


def _models(args: argparse.Namespace) -> int:
    from vllm_omni import registry
    from vllm_omni.config.shipped import shipped_configs, supported_checkpoints
    from vllm_omni.entrypoints.text_table import aligned
    from vllm_omni.utils.files import assets_folder

    folder = assets_folder()
    assets = sorted(path.name for path in folder.glob("*") if path.is_dir())
    about = [(name, _first_comment(path)) for name, path in shipped_configs().items()]
    print(
        "\n".join(
            ["Shipped configs", *aligned(about), "", "Models that ship", *(f"  asset://{name}" for name in assets)]
        )
    )
    print(
        "\n".join(
            ["", "Checkpoints that find their config by themselves", *aligned(sorted(supported_checkpoints().items()))]
        )
    )
    rows = [(table, ", ".join(registry.names(table))) for table in registry.TABLES]
    print("\n".join(["", "Registered", *aligned(rows)]))
    return 0


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def _complain(error: OmniError, where: str = "") -> None:
    _say(f"error: {where}{' '.join(str(error).split())}")


def _say(line: str, is_quiet: bool = False) -> None:
    if not is_quiet:
        print(line, file=sys.stderr)
