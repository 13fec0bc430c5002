"""The process of one stage: `python -m vllm_omni.executor.process.child SOCKET PULSE PARENT`, started by its parent.

SOCKET and PULSE are descriptors, PARENT is the parent's process id. It ends with its parent, however that ends. What
takes long to import is imported after that is made sure.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from vllm_omni.executor.process.pulse import Pulse

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> NoReturn:
    end, pulse, parent = map(int, arguments)
    _die_with(parent)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    Pulse(pulse).beat_on(parent, lambda: os._exit(1))
    os.close(pulse)
    from vllm_omni.executor.process.service import Service

    Service(socket.socket(fileno=end)).run()
    # threads that still decode a file would keep it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _die_with(parent: int) -> None:
    """On Linux the kernel sees to it, even where this process is stopped; elsewhere its pulse does."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
