"""A process that hosts stages, as its parent starts it: `python -m vllm_omni.executor.process.child CONTROL PULSE
PARENT`.

CONTROL and PULSE are descriptors, PARENT is the parent's process id. It ends with its parent, however that ends. What
takes long to import is imported after that is made sure.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import socket
import sys
from typing import NoReturn

from vllm_omni.executor.process.pulse import Pulse
from vllm_omni.utils.processes import die_with


def main(arguments: list[str]) -> NoReturn:
    control, pulse, parent = map(int, arguments)
    die_with(parent)  # where there is no Linux, its pulse does that
    faulthandler.enable()
    life = Pulse(pulse)
    life.beat_on(parent, lambda: os._exit(1))
    os.close(pulse)
    from vllm_omni.executor.process.service import Service

    Service(socket.socket(fileno=control), life.give_turn).run()
    # threads that still decode a file would keep it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
