"""FalconMamba (arXiv 2410.05355): Mamba with weightless norms on dt, B and C.

No tensor tells it from Mamba: model_type alone does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridzoo.checkpoint.convert import mamba, names
from hybridzoo.checkpoint.convert.base import Family, only_layer
from hybridzoo.checkpoint.convert.keys import Keys
from hybridzoo.config import HybridConfig

KEYS = Keys(
    family="falcon_mamba",
    table={**mamba.TABLE, "mixer_rms_eps": (float, 1e-6)},
    only={"rms_norm": True},
    idle=f"{mamba.IDLE}|use_falcon_mambapy",
)


def _read(published: Mapping[str, Any]) -> HybridConfig:
    options = KEYS.read(published)
    norms = {"x_norm": "weightless", "norm_eps": options["mixer_rms_eps"]}
    return mamba.read_stack(options, "falcon_mamba", {**mamba.read_mixer(options), **norms})


def _write(config: HybridConfig) -> dict[str, Any]:
    layer = only_layer(config, "falcon_mamba", "mamba1")
    keys = mamba.write_stack(config, "falcon_mamba", "FalconMambaForCausalLM", layer)
    keys |= mamba.write_mixer(layer, config.d_model)
    return dict(sorted({**keys, "mixer_rms_eps": layer.norm_eps}.items()))


FALCON_MAMBA = Family(
    model_type="falcon_mamba",
    read=_read,
    write=_write,
    layer="backbone.layers.{}.",
    norms=("norm",),
    top=names.BACKBONE,
    kinds={"mamba1": names.mamba1("mixer.")},
)
