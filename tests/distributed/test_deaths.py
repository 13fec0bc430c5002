"""Deaths of stages' processes, in every phase and way, at moments drawn from a seed. `make deaths` draws a hundred,
of all stages of two real pipelines.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from random import Random

import pytest
from fuzz.deaths import Death, Deaths
from fuzz.mortal_pipeline import plain_pictures

from vllm_omni.executor import recovery

SEED = 4
MOST_ATTEMPTS = 5
PAUSE_S = 0.05  # before a rebuild: nothing here is about how long that is

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def deaths(one_thread: None) -> Iterator[Deaths]:
    gc.collect()  # what other files' tests left open
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recovery, "FIRST_PAUSE_S", PAUSE_S)
        deaths = Deaths(plain_pictures())
        yield deaths
        deaths.close()


@pytest.mark.parametrize(
    ("stage", "phase", "way"),
    [
        ("writer", "prefill", "SIGKILL"),
        ("writer", "decode", "SIGSTOP"),
        ("writer", "streaming", "exception"),
        ("writer", "idle", "exception"),
        ("writer", "loading", "SIGKILL"),
        ("image", "denoising", "SystemExit"),
        ("image", "denoising", "exception"),
        ("image", "idle", "exception"),
    ],
)
def test_all_requests_end_and_all_is_as_before(deaths: Deaths, stage: str, phase: str, way: str) -> None:
    for attempt in range(MOST_ATTEMPTS):
        death = Death(stage, phase, way)
        deaths.die(death, Random(f"{SEED} {attempt} {stage} {phase} {way}"))
        if death.killed_s is not None:  # else the request had ended before the moment that was drawn
            assert death.ends
            return
    pytest.fail("no death met its phase")
