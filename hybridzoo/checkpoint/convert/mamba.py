"""Mamba (arXiv 2312.00752) as transformers publishes it: state-spaces/mamba-*-hf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridzoo.checkpoint.convert import names
from hybridzoo.checkpoint.convert.base import Family, only_layer
from hybridzoo.checkpoint.convert.keys import Keys, activation, first_eos, write_activation
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError

# what the class falls back to; FalconMamba's are the same.
TABLE: dict[str, tuple[Any, Any]] = {
    "vocab_size": (int, 50280),
    "hidden_size": (int, 768),
    "state_size": (int, 16),
    "num_hidden_layers": (int, 32),
    "layer_norm_epsilon": (float, 1e-5),
    "eos_token_id": (Any, 0),
    "expand": (float, 2.0),
    "intermediate_size": (int | None, None),
    "conv_kernel": (int, 4),
    "use_bias": (bool, False),
    "use_conv_bias": (bool, True),
    "hidden_act": (str, "silu"),
    "residual_in_fp32": (bool, True),
    "time_step_rank": (Any, "auto"),
    "time_step_min": (float, 0.001),
    "time_step_max": (float, 0.1),
    "time_step_floor": (float, 1e-4),
    "tie_word_embeddings": (bool, True),
}
# initialisation, speed, and what the original config.json left behind beside its translation.
IDLE = (
    "time_step_(scale|init_scheme)|rescale_prenorm_residual|use_(mambapy|associative_scan)|"
    "d_model|d_inner|n_layer|ssm_cfg|fused_add_norm|pad_vocab_size_multiple|layer_types"
)
KEYS = Keys(family="mamba", table=TABLE, only={"rms_norm": True}, idle=IDLE)
# ours -> the key that says it, of the mixer and of the model; the classes of Mamba-2 share them.
MIXER = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "in_proj_bias": "use_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}
MODEL = {
    "d_model": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "residual_fp32": "residual_in_fp32",
    "eos_token_id": "eos_token_id",
}


def read_stack(options: Mapping[str, Any], family: str, layer: Mapping[str, Any]) -> HybridConfig:
    """A stack of one mixer, from the keys that every class of Mamba spells alike."""
    shared = {ours: options[key] for ours, key in MIXER.items()} | {
        "out_proj_bias": options["use_bias"],
        "activation": activation(options),
    }
    model = {ours: options[key] for ours, key in MODEL.items()}
    return HybridConfig(
        **model | {"eos_token_id": first_eos(options)},
        name=family,
        pattern=f"{options['num_hidden_layers']}M",
        layers={"M": {**shared, **layer}},
        tokenizer="tokenizer.json",
    )


def write_stack(config: HybridConfig, family: str, class_name: str, layer: Any) -> dict[str, Any]:
    """The keys that every class of Mamba spells alike."""
    return {
        "architectures": [class_name],
        "model_type": family,
        "num_hidden_layers": len(config.places),
        "hidden_act": write_activation(layer.activation),
        **{key: getattr(config, ours) for ours, key in MODEL.items()},
        **{key: getattr(layer, ours) for ours, key in MIXER.items()},
    }


def read_mixer(options: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a Mamba-1 mixer that no other class has."""
    rank, d_inner = options["time_step_rank"], options["intermediate_size"]
    # a stale expand beside the width (falcon-mamba-7b's 16) means nothing.
    width = {"expand": options["expand"]} if d_inner is None else {"d_inner": d_inner}
    return {"kind": "mamba1", "dt_rank": None if rank == "auto" else rank, **width}


def write_mixer(mamba: Any, d_model: int) -> dict[str, Any]:
    """The inverse of read_mixer."""
    d_inner, dt_rank = mamba.widths(d_model)
    # the class wants a whole expand, and lets the width beside it win.
    expand = max(1, d_inner // d_model)
    return {"intermediate_size": d_inner, "expand": expand, "time_step_rank": dt_rank}


def _read(published: Mapping[str, Any]) -> HybridConfig:
    if "mixer_rms_eps" in published:
        raise CheckpointError(
            "mixer_rms_eps is a key of falcon_mamba, but model_type is mamba, which has no norms "
            "on dt, B and C. Set model_type to falcon_mamba if that is what the weights are."
        )
    options = KEYS.read(published)
    return read_stack(options, "mamba", read_mixer(options))


def _write(config: HybridConfig) -> dict[str, Any]:
    mamba = only_layer(config, "mamba", "mamba1")
    keys = write_stack(config, "mamba", "MambaForCausalLM", mamba)
    return dict(sorted({**keys, **write_mixer(mamba, config.d_model)}.items()))


MAMBA = Family(
    model_type="mamba",
    read=_read,
    write=_write,
    layer="backbone.layers.{}.",
    norms=("norm",),
    top=names.BACKBONE,
    kinds={"mamba1": names.mamba1("mixer.")},
)
