"""`vllm-omni bench`: a load on a server, or on a graph in this process, and what it took."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni.entrypoints.cli.config_options import add_config_options
from vllm_omni.entrypoints.cli.console import say
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

if TYPE_CHECKING:
    from vllm_omni.entrypoints.bench.answer import Answer
    from vllm_omni.entrypoints.bench.load import Load, Run, Target
    from vllm_omni.entrypoints.bench.mix import BenchRequest

KEY_VARIABLES = ("VLLM_OMNI_API_KEY", "OPENAI_API_KEY")
SUFFIXES = (".json", ".png")
DEFAULT_CONFIG = "tiny_omni"
EXAMPLES = """\
examples:
  vllm-omni bench serve --mix benchmarks/mixes/omni.yaml --concurrency 32 --requests 200
  vllm-omni bench serve --mix benchmarks/mixes/text.yaml --url http://gpu:8000 --rate 20 -o load.json -o load.png
  vllm-omni bench serve --mix benchmarks/mixes/omni.yaml --rate 5 --goodput ttft=0.5,e2e=3
  vllm-omni bench offline --mix benchmarks/mixes/omni.yaml --config tiny_omni

A mix is a YAML file:
  works:
    words:
      kind: chat                 # chat, completion, image or speech: which route
      weight: 3                  # its share of the requests
      prompts: ["hello there", "who are you?"]
      body: {max_tokens: 64}     # anything else that the request's body says
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two commands below `bench`."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    looks: Any = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    served = commands.add_parser("serve", help="a load on any server that speaks OpenAI's protocol", **looks)
    served.set_defaults(run=run_served)
    served.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    served.add_argument("--model", metavar="NAME", help="the served model (default: the server's own)")
    served.add_argument(
        "--timeout-s",
        type=float,
        default=600.0,
        metavar="S",
        help="longest silence of an answer (default: 600)",
    )
    served.description = f"The API key is taken from {' or '.join(KEY_VARIABLES)}."
    offline = commands.add_parser("offline", help="the same load on a config in this process, without HTTP", **looks)
    offline.set_defaults(run=run_offline)
    offline.add_argument("--config", metavar="X", help=f"a stage config (default: the model's, else {DEFAULT_CONFIG})")
    add_config_options(offline)
    for command in (served, offline):
        _add_load_options(command)


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mix", type=Path, required=True, metavar="FILE", help="what is asked, as YAML; see below")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="that are measured (default: 100)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="closed loop: so many clients at a time (default: 8)"
    )
    kind.add_argument("--rate", type=float, metavar="R", help="open loop: R requests a second, at random moments")
    parser.add_argument(
        "--warmup", type=int, default=4, metavar="N", help="requests before them, not measured (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mix and the moments (default: %(default)s)")
    parser.add_argument(
        "--goodput", metavar="LIMITS", help="count what keeps to them, in seconds: ttft=0.5,tpot=0.05,e2e=3"
    )
    parser.add_argument(
        "-o", "--output", action="append", default=[], type=Path, metavar="FILE",
        help="results (.json), a plot (.png); may be repeated",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no names of written files")


def run_served(args: argparse.Namespace) -> int:
    """The exit code: 1 where no request succeeded."""
    try:
        from vllm_omni.entrypoints.bench.http_target import HttpTarget
    except ImportError as error:
        raise _missing(error) from error
    key = next((os.environ[name].strip() for name in KEY_VARIABLES if os.environ.get(name, "").strip()), None)
    warmup, measured = _requests(args)
    target = HttpTarget(args.url, args.model, key, args.timeout_s)

    async def work() -> Run:
        async with target:
            return await _loaded(target, warmup, measured, args)

    return _report(asyncio.run(work()), {"url": args.url, "model": args.model}, args)


def run_offline(args: argparse.Namespace) -> int:
    """The exit code: 1 where no request succeeded."""
    try:
        from vllm_omni.entrypoints.bench.offline_target import OfflineTarget
    except ImportError as error:
        raise _missing(error) from error
    from vllm_omni.entrypoints.loading import open_pipeline

    warmup, measured = _requests(args)
    name = args.config if args.config or args.model else DEFAULT_CONFIG
    pipeline = open_pipeline(name, model=args.model, overrides=args.set)
    target = OfflineTarget(pipeline, [*warmup, *measured])

    async def work() -> Run:
        async with target:
            return await _loaded(target, warmup, measured, args)

    return _report(asyncio.run(work()), {"config": pipeline.config.name}, args)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"bench: {error.name} is missing; pip install 'vllm-omni[server]'")


def _requests(args: argparse.Namespace) -> tuple[Sequence[BenchRequest], Sequence[BenchRequest]]:
    """(for the warm-up, to be measured); ConfigError for a command line that cannot be."""
    from vllm_omni.entrypoints.bench.mix import Mix
    from vllm_omni.entrypoints.bench.summary import parse_limits

    check_number("--requests", args.requests, 1, 10_000_000, integer=True, raises=ConfigError)
    check_number("--warmup", args.warmup, 0, 1_000_000, integer=True, raises=ConfigError)
    check_number("--concurrency", args.concurrency, 1, 100_000, integer=True, raises=ConfigError)
    if args.rate is not None:
        check_number("--rate", args.rate, 0, 1_000_000, above_low=True, raises=ConfigError)
    parse_limits(args.goodput)
    for path in args.output:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"--output: got {str(path)!r}, expected a file that ends in {' or '.join(SUFFIXES)}")
        if not path.parent.is_dir():
            raise ConfigError(f"--output: got {str(path)!r}, but there is no folder {str(path.parent)!r}")
    requests = Mix.read(args.mix).draw(args.warmup + args.requests, args.seed)
    return requests[: args.warmup], requests[args.warmup :]


async def _loaded(
    target: Target, warmup: Sequence[BenchRequest], measured: Sequence[BenchRequest], args: argparse.Namespace
) -> Run:
    from tqdm import tqdm

    from vllm_omni.entrypoints.bench.load import Load

    await Load(concurrency=args.concurrency).run(target, warmup)
    is_shown = sys.stderr.isatty() and not args.quiet
    with tqdm(total=len(measured), unit="request", disable=not is_shown, leave=False) as bar:

        def show(answer: Answer) -> None:
            bar.update()

        return await _load(args).run(target, measured, show)


def _load(args: argparse.Namespace) -> Load:
    from vllm_omni.entrypoints.bench.load import Load

    if args.rate is not None:
        return Load(rate=args.rate, seed=args.seed)
    return Load(concurrency=args.concurrency)


def _report(run: Run, target: dict[str, Any], args: argparse.Namespace) -> int:
    from vllm_omni.entrypoints.bench.report import draw, lines, result

    load = {"rate": args.rate} if args.rate is not None else {"concurrency": args.concurrency}
    settings = {**target, "mix": str(args.mix), "requests": args.requests, **load, "seed": args.seed}
    found = result(run, args.goodput, settings)
    print("\n".join(lines(found)))
    for path in args.output:
        if path.suffix == ".json":
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        else:
            draw(run, path)
        say(f"wrote {path}", args.quiet)
    return int(found["summary"]["num_ok"] == 0)
