"""Mamba's and FalconMamba's tiny models: one table of options, two classes."""

from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hybridzoo.checkpoint.convert import falcon_mamba, mamba
from tests.families import hf
from tests.families.base import VOCAB, Family, Variant

_BASE = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8}
_EVERY = {
    "num_hidden_layers": 4,
    "state_size": 7,
    "layer_norm_epsilon": 2e-3,
    "expand": 3,
    "conv_kernel": 3,
    "use_bias": True,
    "use_conv_bias": False,
    "hidden_act": "gelu",
    "residual_in_fp32": False,
    "time_step_rank": 5,
    "time_step_min": 0.01,
    "time_step_max": 0.2,
    "time_step_floor": 0.002,
    "tie_word_embeddings": False,
    "eos_token_id": 5,
}
_FALCON = {"mixer_rms_eps": 3e-2}
# what original files left in their translations; the width beside expand wins.
_STALE = {
    "d_model": 2048,
    "d_inner": 7,
    "expand": 16,
    "n_layer": 24,
    "ssm_cfg": {},
    "fused_add_norm": True,
    "rms_norm": True,
    "pad_vocab_size_multiple": 8,
    "time_step_init_scheme": "random",
    "time_step_scale": 1.0,
}
# the classes fall back to these where a file leaves them out.
_DEFAULTS = ("layer_norm_epsilon", "conv_kernel", "hidden_act", "expand", "intermediate_size")
_DEFAULTS += ("use_bias", "use_conv_bias", "time_step_rank", "tie_word_embeddings")
_DEFAULTS += ("mixer_rms_eps", "residual_in_fp32", "dtype", "time_step_min", "time_step_max")


def _mamba(options: dict, **how) -> Variant:
    return hf.variant((MambaConfig, MambaForCausalLM), {**_BASE, **options}, **how)


def _falcon(options: dict, **how) -> Variant:
    return hf.variant((FalconMambaConfig, FalconMambaForCausalLM), {**_BASE, **options}, **how)


def _stale(config: dict) -> dict:
    return hf.flat(config) | _STALE


def _sparse(config: dict) -> dict:
    return {k: v for k, v in config.items() if k not in _DEFAULTS}


def _first_names(_: object, tensors: dict) -> dict:
    return {n.replace("embeddings", "embedding"): t for n, t in tensors.items()}


_MOVES = {
    "vocab_size": 127,
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 3,
    "layer_norm_epsilon": 2e-2,
    "intermediate_size": 96,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_rank": 6,
    "tie_word_embeddings": True,
    "rms_norm": False,
}
_IDLE = {
    "expand": 2,
    "residual_in_fp32": True,
    "time_step_min": 0.001,
    "time_step_max": 0.5,
    "time_step_floor": 0.003,
    "eos_token_id": [7, 8],
}
MAMBA = Family(
    layout="mamba",
    variants={
        "every": _mamba(_EVERY),
        "plain": _mamba({}),
        "bias": _mamba({"use_bias": True}),
        "untied": _mamba({"tie_word_embeddings": False}),
        "stale": _mamba({"intermediate_size": 80}, edits=_stale, seed=1),
        "sparse": _mamba({}, edits=_sparse),
        "first_names": _mamba({}, change=_first_names),
        "sharded": _mamba({}, max_shard_size="60KB"),
        "bf16": _mamba({}, half=True),
    },
    keys=frozenset(mamba.KEYS.table),
    moves=_MOVES,
    idle=_IDLE,
)
FALCON_MAMBA = Family(
    layout="falcon_mamba",
    variants={
        "every": _falcon({**_EVERY, **_FALCON}),
        "plain": _falcon({}),
        "untied": _falcon({"tie_word_embeddings": False}, seed=2),
        "stale": _falcon({"intermediate_size": 80, **_FALCON}, edits=_stale, seed=1),
        "sparse": _falcon({}, edits=_sparse),
        "sharded": _falcon({}, max_shard_size="60KB"),
        "bf16": _falcon({}, half=True),
    },
    keys=frozenset(falcon_mamba.KEYS.table),
    moves={**_MOVES, "mixer_rms_eps": 3e-1},
    idle=_IDLE,
)
