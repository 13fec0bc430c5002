"""The command line: generate, serve, bench, check, info, models. Only a command that needs torch imports it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_omni.entrypoints.cli.app import build_parser, main

__all__ = ["build_parser", "main"]


def __getattr__(name: str) -> Any:
    """Late, so that what ends the process on Ctrl-C stands before anything is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vllm_omni.entrypoints.cli.app"), name)
