"""Makes the environments of the peers that benchmarks compare with, outside the project's: `python -m tools.peers`.

pip finds the packages where it is set up to: torch is taken as a CPU build if pip is shown one (PIP_FIND_LINKS,
PIP_EXTRA_INDEX_URL).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.peers.environments import DEFAULT_FOLDER, LEFT_OUT, PEERS, TORCH, PeerEnvironment

# Run in the new environment: what the named packages ask for, all versions there.
ASKED_FOR = """
import json, sys
from importlib.metadata import requires
print(json.dumps([line for name in sys.argv[1:] for line in requires(name) or ()]))
"""
VERSIONS = """
import json
from importlib.metadata import distributions
print(json.dumps({made.name: made.version for made in distributions()}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(PEERS)} (default all)")
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help=f"where environments are made (default {DEFAULT_FOLDER})"
    )
    args = parser.parse_args(argv)
    for name in args.peers:
        if name not in PEERS:
            parser.error(f"PEER: got {name}, expected some of {', '.join(PEERS)}")
    failed = [name for name in args.peers or PEERS if not _is_made(PEERS[name], args.folder)]
    return 1 if failed else 0


def _is_made(peer: PeerEnvironment, folder: Path) -> bool:
    print(f"{peer.name}: {peer.root(folder)}", flush=True)
    try:
        make(peer, folder)
    except subprocess.CalledProcessError as error:
        print(f"{peer.name}: not made: `{' '.join(map(str, error.cmd))}` exited {error.returncode}")
        return False
    return True


def make(peer: PeerEnvironment, folder: Path) -> None:
    """Anew, if it is there already."""
    root = peer.root(folder)
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
    _install(peer, folder, "--no-deps", *peer.packages)
    names = [Requirement(package).name for package in peer.packages]
    _install(
        peer, folder, TORCH, *needed(json.loads(_said(peer, folder, ASKED_FOR, *names)), (*LEFT_OUT, *peer.left_out))
    )
    peer.versions_file(folder).write_text(_said(peer, folder, VERSIONS), encoding="utf-8")


def needed(requirements: Sequence[str], left_out: Sequence[str] = LEFT_OUT) -> list[str]:
    """What of them holds on this machine, without extras and without what is left out."""
    parsed = [Requirement(line) for line in requirements]
    return [
        f"{requirement.name}{_extras(requirement)}{requirement.specifier}"
        for requirement in parsed
        if requirement.name not in left_out
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _install(peer: PeerEnvironment, folder: Path, *arguments: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(f"{TORCH}\n")
        constraints.flush()
        pip = [str(peer.python(folder)), "-m", "pip", "install", "--quiet", "--constraint", constraints.name]
        subprocess.run([*pip, *arguments], check=True)


def _said(peer: PeerEnvironment, folder: Path, code: str, *arguments: str) -> str:
    command = [str(peer.python(folder)), "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
