"""`vllm-omni resume`: goes on with what `--save-state` left."""

from __future__ import annotations

import argparse

from vllm_omni.entrypoints.cli.answers import add_answer_options, hand_out
from vllm_omni.entrypoints.cli.config_options import add_config_options
from vllm_omni.entrypoints.cli.stopping import add_state_options, check_state_options, run_or_save
from vllm_omni.errors import InvalidRequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `resume`."""
    parser.set_defaults(run=run, refuse=parser.error)
    parser.add_argument("state", metavar="STATE", help="a file that --save-state or `Omni.save_state` wrote")
    parser.add_argument(
        "--config", metavar="X", help="the stage config of that run (default: the shipped one of the name that it says)"
    )
    add_config_options(parser)
    add_state_options(parser)
    add_answer_options(parser)


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 where the request failed."""
    from vllm_omni.entrypoints.cli.output_contents import Provenance
    from vllm_omni.entrypoints.cli.output_files import OutputFiles
    from vllm_omni.entrypoints.loading import open_pipeline
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.entrypoints.state_file import config_name, read_state

    request = read_state(args.state)
    files = OutputFiles(args.output)
    files.ensure_writable()
    name = args.config if args.config or args.model else shipped_name(config_name(args.state))
    pipeline = open_pipeline(name, model=args.model, overrides=args.set)
    files.expect({name: pipeline.graph.signatures[name].results for name in pipeline.graph.result_stages})
    check_state_options(args, pipeline, 1)
    with Omni(pipeline, progress=not args.quiet) as omni:
        if args.save_state is not None:
            ended = run_or_save(omni, pipeline, request, None, args)
            if isinstance(ended, int):
                return ended
            outputs = [ended]
        else:
            outputs = omni.generate(request)
    models = {name: stage.model for name, stage in pipeline.config.stages.items()}
    provenance = Provenance(models, says_prompt=not args.no_prompt_metadata)
    return hand_out(outputs, [request.prompt if isinstance(request.prompt, str) else ""], files, provenance, args)


def shipped_name(named: str) -> str:
    """The shipped config that calls itself so. Any other is for the caller to name: a file says nothing of where
    configs are, since a config can run code.
    """
    from vllm_omni.config.loader import load_config
    from vllm_omni.config.shipped import shipped_configs

    for name in shipped_configs():
        if name.replace("_", "-") == named.replace("_", "-") and load_config(name).name == named:
            return name
    raise InvalidRequestError(
        f"--config: missing; the state is of the config {named!r}, which does not ship; name its file"
    )
