"""A progress bar over requests, shown on a terminal only and only when the work takes a while."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from vllm_omni.request import OmniOutput

DELAY_S = 0.5


class ProgressBar:
    """A context manager; feed it every output, partial and final."""

    def __init__(self, name: str, num_requests: int, is_wanted: bool) -> None:
        self.is_shown = is_wanted and sys.stderr.isatty()
        self._bar = tqdm(
            total=num_requests, desc=name, unit="request", disable=not self.is_shown, delay=DELAY_S, leave=False
        )

    def show(self, output: OmniOutput) -> None:
        if output.finished:
            self._bar.update(1)
        steps = (f"{stage} {progress.step}/{progress.num_steps}" for stage, progress in output.progress.items())
        if not output.finished:
            self._bar.set_postfix_str("  ".join(steps))

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
