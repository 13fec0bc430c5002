"""`vllm-omni check`: a config is read, its graph drawn and its memory planned, before anything is loaded."""

from __future__ import annotations

import argparse

from vllm_omni.entrypoints.cli.config_options import add_config_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `check`."""
    parser.set_defaults(run=run)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a shipped config")
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the report, then raises ResourceError where the stages do not fit."""
    from vllm_omni.config.loader import load_config
    from vllm_omni.entrypoints.cli.graph_report import describe
    from vllm_omni.executor.memory import plan_memory, reserve_memory
    from vllm_omni.executor.pipeline import Pipeline

    pipeline = Pipeline(load_config(args.config, args.set, args.model))
    plans = plan_memory(pipeline)
    print(describe(pipeline, plans))
    reserve_memory(pipeline.config, plans)
    return 0
