"""From recorded steps to numbers: polynomials and ratios are found again, and what cannot be fitted is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.core.diffusion.caches.recording import StepRecord
from vllm_omni.entrypoints.calibration.fit import fit
from vllm_omni.errors import ConfigError


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 100))
def test_a_polynomial_is_found_again(coefficients: list[float], seed: int) -> None:
    changes = np.random.default_rng(seed).uniform(0.05, 1.0, 40)
    records = [StepRecord(1, float(x), float(np.polyval(coefficients, x)), 1.0) for x in changes]
    found = fit("teacache", records, 20, degree=len(coefficients) - 1)
    assert found.keys["fitted_steps"] == 20 and len(found.keys["coefficients"]) == len(coefficients)
    assert np.allclose(np.polyval(found.keys["coefficients"], changes), np.polyval(coefficients, changes), atol=1e-3)


def test_ratios_are_the_mean_of_every_step_and_the_first_is_1() -> None:
    records = [StepRecord(step, None, 0.1, ratio) for ratio, step in ((1.1, 1), (1.3, 1), (0.9, 2), (0.8, 2))]
    assert fit("magcache", records, 3, degree=4).keys == {"ratios": [1.0, 1.2, 0.85]}


@pytest.mark.parametrize(
    "policy, records, words",
    [
        (
            "teacache",
            [StepRecord(1, 0.1 * n, 0.2, 1.0) for n in range(4)],
            "got 4 measured steps, expected more",
        ),
        ("teacache", [StepRecord(1, 0.1, 0.2, 1.0)] * 9, "got 9 measured steps, expected more than 4"),
        ("teacache", [], "got 0 measured steps"),
        ("magcache", [StepRecord(1, None, 0.2, 1.0)], "nothing was measured of step 2 of 3"),
        ("magcache", [StepRecord(1, None, 0.2, float("nan"))], "not finite"),
    ],
)
def test_too_little_to_fit_is_an_error(policy: str, records: list[StepRecord], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit(policy, records, 3, degree=4)
