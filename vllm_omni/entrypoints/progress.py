"""Progress bars while stages load and requests run: on a terminal or in a notebook, and only for what takes a while."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from vllm_omni.executor.loading_step import LoadingStep
from vllm_omni.request import OmniOutput

DELAY_S = 0.5


class _Bar:
    """A context manager around a bar of tqdm."""

    def __init__(self, name: str, total: int, unit: str, is_wanted: bool) -> None:
        from tqdm.auto import tqdm  # which is a widget in a notebook that has them

        self.is_shown = is_wanted and can_show_bars()
        self._bar: Any = tqdm(
            total=total, desc=name, unit=unit, disable=not self.is_shown, delay=DELAY_S, leave=False, dynamic_ncols=True
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


class LoadingBar(_Bar):
    """How many stages of a config are loaded, and what is being loaded."""

    def __init__(self, name: str, num_stages: int, is_wanted: bool) -> None:
        super().__init__(f"loading {name}", num_stages, "stage", is_wanted)
        self._num_begun = 0

    def show(self, step: LoadingStep) -> None:
        self._bar.update(int(self._num_begun > 0))
        self._num_begun += 1
        self._bar.set_postfix_str(str(step))

    def __enter__(self) -> LoadingBar:
        return self


class ProgressBar(_Bar):
    """How many of several requests are done, or, of a single one, how many steps of its stages; feed it every output,
    partial and final.
    """

    def __init__(self, name: str, num_requests: int, is_wanted: bool) -> None:
        self._counts_steps = num_requests == 1
        super().__init__(name, num_requests, "step" if self._counts_steps else "request", is_wanted)

    def show(self, output: OmniOutput) -> None:
        if output.finished:
            self._bar.update(0 if self._counts_steps else 1)
            return
        if self._counts_steps and output.progress:
            self._bar.total = sum(progress.num_steps for progress in output.progress.values())
            self._bar.update(sum(progress.step for progress in output.progress.values()) - self._bar.n)
        steps = (f"{stage} {progress.step}/{progress.num_steps}" for stage, progress in output.progress.items())
        self._bar.set_postfix_str("  ".join(steps))

    def __enter__(self) -> ProgressBar:
        return self


def can_show_bars() -> bool:
    """Whether stderr is a terminal, or the interpreter that of a notebook (whose stderr is none)."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or "IPKernelApp" in getattr(shell, "config", {})
