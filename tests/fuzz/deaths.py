"""Deaths of stages' processes, one after another in one living loop: which stage, in which phase and how is drawn. All
requests end in time, with what they come to undisturbed or with the cause; then all is as it was.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

from fuzz.mortal_loop import Given, MortalLoop
from fuzz.mortal_pipeline import LIMIT_S, SPEECH, Scene, pictures_and_speech

PHASES: Mapping[str, tuple[str, ...]] = {
    "writer": ("loading", "prefill", "decode", "idle"),
    "image": ("loading", "denoising", "idle"),
    "thinker": ("loading", "prefill", "decode", "streaming", "idle"),
    "talker": ("loading", "prefill", "decode", "streaming", "idle"),
    "token2wav": ("loading", "denoising", "streaming", "idle"),
}
WAYS: Mapping[str, signal.Signals] = {
    "SIGKILL": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
    "exception": signal.SIGUSR1,
    "SystemExit": signal.SIGUSR2,
}
NOTICED_S = 2.0  # the latest; half of it is what is promised, as much for a machine that others use too
LOADS_S = 2.0  # in which a process imports and loads, about


@dataclass
class Death:
    """Times are seconds. Of a process that dies twice, the second time loading, they count from then."""

    stage: str
    phase: str
    way: str
    replica: int = 0
    pid: int = 0
    killed_s: float | None = None  # when; None: what it was meant to meet had ended
    noticed_s: float | None = None  # after how long its stage knew; None: an exception, which ends no process
    served_s: float = 0.0  # after how long it took tasks again, and all requests had ended
    ends: Counter[str] = field(default_factory=Counter)  # of the requests, in a word each

    @property
    def is_sudden(self) -> bool:
        """Whether the process ends, or stands still, at once; the others wait for a step."""
        return self.way in ("SIGKILL", "SIGSTOP")


class Deaths:
    """Of the stages of a scene."""

    def __init__(self, scene: Scene | None = None) -> None:
        self._world = MortalLoop(pictures_and_speech() if scene is None else scene)
        self._stages = list(self._world.statuses())
        self.deaths: list[Death] = []

    def __call__(self, random: Random) -> str:
        stage = random.choice(self._stages)
        death = Death(stage, random.choice(PHASES[stage]), random.choice(list(WAYS)))
        self.die(death, random)
        return f"{death.phase}, {death.way}: {', '.join(sorted(death.ends)) or 'came too late'}"

    def close(self) -> None:
        self._world.close()

    def die(self, death: Death, random: Random) -> None:
        """Raises AssertionError for whatever is not as it should be."""
        try:
            self._die(death, random)
        finally:
            self._world.forget()

    def _die(self, death: Death, random: Random) -> None:
        world = self._world
        rebuilds, counts = self._rebuilds(), world.counts()
        given = self._draw(death, random)
        if death.phase in ("loading", "idle"):
            death.replica = random.randrange(len(world.statuses()[death.stage]["replicas"]))
            if death.phase == "loading":
                self._load_again(death, random)
            self._kill(death)
            self._run_for(death, random.choice([0.0, random.uniform(0.0, 1.0)]))
            world.submit(given)
        else:
            world.submit(given)
            self._reach(death, given[0], random)
            death.replica = world.loop._stages[death.stage]._replica_of.get(given[0].request.request_id, 0)
            if given[0].ended_s is None:
                self._kill(death)
        world.run(lambda: all(each.ended_s for each in given), lambda: self._note(death))
        world.run(lambda: self._is_over(death), lambda: self._note(death))
        if death.killed_s is not None:
            death.served_s = time.monotonic() - death.killed_s
            death.ends.update(world.check_end(each, self._can_fail(death)) for each in given)
        world.serve([given[0].asked])  # which meets an exception that has waited for a step
        world.run(lambda: not world.loop.is_mending)
        self._check(death, rebuilds, counts)
        world.check_rest()
        self.deaths.append(death)

    def _draw(self, death: Death, random: Random) -> list[Given]:
        """The first is one that the stage works for, and told of step by step; some of the others have little time."""
        able = [each for each in self._world.known if death.stage in self._world.stages_of(each)]
        given = [self._world.given(random.choice(able), stream=True)]
        for each in random.choices(self._world.known, k=random.randrange(4)):
            timeout_s = random.uniform(0.2, 1.5) if random.random() < 0.25 else LIMIT_S
            given.append(self._world.given(each, random.random() < 0.5, timeout_s))
        return given

    def _load_again(self, death: Death, random: Random) -> None:
        """The process ends, and another is somewhere in its imports or its loading when this returns."""
        os.kill(self._place(death)["pid"], signal.SIGKILL)
        before = self._place(death)["num_rebuilds"]
        self._world.run(lambda: self._place(death)["num_rebuilds"] > before and self._place(death)["pid"])
        until = time.monotonic() + random.uniform(0.0, LOADS_S)
        self._world.run(lambda: time.monotonic() >= until or self._place(death)["state"] == "ready")

    def _reach(self, death: Death, given: Given, random: Random) -> None:
        """Until the phase has come, and gone on for a while, or the request has ended."""
        name, stage = given.request.request_id, self._world.loop._stages[death.stage]
        least = {"prefill": 0, "streaming": random.randint(1, 3)}.get(death.phase, random.randint(1, 8))

        def has_come() -> bool:
            if death.phase == "streaming":
                parts = self._world.parts(given)
                return sum(bool(part.audios if given.asked.outputs == SPEECH else part.text) for part in parts) >= least
            return name in stage._replica_of and _num_told(stage.tasks[name]) >= least

        self._world.run(lambda: given.ended_s or has_come())

    def _kill(self, death: Death) -> None:
        death.pid, death.killed_s = self._place(death)["pid"], time.monotonic()
        os.kill(death.pid, WAYS[death.way])

    def _run_for(self, death: Death, time_s: float) -> None:
        until = time.monotonic() + time_s
        self._world.run(lambda: time.monotonic() >= until, lambda: self._note(death))

    def _note(self, death: Death) -> None:
        if death.killed_s is None or death.noticed_s is not None or not death.is_sudden:
            return
        place = self._place(death)
        if death.phase == "loading":  # its stage was not ready before either
            is_noticed = (
                self._world.loop._stages[death.stage].hosts[death.replica].is_hopeless or place["pid"] != death.pid
            )
        else:
            is_noticed = place["state"] != "ready"
        if is_noticed:
            death.noticed_s = time.monotonic() - death.killed_s

    def _is_over(self, death: Death) -> bool:
        """All is mended; a stage that has no work left may not know yet that its process stands still."""
        is_expected = death.killed_s is not None and death.is_sudden and death.noticed_s is None
        if is_expected and time.monotonic() - (death.killed_s or 0.0) < 2 * NOTICED_S:
            return False
        return not self._world.loop.is_mending

    def _place(self, death: Death) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._world.statuses()[death.stage]["replicas"][death.replica]
        return found

    def _rebuilds(self) -> Mapping[tuple[str, int], int]:
        return {
            (name, number): replica["num_rebuilds"]
            for name, status in self._world.statuses().items()
            for number, replica in enumerate(status["replicas"])
        }

    def _can_fail(self, death: Death) -> bool:
        """Requests are refused while a stage that had no task is rebuilt, and end when that fails."""
        return death.phase in ("loading", "idle")

    def _check(self, death: Death, rebuilds: Mapping[tuple[str, int], int], counts: Counter[str]) -> None:
        now = self._rebuilds()
        more = {place: now[place] - rebuilds[place] for place in now if now[place] != rebuilds[place]}
        assert more.keys() <= {(death.stage, death.replica)}, f"others were rebuilt: {more}"
        if death.killed_s is not None and death.is_sudden:
            expected = 2 if death.phase == "loading" else 1
            assert expected - 1 <= sum(more.values()) <= expected and self._place(death)["pid"] != death.pid
            assert death.noticed_s is not None and death.noticed_s < NOTICED_S, f"noticed after {death.noticed_s} s"
        ended, told = self._world.ended(), self._world.counts() - counts
        assert ended == told, f"{ended} have ended, the metrics say {told}"


def _num_told(replay: Any) -> int:
    """Steps and rows that a task has told of, whichever it tells of."""
    steps = [words.step for words in replay._samples.values()]
    return max([*steps, *(rows.num_told for rows in replay._ports.values())], default=0)


def summary(deaths: Sequence[Death]) -> str:
    """A table: how many in which phase, how soon they were noticed and all was well again."""
    lines = ["| Phase | Deaths | Noticed, median and worst | All as before, median and worst |", "|---|---|---|---|"]
    met = [death for death in deaths if death.killed_s is not None]
    for phase in [*dict.fromkeys(phase for phases in PHASES.values() for phase in phases), "all"]:
        those = [death for death in met if phase in (death.phase, "all")]
        noticed = [death.noticed_s for death in those if death.noticed_s is not None]
        served = [death.served_s for death in those]
        lines.append(f"| {phase} | {len(those)} | {_spread(noticed)} | {_spread(served)} |")
    ends = sum((death.ends for death in met), Counter[str]())
    return "\n".join([*lines, "", ", ".join(f"{number} {end}" for end, number in ends.most_common())])


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f} s, {max(seconds):.2f} s" if seconds else "-"
