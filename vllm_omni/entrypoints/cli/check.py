"""`vllm-omni check`: a config is read, its graph drawn and its memory planned, before anything is loaded."""

from __future__ import annotations

import argparse

from vllm_omni.entrypoints.cli.as_json import print_json
from vllm_omni.entrypoints.cli.config_options import add_config_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `check`."""
    parser.set_defaults(run=run, refuse=parser.error)
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML file or the name of a shipped config (default: the model's)"
    )
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a drawing")


def run(args: argparse.Namespace) -> int:
    """Prints the report, then raises ResourceError where the stages do not fit. Of a hub id no weights are fetched."""
    from vllm_omni.entrypoints.cli.graph_report import as_json, describe
    from vllm_omni.entrypoints.loading import open_pipeline
    from vllm_omni.executor.memory import plan_memory, reserve_memory

    if args.config is None and args.model is None:
        args.refuse("give a CONFIG, or --model")
    pipeline = open_pipeline(args.config, model=args.model, overrides=args.set, headers_only=True)
    plans = plan_memory(pipeline)
    print_json(as_json(pipeline, plans)) if args.json else print(describe(pipeline, plans))
    reserve_memory(pipeline.config, plans)
    return 0
