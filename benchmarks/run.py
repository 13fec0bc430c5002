"""Measures the package: `python benchmarks/run.py [SUITE ...] [--quick] [--json FILE] [--write]`.

Figures are shown, and with --write (as `make bench` says it) kept in benchmarks/results; never with --quick, which only
shows that everything runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks import (
    audio,
    audio_cache,
    autoencoders,
    cache,
    decode_memory,
    dit,
    edits,
    halves,
    hops,
    images,
    limits,
    lora,
    products,
    quantization,
    random_cache,
    references,
    report,
    routing,
    serving,
    speculation,
    speech,
    speech_peers,
    startup,
    text,
    text_peers,
    videos,
)
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, available_cores, machine
from benchmarks.peers.environments import DEFAULT_FOLDER

RESULTS = Path(__file__).resolve().parent / "results"
SUITES: dict[str, Callable[[Options, Limits | None], Report]] = {
    "limits": limits.run,
    "products": products.run,
    "images": images.run,
    "dit": dit.run,
    "autoencoders": autoencoders.run,
    "videos": videos.run,
    "lora": lora.run,
    "edits": edits.run,
    "references": references.run,
    "audio": audio.run,
    "speech": speech.run,
    "speech_peers": speech_peers.run,
    "decode_memory": decode_memory.run,
    "text": text.run,
    "text_peers": text_peers.run,
    "speculation": speculation.run,
    "quantization": quantization.run,
    "halves": halves.run,
    "startup": startup.run,
    "hops": hops.run,
    "cache": cache.run,
    "audio_cache": audio_cache.run,
    "random_cache": random_cache.run,
    "serving": serving.run,
    "routing": routing.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.write and args.quick:
        parser.error("--write: the figures of --quick are none; leave out one of them")
    names = list(SUITES) if "all" in args.suites else [name for name in SUITES if name in args.suites]
    if args.beside and "text_peers" not in names:
        parser.error("--beside: chooses the peers of text_peers, which is not among the suites")
    repeats = 1 if args.quick else args.repeats
    options = Options(args.threads, repeats, args.budget, args.dtype, args.quick, args.peers, args.beside)
    console, about = Console(), machine(options.threads)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    bounds = None if args.quick and "limits" not in names else limits.measure(options)
    found = {}
    for name in names:
        result = SUITES[name](options, bounds)
        report.show(result, console)
        found[name] = report.as_json(result, about, asdict(options))
        if args.write:
            report.write_json(RESULTS / f"{name}.json", found[name])
            report.write_page(RESULTS)
    if args.json:
        report.write_json(args.json, found)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "suites",
        nargs="*",
        default=["all"],
        choices=[*SUITES, "all"],
        metavar="SUITE",
        help=", ".join([*SUITES, "all"]),
    )
    parser.add_argument("--quick", action="store_true", help="tiny counts, to see that it runs")
    parser.add_argument("--write", action="store_true", help="put the figures into benchmarks/results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="put all figures there as well")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side of each case (default 7)")
    parser.add_argument(
        "--budget", type=float, default=120.0, metavar="S", help="no repeats beyond three after this long (default 120)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of `images` and `audio`")
    parser.add_argument(
        "--peers",
        metavar="FOLDER",
        help=f"of the suites with peers: where tools/peers.py made them (default {DEFAULT_FOLDER})",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        choices=text_peers.PEERS,
        metavar="PEER",
        help=f"of text_peers: the peers that are measured, of {', '.join(text_peers.PEERS)} (default all)",
    )
    threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
    parser.add_argument("--threads", type=int, default=threads, help=f"of both sides (default {threads})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
