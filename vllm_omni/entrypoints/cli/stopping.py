"""`--save-state`: a request that is stopped on the command line leaves its state in a file."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import TYPE_CHECKING

from vllm_omni.entrypoints.cli.console import say
from vllm_omni.entrypoints.cli.interrupts import INTERRUPTED, interrupts_noted
from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import check_number

if TYPE_CHECKING:
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.entrypoints.prompts import Params, PromptLike
    from vllm_omni.executor.pipeline import Pipeline
    from vllm_omni.request import OmniOutput


def add_state_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("stopping and going on (see `vllm-omni resume`)")
    group.add_argument(
        "--save-state",
        metavar="FILE",
        help="where Ctrl-C leaves a running picture or sound (.safetensors); press it twice to give it up",
    )
    group.add_argument(
        "--stop-after-steps",
        metavar="N",
        type=int,
        help="stop there without Ctrl-C, after so many denoising steps of all outputs together",
    )


def check_state_options(args: argparse.Namespace, pipeline: Pipeline, num_prompts: int) -> None:
    """Before the work; InvalidRequestError for what could not be saved."""
    if args.save_state is None:
        if args.stop_after_steps is not None:
            raise InvalidRequestError("--stop-after-steps: give --save-state FILE too, or what was done is lost")
        return
    from vllm_omni.entrypoints.state_file import state_path

    state_path(args.save_state)
    if num_prompts != 1:
        raise InvalidRequestError(f"--save-state: got {num_prompts} prompts, expected one, whose state the file holds")
    if args.stop_after_steps is not None:
        check_number("--stop-after-steps", args.stop_after_steps, 1, integer=True, raises=InvalidRequestError)
    if not _able(pipeline):
        raise InvalidRequestError(
            f"--save-state: got the config {pipeline.config.name!r}, expected one with a stage that denoises a picture "
            "or a sound as a whole; leave it out"
        )


def run_or_save(
    omni: Omni, pipeline: Pipeline, prompt: PromptLike, params: Params | None, args: argparse.Namespace
) -> OmniOutput | int:
    """The final output or, where it was stopped and its state written, the exit code."""
    from vllm_omni.entrypoints.progress import ProgressBar

    able = _able(pipeline)
    with (
        interrupts_noted() as interrupted,
        ProgressBar(pipeline.config.name, 1, not args.quiet) as bar,
        closing(omni.stream(prompt, params)) as parts,
    ):
        for part in parts:
            bar.show(part)
            if part.finished:
                return part
            steps = {stage: part.progress[stage] for stage in able if stage in part.progress}
            unfinished = [progress.step for progress in steps.values() if progress.step < progress.num_steps]
            is_due = args.stop_after_steps is not None and max(unfinished, default=0) >= args.stop_after_steps
            if unfinished and (is_due or interrupted.is_set()):
                omni.save_state(part.request_id, args.save_state)
                where = ", ".join(f"{stage} {each.step}/{each.num_steps}" for stage, each in steps.items())
                say(f"saved {args.save_state} ({where}); go on with: vllm-omni resume {args.save_state}", args.quiet)
                return INTERRUPTED if interrupted.is_set() else 0
    raise AssertionError("a stream ends with its final output")


def _able(pipeline: Pipeline) -> list[str]:
    """The stages whose tasks can be saved."""
    return [name for name, spec in pipeline.specs.items() if spec.fingerprint() is not None]
