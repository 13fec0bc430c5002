"""What the command line says on stderr."""

from __future__ import annotations

import sys

from vllm_omni.errors import OmniError


def complain(error: OmniError, where: str = "") -> None:
    """An error on one line."""
    say(f"error: {where}{' '.join(str(error).split())}")


def say(line: str, is_quiet: bool = False) -> None:
    if not is_quiet:
        print(line, file=sys.stderr)
