"""Random-operation tests must not fail because the machine is busy: no deadlines, no complaints about slow data."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
