"""Fixtures of the kernels' tests."""

import pytest

from hybridzoo.kernels.selective_scan import cuda


@pytest.fixture(autouse=True)
def no_plans():
    """A plan holds its kernels, and tests put others in their place."""
    cuda._plan.cache_clear()
