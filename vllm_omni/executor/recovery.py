"""When a broken stage is rebuilt: after a pause that doubles from one rebuild to the next, until a task has finished.

Rebuilds nothing itself, and takes the time as an argument.
"""

from __future__ import annotations

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0


class Recovery:
    """Of one stage. It is needed from `begin` on until `end`, and then again."""

    def __init__(self) -> None:
        self.cause: Exception | None = None  # why the stage is being rebuilt; None while it is not
        self.is_planned = False  # nothing is wrong: it was asked to be restarted
        self.has_failed = False  # the last attempt to rebuild it has
        self.is_loading = False  # the pause is over, and the new engine is on its way
        self.num_rebuilds = 0  # since construction, those that failed included
        self._pause_s = FIRST_PAUSE_S
        self._due_s = 0.0
        self._began_s = 0.0
        self._load_s = 0.0  # how long the last one took

    def begin(self, cause: Exception, now: float) -> None:
        """The stage is broken, or could not be rebuilt: it will be tried (again) after the pause."""
        self.has_failed = self.is_loading
        self.cause, self.is_loading, self.is_planned = cause, False, False
        self._due_s = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def plan(self, cause: Exception, now: float) -> None:
        """The stage is to be rebuilt though it is not broken: at once."""
        self.cause, self.is_loading, self.is_planned = cause, False, True
        self._due_s = now

    def is_due(self, now: float) -> bool:
        """Whether to begin loading."""
        return self.cause is not None and not self.is_loading and now >= self._due_s

    def load(self, now: float) -> None:
        """Loading begins."""
        self.is_loading, self._began_s = True, now
        self.num_rebuilds += 1

    def end(self, now: float) -> None:
        """The stage is rebuilt."""
        self._load_s = now - self._began_s
        self.cause, self.is_loading, self.is_planned, self.has_failed = None, False, False, False

    def succeed(self) -> None:
        """A task has finished: what happens from now on is another failure."""
        self._pause_s = FIRST_PAUSE_S

    def retry_after_s(self, now: float) -> float:
        """When the stage may take tasks again, as far as one can say."""
        begins_s = self._began_s if self.is_loading else self._due_s
        return max(0.0, begins_s + self._load_s - now)
