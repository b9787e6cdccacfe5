"""The published families' tiny models; a family is added by its file and a line here."""

from pathlib import Path

from tests.families.base import Tiny, make
from tests.families.jamba import JAMBA
from tests.families.mamba import FALCON_MAMBA, MAMBA
from tests.families.mamba2 import MAMBA2
from tests.families.state_spaces import STATE_SPACES

FAMILIES = {family.layout: family for family in (JAMBA, MAMBA, MAMBA2, FALCON_MAMBA, STATE_SPACES)}


def tiny(layout: str, variant: str, directory: Path) -> Tiny:
    """Build one variant of one family and save it."""
    return make(FAMILIES[layout].variants[variant], directory)
