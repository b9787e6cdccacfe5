"""Published model families: one file and one line a family."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hybridzoo.checkpoint.convert.base import Family
from hybridzoo.errors import CheckpointError
from hybridzoo.options import shown, suggest

# config.json's model_type -> where its Family is.
CONVERTERS = {
    "falcon_mamba": "hybridzoo.checkpoint.convert.falcon_mamba:FALCON_MAMBA",
    "jamba": "hybridzoo.checkpoint.convert.jamba:JAMBA",
    "mamba": "hybridzoo.checkpoint.convert.mamba:MAMBA",
    "mamba2": "hybridzoo.checkpoint.convert.mamba2:MAMBA2",
    "state_spaces": "hybridzoo.checkpoint.convert.state_spaces:STATE_SPACES",
}
# the model_type of our own directories.
MODEL_TYPE = "hybridzoo"


def family_of(published: Mapping[str, Any]) -> Family:
    """The family of a config.json: its model_type's, or the originals', which say none."""
    is_original = "model_type" not in published and {"d_model", "n_layer"} <= published.keys()
    return family("state_spaces" if is_original else published.get("model_type"))


def family(model_type: object) -> Family:
    """The family of a model_type; CheckpointError names the nearest and all that are known."""
    if not isinstance(model_type, str) or model_type not in CONVERTERS:
        known = [MODEL_TYPE, *sorted(CONVERTERS)]
        raise CheckpointError(
            f"unknown model_type ({shown(model_type)}); {suggest(shown(model_type), known)}"
            f"known: {', '.join(known)}. Convert it to one of these."
        )
    module, name = CONVERTERS[model_type].split(":")
    found: Family = getattr(import_module(module), name)
    return found
