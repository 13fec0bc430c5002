"""`-v`: what the package and, with `-vv`, the libraries below it say of their work, on stderr."""

from __future__ import annotations

import argparse
import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def add_verbose_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="say what is loaded and done; twice: libraries as well"
    )


def set_up_logging(verbose: int) -> None:
    """Of the standard library's logging; without -v warnings alone are shown, as Python does by itself."""
    if not verbose:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("vllm_omni").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    if verbose > 1:
        root.setLevel(logging.INFO)
