"""This process's connection to Ray, of which there is one: made for the first who needs it, ended after the last.

A Ray that ran before goes on; one that was started here, since none was found, ends with the connection.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

from vllm_omni.config.schema import RayConfig
from vllm_omni.errors import ConfigError, StageError

CONNECT_S = 60.0
LOCAL = "local"  # the address that starts one
LEAVE_S = 20.0


def check_installed() -> None:
    """ConfigError where the package is missing."""
    if find_spec("ray") is None:
        raise ConfigError("executor: got 'ray', but Ray is not installed; pip install 'vllm-omni[ray]'")


class RayConnection:
    """Counts those who use it. Who has called `ray.init` before keeps that connection, and ends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, config: RayConfig) -> None:
        """For one user more; StageError where there is no Ray at that address."""
        import ray

        with self._lock:
            if self._num_users == 0 and not ray.is_initialized():
                self._connect(config)
            self._num_users += 1

    def exit(self) -> None:
        """One user less."""
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._thread is not None:
                self._leave.set()
                self._thread.join(LEAVE_S)
                self._thread = None

    def _connect(self, config: RayConfig) -> None:
        """In a thread that lives as long as the connection: on Linux what Ray starts here dies with the thread that
        started it.
        """
        self._leave.clear()
        connected: Future[None] = Future()
        self._thread = threading.Thread(target=self._stay, args=(config, connected), name="omni-ray", daemon=True)
        self._thread.start()
        try:
            connected.result(CONNECT_S)
        except Exception as error:
            self._leave.set()
            self._thread = None
            where = "this machine" if config.address is None else repr(config.address)
            raise StageError(f"no connection to Ray at {where} ({type(error).__name__}: {error})") from error

    def _stay(self, config: RayConfig, connected: Future[None]) -> None:
        import ray

        try:
            _init(config)
        except BaseException as error:
            connected.set_exception(error)
            return
        connected.set_result(None)
        self._leave.wait()
        ray.shutdown()


CONNECTION = RayConnection()  # as there is one Ray in a process, whoever uses it


def _init(config: RayConfig) -> None:
    import ray

    options: dict[str, Any] = {"namespace": config.namespace, "log_to_driver": True}
    address = config.address
    if address is None:
        try:
            ray.init(address="auto", **options)
            return
        except ConnectionError:  # none runs here
            address = LOCAL
    if address == LOCAL:
        options["include_dashboard"] = False
    ray.init(address=address, **options)
