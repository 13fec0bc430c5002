"""A process that imports what its parent names, and forks children which have that from their first moment, and share
its memory: `python -m vllm_omni.utils.children.fork_server SOCKET PARENT IDLE_S`.

It has one thread and computes nothing, so that no lock is held and no library has threads while it forks. It ends with
its parent, its children end with it, and it ends by itself when it has had no child and no order for IDLE_S seconds.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from vllm_omni.utils.children.messages import read_message, write_message
from vllm_omni.utils.processes import die_with

MAX_FILES = 16  # that an order brings


def main(arguments: list[str]) -> None:
    control, parent, idle_s = map(int, arguments)
    die_with(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may have had its children's ends forgotten
    gc.disable()  # it imports, and nothing of that is garbage
    connection = socket.socket(fileno=control)
    children: set[int] = set()
    while children or _is_readable(connection, idle_s):
        order = read_message(connection)
        if order is None:
            return
        _import(order.get("imports", ()))
        if "reap" in order:
            pid, status = os.waitpid(order["reap"], 0)
            children.discard(pid)
            write_message(connection, {"status": os.waitstatus_to_exitcode(status)})
        elif "module" in order:
            child = _fork(connection, order)
            if child is not None:
                children.add(child)
            write_message(connection, {"pid": child})


def _import(names: Sequence[str]) -> None:
    """Modules, and "MODULE:NAME" for what a module imports when it is asked for it."""
    for name in names:
        with suppress(Exception):  # the child says what it misses
            module, _, attribute = name.partition(":")
            found = import_module(module)
            if attribute:
                getattr(found, attribute)


def _fork(connection: socket.socket, order: Mapping[str, Any]) -> int | None:
    """The new child's process id; None where there can be none."""
    _, files, _, _ = socket.recv_fds(connection, 1, MAX_FILES)
    gc.freeze()  # no child's search for garbage writes into memory that they share
    try:
        if len(files) < order["num_files"] or threading.active_count() > 1:
            return None
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            connection.close()
            _run(order["module"], files, server)
        return pid
    except OSError:  # no memory for another process
        return None
    finally:
        for file in files:
            os.close(file)


def _run(module: str, files: Sequence[int], server: int) -> NoReturn:
    """In the child."""
    status = 1
    try:
        die_with(server)
        gc.enable()
        *own, output, errors = files
        for number, file in ((1, output), (2, errors)):
            os.dup2(file, number)
            os.close(file)
        # anew, since the ones that are here may take what they write to for a file
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.argv = [module, *map(str, own), str(server)]
        import_module(module).main(sys.argv[1:])
        status = 0
    except BaseException:
        traceback.print_exc()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


if __name__ == "__main__":
    main(sys.argv[1:])
