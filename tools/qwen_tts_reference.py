"""Makes the answers of the qwen-tts package that Qwen3-TTS is tested against: `python -m tools.qwen_tts_reference`.

The package pins an old transformers, so it runs in an environment of its own (tools/peers.py makes it, where it is not
there yet). Everything lands in tests/models/qwen3_tts/data; tests/support/qwen3_tts.py reads it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import DEFAULT_FOLDER, QWEN_TTS
from tools.peers import make

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help=f"where environments are made (default {DEFAULT_FOLDER})"
    )
    folder = parser.parse_args(argv).folder
    if QWEN_TTS.versions(folder) is None:
        make(QWEN_TTS, folder)
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [str(QWEN_TTS.python(folder)), "-m", "tools.qwen_tts_answers"]
    variables = QWEN_TTS.variables(QWEN_TTS.root(folder), 1)
    return subprocess.run(command, env={**os.environ, **variables, **paths}, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
