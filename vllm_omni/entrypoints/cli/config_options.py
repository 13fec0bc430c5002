"""The options that say which model a config gets and which of its keys change."""

from __future__ import annotations

import argparse


def add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="a folder, a hub id owner/name, or asset://name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: image.cache.threshold=0.1"
    )
