"""The nf4 probe, on a CPU."""

import pytest

from skillsd.policy.probe import nf4_error


def test_nf4_computes_and_is_quantised():
    """Sixteen levels a weight: Gaussian weights lose about a tenth, and not nothing."""
    assert 0.05 < nf4_error("cpu") < 0.15


def test_a_device_that_is_not_there():
    with pytest.raises(RuntimeError):
        nf4_error("nosuch")
