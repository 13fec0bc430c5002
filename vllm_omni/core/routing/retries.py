"""Which of the tasks that an engine lost are run again, and which of these must run apart, so that one that breaks
every engine takes nobody along for long.

All tasks of an engine that breaks are run again, together: most often none of them is to blame. Where several such
break an engine again, each has one last run in which no other suspect is beside it, and who breaks that is to blame.
Knows no engine, no clock and no task but by its id.
"""

from __future__ import annotations

from collections.abc import Collection


class Retries:
    """Of one stage. A task is known from its first loss until `end`."""

    def __init__(self) -> None:
        self.total = 0  # runs that began again, since construction
        self._num_retries: dict[str, int] = {}
        self._suspects: set[str] = set()  # lost in company once more: they are tried apart
        self._trials: dict[int, str] = {}  # replica -> the suspect that it tries

    def lose(self, replica: int, lost: Collection[str]) -> set[str]:
        """The engine of a replica broke over these, at least one: those that are to be run again; the others end."""
        on_trial = self._trials.pop(replica, None)
        if on_trial in lost:
            again = set(lost) - {on_trial}
        else:
            retried = {task for task in lost if task in self._num_retries}
            again = set(lost) - (retried if len(retried) == 1 else retried & self._suspects)
            self._suspects |= again & retried
        for task in again:
            self._num_retries[task] = self._num_retries.get(task, 0) + 1
        self.total += len(again)
        return again

    def excuse(self, replica: int, lost: Collection[str]) -> None:
        """The engine of a replica was lost over a task of another stage: these run again, and it does not count."""
        self._trials.pop(replica, None)
        self.total += len(lost)

    def closed_to(self, task: str) -> Collection[int]:
        """The replicas on which a task may not begin now: to a suspect those that try another."""
        return self._trials.keys() if task in self._suspects else ()

    def begin(self, task: str, replica: int) -> None:
        """A task begins to run, again or for the first time."""
        if task in self._suspects:
            self._trials[replica] = task

    def acquit(self, task: str) -> None:
        """A task has come further than where it was lost: the next suspect may be tried beside it."""
        for replica in [replica for replica, tried in self._trials.items() if tried == task]:
            del self._trials[replica]

    def end(self, task: str) -> None:
        """Nothing is kept of a task any more; unknown ones are fine."""
        self.acquit(task)
        self._num_retries.pop(task, None)
        self._suspects.discard(task)

    def count(self, task: str) -> int:
        """How often a task has been run again."""
        return self._num_retries.get(task, 0)

    @property
    def num_known(self) -> int:
        """Tasks of which something is kept."""
        return len(self._num_retries)
