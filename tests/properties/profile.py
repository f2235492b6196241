"""How long properties are looked at: a moment in `make test`, a hundred times as long with SKILLSD_PROPERTIES=torture."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

MORE = 100 if os.environ.get("SKILLSD_PROPERTIES") == "torture" else 1


def examples(n: int) -> settings:
    """`n` examples, the same in every run; with the torture profile 100 times as many."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=n * MORE, derandomize=True, deadline=None, database=None, suppress_health_check=checks)
