"""Writes constraints.txt: the exact versions of the environment that runs this, in which the suite has passed.

`make pins` calls it. torch, and what only its CUDA builds bring, are left out, so that a CPU build may be taken.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
OLDEST_PINNED = (3, 11)  # made on an older or newer Python, some version would not run on another
LEFT_OUT = re.compile(r"(torch|triton|pip|setuptools|vllm-omni)$|(nvidia|cuda)-")
HEADER = """\
# Exact versions under which every check is green; `make setup` installs them. torch is left to pyproject.toml.
# To move them: `make pins` takes the newest versions, runs the suite with them, and rewrites this file.
"""


def main() -> None:
    if sys.version_info[:2] != OLDEST_PINNED:
        wanted = ".".join(map(str, OLDEST_PINNED))
        sys.exit(f"Python: got {sys.version.split()[0]}, expected {wanted}; make pins PYTHON=python{wanted}")
    found = {canonicalize_name(made.name): made.version for made in distributions()}
    lines = [f"{name}=={version}" for name, version in sorted(found.items()) if not LEFT_OUT.match(name)]
    CONSTRAINTS.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} versions in {CONSTRAINTS.name}")


if __name__ == "__main__":
    main()
