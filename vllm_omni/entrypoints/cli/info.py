"""`vllm-omni info`: what a picture, a sound or a video says of how it was made."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    parser.set_defaults(run=run)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a picture, a sound or a video")


def run(args: argparse.Namespace) -> int:
    """Prints what each file holds, and a line for everything that it says of how it was made."""
    from vllm_omni.media.file_info import read_file_info

    for path in args.files:
        info = read_file_info(Path(path))
        print(f"{path}: {info.content}")
        made = info.metadata
        if made is None:
            print("  says nothing of how it was made")
            continue
        said = {
            "prompt": made.prompt,
            "negative_prompt": made.negative_prompt,
            "seed": made.seed,
            "model": made.model,
            "version": made.version,
            **made.parameters,
        }
        for name, value in said.items():
            if value is not None:
                print(f"  {name}: {value}")
    return 0
