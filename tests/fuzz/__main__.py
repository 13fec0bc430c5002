"""`python -m fuzz [configs requests checkpoints server deaths soak] --seconds 600`, from the folder `tests`. The last
two take longer for each input, and run when they are named."""

from __future__ import annotations

import argparse
import sys
import time

from fuzz.checkpoints import Checkpoints
from fuzz.configs import Configs
from fuzz.deaths import Deaths, summary
from fuzz.requests import Requests
from fuzz.server import Server
from fuzz.soak import Soak
from fuzz.tally import HANG_S, Tally, limit_memory

FUZZERS = {"configs": Configs, "requests": Requests, "checkpoints": Checkpoints, "server": Server}
LONG = {"deaths": Deaths, "soak": Soak}  # of stages in processes
LIMITS_S = {"deaths": 150.0}  # a process that starts again imports all, which takes slow machines half a minute


def main() -> int:
    """0 when no fuzzer found a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(FUZZERS), metavar="NAME", help=", ".join([*FUZZERS, *LONG]))
    parser.add_argument("--seconds", type=float, default=60, help="for each")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--most", type=int, help="how many inputs")
    args = parser.parse_args()
    num_faults = 0
    for name in args.names:
        case = {**FUZZERS, **LONG}[name]()
        limit_memory(6 * 2**30)
        tally = Tally(name, args.seed, LIMITS_S.get(name, HANG_S)).run(
            case, seconds=args.seconds, first=args.first, most=args.most
        )
        print(tally.report(), flush=True)
        if isinstance(case, Deaths):
            print(summary(case.deaths))
        case.close()
        num_faults += len(tally.faults)
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
