"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# PyTorch's threads, here and in the processes that tests start: on small networks more of them only wait for each
# other, and two workers run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test times itself: on a busy machine a slow example is not a wrong one. And a run can be repeated.
settings.register_profile("robustdice", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("robustdice")
