"""Mamba-2's tiny models: one group and several, Codestral's config, bounds on dt."""

from transformers import Mamba2Config, Mamba2ForCausalLM

from hybridzoo.checkpoint.convert import mamba2
from tests.families import hf
from tests.families.base import VOCAB, Family, Variant

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "state_size": 8,
    "num_heads": 8,
    "head_dim": 12,
    "n_groups": 4,
    "chunk_size": 8,
}
_EVERY = {
    "num_hidden_layers": 4,
    "state_size": 7,
    "layer_norm_epsilon": 2e-3,
    "expand": 3,
    "num_heads": 12,
    "n_groups": 2,
    "chunk_size": 5,
    "conv_kernel": 3,
    "use_bias": True,
    "use_conv_bias": False,
    "hidden_act": "gelu",
    "residual_in_fp32": False,
    "time_step_limit": (0.1, 0.9),
    "time_step_min": 0.01,
    "time_step_max": 0.2,
    "time_step_floor": 0.002,
    "tie_word_embeddings": True,
    "eos_token_id": 5,
}
# of these, norm_before_gate is wrong: weights and class gate first.
_CODESTRAL = {
    "intermediate_size": 96,
    "norm_before_gate": True,
    "rms_norm": True,
    "rescale_prenorm_residual": False,
    "time_step_init_scheme": "random",
    "time_step_scale": 1.0,
    "time_step_rank": 256,
}
_DEFAULTS = ("layer_norm_epsilon", "conv_kernel", "hidden_act", "expand", "time_step_limit")
_DEFAULTS += ("use_bias", "use_conv_bias", "tie_word_embeddings", "residual_in_fp32", "dtype")
_DEFAULTS += ("time_step_min", "time_step_max", "time_step_floor", "time_step_rank")


def _variant(options: dict, **how) -> Variant:
    return hf.variant((Mamba2Config, Mamba2ForCausalLM), {**_BASE, **options}, **how)


def _codestral(config: dict) -> dict:
    return hf.flat(config) | _CODESTRAL


def _sparse(config: dict) -> dict:
    return {k: v for k, v in config.items() if k not in _DEFAULTS}


MAMBA2 = Family(
    layout="mamba2",
    variants={
        "every": _variant(_EVERY),
        "plain": _variant({}),
        "one_group": _variant({"n_groups": 1, "tie_word_embeddings": True, "use_bias": True}),
        "codestral": _variant({"n_groups": 8}, edits=_codestral, seed=1),
        "limit": _variant({"time_step_limit": (0.0, 0.3)}),
        "sparse": _variant({}, edits=_sparse),
        "sharded": _variant({"n_groups": 2}, max_shard_size="60KB"),
        "bf16": _variant({}, half=True),
    },
    keys=frozenset(mamba2.KEYS.table),
    moves={
        "vocab_size": 127,
        "hidden_size": 64,
        "state_size": 8,
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 2e-2,
        "expand": 2,
        "num_heads": 6,
        "head_dim": 6,
        "n_groups": 3,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "time_step_limit": [0.1, 0.5],
        "tie_word_embeddings": False,
        "rms_norm": False,
    },
    idle={
        "chunk_size": 8,
        "residual_in_fp32": True,
        "time_step_min": 0.001,
        "time_step_max": 0.5,
        "time_step_floor": 0.003,
        "eos_token_id": [7, 8],
    },
)
