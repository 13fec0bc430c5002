"""`vllm-omni models`: what ships, what finds its config by itself, what is registered."""

from __future__ import annotations

import argparse
import re
from itertools import takewhile

from vllm_omni.entrypoints.cli.as_json import print_json
from vllm_omni.entrypoints.cli.text_table import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `models`."""
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints the lists."""
    from vllm_omni import registry
    from vllm_omni.config.plugins import load_entry_points
    from vllm_omni.config.shipped import shipped_configs, supported_checkpoints
    from vllm_omni.utils.files import assets_folder

    load_entry_points()
    folder = assets_folder()
    assets = sorted(path.name for path in folder.glob("*") if path.is_dir())
    about = [(name, first_sentence(path.read_text(encoding="utf-8"))) for name, path in shipped_configs().items()]
    if args.json:
        tables = {table: registry.names(table) for table in registry.TABLES}
        checkpoints = supported_checkpoints()
        print_json({"configs": dict(about), "models": assets, "checkpoints": checkpoints, "registered": tables})
        return 0
    print(
        "\n".join(
            ["Shipped configs", *aligned(about), "", "Models that ship", *(f"  asset://{name}" for name in assets)]
        )
    )
    print(
        "\n".join(
            [
                "",
                "Checkpoints that find their config by themselves",
                *aligned([*sorted(supported_checkpoints().items()), ("any other pipeline of diffusers", "diffusers")]),
            ]
        )
    )
    rows = [(table, ", ".join(registry.names(table))) for table in registry.TABLES]
    print("\n".join(["", "Registered", *aligned(rows)]))
    return 0


def first_sentence(yaml: str) -> str:
    """Of the comment that a config begins with, however many lines it takes."""
    comment = [line.removeprefix("#").strip() for line in takewhile(lambda line: line[:1] == "#", yaml.splitlines())]
    return re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]
