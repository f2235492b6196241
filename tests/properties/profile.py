"""How long properties are looked at: a moment in `make test`; SKILLSD_PROPERTIES=n looks at n times as many examples."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

MORE = int(os.environ.get("SKILLSD_PROPERTIES", "1"))


def examples(n: int) -> settings:
    """`n` examples, the same in every run; with SKILLSD_PROPERTIES more of them, which are those of `--hypothesis-seed`."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=n * MORE, derandomize=MORE == 1, deadline=None, database=None, suppress_health_check=checks)
