"""The ranks of a stage as its first rank has them: it starts the others, tells them of every step, and ends them.

A group that a rank has left, or that a step has left in the middle, is over: whoever steps it is told the cause, and
the stage is rebuilt with another. Knows no model.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.config.schema import ParallelConfig
from vllm_omni.errors import StageError
from vllm_omni.utils.device import current_threads, is_cpu, is_out_of_memory, rank_device, set_threads
from vllm_omni.worker.parallel.keeper import Keeper
from vllm_omni.worker.parallel.layout import Place
from vllm_omni.worker.parallel.links import Links
from vllm_omni.worker.parallel.ranks import Meeting

FILE = "ranks"
CAUSE_S = 1.0  # how long the end of a process may take to show after an operation with it has failed


class ParallelGroup:
    """Its followers begin to load when it is made; the first rank loads meanwhile, then both `connect`."""

    def __init__(
        self,
        config: ParallelConfig,
        device: torch.device,
        deadline_s: float,
        part: Mapping[str, Any],
        links: Links | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """device: of the first rank; the others have the next ones of CUDA, or the same CPU. deadline_s: that a rank
        may let the others wait within a step. part: what the followers run, see `follower.py`. links: those that a
        model which is loaded already was built with. wake: called from a thread when the group ends unasked.
        """
        self.links = links or Links(Place(config, 0), device)
        self._deadline_s = deadline_s
        self._folder = Path(tempfile.mkdtemp(prefix="omni-ranks-"))  # nobody else may enter it
        self._threads = current_threads()
        share = max(self._threads // config.size, 1)
        if is_cpu(device):
            set_threads(share)
        orders = [
            {
                "rank": rank,
                "parallel": [config.tensor, config.sequence, config.guidance],
                "file": str(self._folder / FILE),
                "device": str(rank_device(device, rank)),
                "deadline_s": deadline_s,
                "threads": share,
                "part": dict(part),
            }
            for rank in range(1, config.size)
        ]
        links_to_end = self.links

        def ended() -> None:
            links_to_end.disconnect()
            wake()

        self._keeper = Keeper(orders, ended)
        self._end = weakref.finalize(self, _end, self._keeper, self._folder, self._threads)

    def connect(self) -> None:
        """Waits until every rank is loaded, then for all of them; StageError with the cause where one is not."""
        if not self._keeper.wait_loaded():
            self.close()
            raise self._ended()
        with self.guarded():
            meeting = Meeting(self._folder / FILE, self.links.place.config.size)
            self.links.connect(meeting, timedelta(seconds=self._deadline_s))
        shutil.rmtree(self._folder, ignore_errors=True)

    def breakdown(self) -> StageError | None:
        """Why it can compute nothing any more; from any thread."""
        return self._ended() if self._keeper.has_ended else None

    def send(self, plain: Any, tensors: Sequence[Tensor]) -> None:
        """Has every other rank compute what its part of the model makes of a message. Only within `guarded`."""
        self.links.send(plain, tensors)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A step of all ranks. One that is left by an error leaves the ranks at different places: the group is over."""
        over = self.breakdown()
        if over is not None:
            raise over
        try:
            yield
        except BaseException as error:
            cause = self._cause(error)
            self.close()
            if cause is None:
                raise
            raise cause from error

    @property
    def pids(self) -> list[int]:
        """Of the followers."""
        return self._keeper.pids

    def close(self) -> None:
        """Ends the followers and waits for that; may be called twice."""
        self._end()

    def _cause(self, error: BaseException) -> StageError | None:
        """What ended a step, where that was another rank."""
        if not isinstance(error, RuntimeError) or is_out_of_memory(error):
            return None
        if self._keeper.wait_ended(0.0 if _is_silence(error) else CAUSE_S):
            return self._ended()
        if not _is_silence(error):
            return None
        stopped = self._keeper.stopped_ranks
        words = f"rank {stopped[0]} of {self.links.place.config.size}, which is stopped," if stopped else "another rank"
        self._keeper.cause = f"{words} did not answer within {self._deadline_s:g} s"
        return self._ended()

    def _ended(self) -> StageError:
        return StageError(f"the ranks that share its model have ended: {self._keeper.cause or 'they were closed'}")


def _is_silence(error: RuntimeError) -> bool:
    """Whether an operation with other ranks has waited too long."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def _end(keeper: Keeper, folder: Path, threads: int) -> None:
    keeper.end()
    set_threads(threads)
    shutil.rmtree(folder, ignore_errors=True)
