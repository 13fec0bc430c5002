"""A follower's process: loads its part of a model, then computes what the first rank sends, until that is gone.

It lives no longer than the process that started it: the system kills it with that, and a closed socket ends it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vllm_omni import registry
from vllm_omni.config.schema import ParallelConfig
from vllm_omni.utils.children.messages import read_message, write_message
from vllm_omni.utils.device import current_device, set_threads
from vllm_omni.utils.processes import die_with
from vllm_omni.worker.parallel.layout import Place
from vllm_omni.worker.parallel.links import Links
from vllm_omni.worker.parallel.part import FollowerPart
from vllm_omni.worker.parallel.process import FAILED, READY
from vllm_omni.worker.parallel.ranks import Meeting

MAX_CAUSE = 2_000


def main(arguments: list[str]) -> None:
    """Descriptor of the inherited end of a socket pair; the process that started this one."""
    descriptor, parent = map(int, arguments)
    die_with(parent)
    connection = socket.socket(fileno=descriptor)
    orders = read_message(connection)
    if orders is None:
        return
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        run(orders, connection)
    except BaseException as error:
        words = f"{type(error).__name__}: {error}"
        write_message(connection, {"event": FAILED, "cause": words[:MAX_CAUSE]})
    os._exit(1)  # nothing here is worth waiting for the threads of libraries


def run(orders: dict[str, Any], connection: socket.socket) -> None:
    """Loads and follows; returns only by an error."""
    os.chdir(orders["folder"])
    sys.path[:] = orders["sys_path"]  # where the first rank finds its modules
    set_threads(orders["threads"])
    tensor, sequence, guidance = orders["parallel"]
    place = Place(ParallelConfig(tensor, sequence, guidance), orders["rank"])
    links = Links(place, torch.device(orders["device"]))
    made: type[FollowerPart] = registry.resolve("follower part", orders["part"]["kind"])
    with torch.inference_mode(), current_device(links.device):
        part = made(orders["part"], links)
        write_message(connection, {"event": READY})
        links.connect(Meeting(Path(orders["file"]), place.config.size), timedelta(seconds=orders["deadline_s"]))
        while True:
            part.step(*links.receive())


def _end_with(connection: socket.socket) -> None:
    """Ends this process when the first rank closes its end; it sends nothing more."""
    read_message(connection)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
