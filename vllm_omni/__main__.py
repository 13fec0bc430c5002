"""`python -m vllm_omni` is the command line."""

import sys

from vllm_omni.entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main())
