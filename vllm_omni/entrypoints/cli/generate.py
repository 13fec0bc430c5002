"""`vllm-omni generate`: prompts of the command line through a graph, and its outputs into files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_omni.entrypoints.cli.answers import add_answer_options, hand_out
from vllm_omni.entrypoints.cli.config_options import add_config_options
from vllm_omni.entrypoints.cli.stopping import add_state_options, check_state_options, run_or_save
from vllm_omni.errors import InvalidRequestError
from vllm_omni.lora import LoRA
from vllm_omni.params import VIDEO_FIELDS
from vllm_omni.request import TEXT_KEYS
from vllm_omni.utils.checks import number_complaint
from vllm_omni.utils.files import user_path

if TYPE_CHECKING:
    from vllm_omni.executor.pipeline import Pipeline
    from vllm_omni.params import StageParams
    from vllm_omni.request import OmniOutput

DEFAULT_CONFIG = "tiny_image"
# flag -> the fields of a stage's params that it may fill; the first that any stage has is filled in all that have it
PARAM_FLAGS: Mapping[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "steps": ("num_inference_steps",),
    "height": ("height",),
    "width": ("width",),
    "num_frames": ("num_frames",),
    "fps": ("fps",),
    "guidance": ("guidance_scale",),
    "guidance_interval": ("guidance_interval",),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
    "n": ("num_outputs", "n"),
    "lora": ("lora",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `generate`."""
    parser.set_defaults(run=run, refuse=parser.error)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="one request each; '-' reads one from stdin")
    parser.add_argument("--prompts", dest="file", metavar="FILE", help="a text file with one prompt in each line")
    parser.add_argument("--config", metavar="X", help=f"a stage config (default: the model's, else {DEFAULT_CONFIG})")
    add_config_options(parser)
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help='what a stage reads besides the prompt: bpm=90, lyrics="la la", audio=song.wav',
    )
    parser.add_argument(
        "--image",
        action="append",
        metavar="PATH",
        help="a picture to start from or to edit; several where a model takes them",
    )
    parser.add_argument(
        "--mask", metavar="PATH", help="what of the picture is drawn anew: where it is white, or transparent"
    )
    parser.add_argument("--strength", type=float, help="how far the picture may be left, 0 to 1")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance steers away from")
    _add_param_options(parser)
    add_state_options(parser)
    add_answer_options(parser)


def _add_param_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parameters (default: the config's `defaults`)")
    group.add_argument("--seed", type=int, help="the same seed gives the same answer")
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--num-frames", type=int, help="of a video")
    group.add_argument("--fps", type=float, help="frames per second of a video")
    group.add_argument("--guidance", type=float, help="guidance scale")
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="shares of the steps between which guidance acts (0 1)",
    )
    group.add_argument("--max-tokens", type=int, help="most tokens that a stage writes")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument(
        "--lora",
        action="append",
        type=named_lora,
        metavar="NAME[:SCALE]",
        help="an adapter of the config's lora.folders, by its name or its path; several act together",
    )
    group.add_argument("--n", type=int, help="pictures, sounds, videos per prompt (texts, where the config makes none)")


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 where some request failed."""
    from vllm_omni.entrypoints.cli.output_contents import Provenance
    from vllm_omni.entrypoints.cli.output_files import OutputFiles
    from vllm_omni.entrypoints.loading import open_pipeline
    from vllm_omni.entrypoints.omni import Omni

    if not args.prompts and args.file is None:
        args.refuse("give a PROMPT, '-' for stdin, or --prompts FILE")
    texts = prompt_texts(args.prompts, args.file)
    files = OutputFiles(args.output)
    files.ensure_writable()
    inputs = prompt_inputs(args.input, named_inputs(args))
    name = args.config if args.config or args.model else DEFAULT_CONFIG
    pipeline = open_pipeline(name, model=args.model, overrides=args.set)
    files.expect({name: pipeline.graph.signatures[name].results for name in pipeline.graph.result_stages})
    params = stage_params(pipeline, vars(args))
    prompts = [{"prompt": text, **inputs} for text in texts]
    check_state_options(args, pipeline, len(prompts))
    with Omni(pipeline, progress=not args.quiet) as omni:
        if args.save_state is not None:
            ended = run_or_save(omni, pipeline, prompts[0], params, args)
            if isinstance(ended, int):
                return ended
            outputs = [ended]
        elif len(prompts) == 1 and not args.json and writes_text_alone(pipeline) and sys.stdout.isatty():
            outputs = [_write_out(omni.stream(prompts[0], params))]
        else:
            outputs = omni.generate(prompts, params)
            for completion in (item for output in outputs for item in output.completions):
                if not args.json:
                    print(completion.text)
    models = {name: stage.model for name, stage in pipeline.config.stages.items()}
    provenance = Provenance(models, inputs, says_prompt=not args.no_prompt_metadata)
    return hand_out(outputs, texts, files, provenance, args)


def prompt_texts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, '-' being what stdin holds, and those of a file, one in each line that is not
    empty. Raises InvalidRequestError where there is none, or where the file cannot be read.
    """
    texts = [sys.stdin.read().strip() if text == "-" else text for text in given]
    if file is not None:
        try:
            lines = user_path("--prompts", file, raises=InvalidRequestError).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"--prompts: got {file!r}, expected a text file in UTF-8 ({error})") from error
        texts += [line for line in lines if line.strip()]
    if not texts:
        raise InvalidRequestError(f"--prompts: got {file!r}, which holds no prompt; write one in each line")
    return texts


def writes_text_alone(pipeline: Pipeline) -> bool:
    """Whether all that the config gives is text of one stage, which can be shown as it is written."""
    stages = pipeline.graph.result_stages
    return len(stages) == 1 and all(pipeline.graph.signatures[stage].results == {"text"} for stage in stages)


def _write_out(parts: Iterable[OmniOutput]) -> OmniOutput:
    """Shows text as it is written; returns the final output."""
    shown = 0
    for part in parts:
        text = part.text or ""
        if part.finished:
            print(text[shown:])
            for completion in part.completions[1:]:
                print(completion.text)
            return part
        print(text, end="", flush=True)
        shown += len(text)
    raise AssertionError("a stream ends with its final output")


def named_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of a prompt dict that have arguments of their own."""
    images = args.image[0] if args.image and len(args.image) == 1 else args.image
    given = {
        "negative_prompt": args.negative_prompt,
        "image": images,
        "mask": args.mask,
        "strength": args.strength,
    }
    return {key: value for key, value in given.items() if value is not None}


def prompt_inputs(given: Sequence[str], named: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a prompt dict: those that are named, and of every `--input key=value`. A value that is a number, or a
    string in double quotes, is read as JSON ('90', '"90"', '"two\\nlines"'), any other as it stands.

    Raises InvalidRequestError for a key that is missing, given twice, or said by another argument.
    """
    inputs = dict(named)
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


def stage_params(pipeline: Pipeline, flags: Mapping[str, Any]) -> dict[str, StageParams]:
    """Stage -> the params that the given flags fill; only stages with a result of their own (no encoders) take part.

    Raises InvalidRequestError for a flag that no stage takes.
    """
    types = {name: spec.params_type for name, spec in pipeline.specs.items() if spec.signature.results}
    fields = {name: {field.name for field in dataclasses.fields(params_type)} for name, params_type in types.items()}
    for name, known in fields.items():
        known.difference_update(() if pipeline.specs[name].takes_loras else ("lora",))
        if "video" not in pipeline.specs[name].signature.results:
            known.difference_update(VIDEO_FIELDS)
    given: dict[str, dict[str, Any]] = {}
    for flag, candidates in PARAM_FLAGS.items():
        if flags[flag] is None:
            continue
        taken = [c for c in candidates if any(c in known for known in fields.values())]
        if not taken:
            raise InvalidRequestError(
                f"--{flag.replace('_', '-')}: no stage of {pipeline.config.name!r} takes {candidates[0]!r}"
            )
        for name, known in fields.items():
            if taken[0] in known:
                given.setdefault(name, {})[taken[0]] = flags[flag]
    return {name: types[name](**values) for name, values in given.items()}


def named_lora(text: str) -> LoRA:
    """'outlines', 'outlines:0.5', or the path of a file in the place of its name."""
    name, colon, scale = text.rpartition(":")
    try:
        number = float(scale) if colon else 1.0
    except ValueError:  # a colon of the name
        colon, number = "", 1.0
    name = name if colon else text
    return LoRA(path=name, scale=number) if "/" in name or name.endswith(".safetensors") else LoRA(name, scale=number)
