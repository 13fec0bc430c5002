"""`python -m vllm_omni` and `vllm-omni` are the command line."""

from vllm_omni.entrypoints.cli.interrupts import exit_on_interrupt
from vllm_omni.entrypoints.garbage import look_no_more, look_seldom

__all__ = ["run"]


def run() -> int:
    """One command; the exit code."""
    exit_on_interrupt()  # before anything else is imported, which takes seconds and minds being interrupted
    look_seldom()
    from vllm_omni.entrypoints.cli.app import main

    try:
        return main()
    finally:
        look_no_more()


if __name__ == "__main__":
    import sys

    sys.exit(run())
