"""Fixtures of the kernels' tests."""

import pytest

from hybridzoo.kernels.selective_scan import bwd, fwd


@pytest.fixture(autouse=True)
def no_plans():
    """A plan holds its kernels, and tests put others in their place."""
    fwd._plan.cache_clear()
    bwd._plan.cache_clear()
