"""The families' tiny models, each built once a session, with ours beside the reference."""

import pytest
import torch

from tests.families import tiny
from tests.families.base import opened


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Builds a variant of a family: (layout, variant) -> (its Tiny, our model in fp32)."""
    cache = {}

    def make(layout, variant):
        if (layout, variant) not in cache:
            built = tiny(layout, variant, tmp_path_factory.mktemp(f"{layout}-{variant}"))
            cache[layout, variant] = built, opened(built.directory, dtype=torch.float32)
        return cache[layout, variant]

    return make
