"""The command line: generate, check, info, models. Only a command that needs torch imports it."""

from vllm_omni.entrypoints.cli.app import build_parser, main

__all__ = ["build_parser", "main"]
