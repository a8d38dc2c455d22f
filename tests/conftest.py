"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test times itself: on a busy machine a slow example is not a wrong one. And a run can be repeated.
settings.register_profile("robustdice", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("robustdice")
