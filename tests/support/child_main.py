"""A child that does as it is told: over the socket whose number it gets, one message of `do` and what that needs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from vllm_omni.utils.children.messages import read_message, write_message
from vllm_omni.utils.processes import die_with


def main(arguments: list[str]) -> None:
    file, parent = map(int, arguments)
    die_with(parent)
    connection = socket.socket(fileno=file)
    order = read_message(connection) or {}
    if order["do"] == "tell":
        about = {"pid": os.getpid(), "parent": os.getppid(), "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
        about |= {"modules": list(sys.modules), "parents_threads": len(list(Path(f"/proc/{parent}/task").iterdir()))}
        about |= {"heeds_ctrl_c": signal.getsignal(signal.SIGINT) is not signal.SIG_IGN}
        write_message(connection, about)
    elif order["do"] == "print":
        print(order["text"])
        print(order["text"], "of errors", file=sys.stderr)
    elif order["do"] == "raise":
        raise ValueError(order["text"])
    elif order["do"] == "exit":
        os._exit(order["status"])
    write_message(connection, {"done": order["do"]})
    if order["do"] == "sleep":
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1:])
