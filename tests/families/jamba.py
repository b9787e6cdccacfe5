"""Jamba's tiny models: the class's own files, and the first remote code's."""

import torch
from transformers import JambaConfig, JambaForCausalLM

from hybridzoo.checkpoint.convert import jamba
from tests.families import hf
from tests.families.base import VOCAB, Family, Variant

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 1,
    "mamba_d_state": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
_EVERY = {
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "expert_layer_period": 3,
    "expert_layer_offset": 2,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "mamba_d_state": 7,
    "mamba_d_conv": 3,
    "mamba_expand": 3,
    "mamba_dt_rank": 5,
    "mamba_conv_bias": False,
    "mamba_proj_bias": True,
    "rms_norm_eps": 2e-3,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": 0.02,
    "hidden_act": "gelu",
    "eos_token_id": 5,
}
_EXPERTS = {"num_experts": 4, "num_hidden_layers": 4}


def _variant(options: dict, **how) -> Variant:
    return hf.variant((JambaConfig, JambaForCausalLM), {**_BASE, **options}, **how)


def _flat(config: dict) -> dict:
    return hf.flat({k: v for k, v in config.items() if k != "use_mambapy"}) | {
        "sliding_window": None,
        "n_ctx": 64,
        "calc_logits_for_entire_prompt": False,
        "num_logits_to_keep": 1,
    }


def _legacy(config: dict) -> dict:
    return _flat(config) | {"mamba_inner_layernorms": True}


def _plain(config: dict) -> dict:
    return _flat(config) | {"mamba_inner_layernorms": False}


def _without_inner_norms(model: JambaForCausalLM) -> None:
    for layer in model.model.layers:
        if hasattr(layer, "mamba"):
            for norm in ("dt_layernorm", "b_layernorm", "c_layernorm"):
                setattr(layer.mamba, norm, torch.nn.Identity())


def _legacy_names(_: object, tensors: dict) -> dict:
    return {_legacy_name(n): t for n, t in tensors.items()}


def _legacy_name(name: str) -> str:
    """A tensor's name in the first remote code, which calls a plain layer a mixture of one."""
    layer, found, rest = name.partition(".feed_forward.")
    if found:
        dense = not rest.startswith(("experts.", "router."))
        name = f"{layer}.moe.{'experts.0.' if dense else ''}{rest}"
    for new, old in (
        ("pre_ff_layernorm", "pre_moe_layernorm"),
        (".b_layernorm", ".B_layernorm"),
        (".c_layernorm", ".C_layernorm"),
    ):
        name = name.replace(new, old)
    return name


def _fused(model: JambaForCausalLM, tensors: dict) -> dict:
    """The experts in one tensor, as the class holds them in memory."""
    kept = {n: t for n, t in tensors.items() if ".experts." not in n}
    return kept | {n: t for n, t in model.state_dict().items() if "experts." in n}


# `legacy` and `fused` names are older, or newer, than what the class writes.
JAMBA = Family(
    layout="jamba",
    variants={
        "every": _variant(_EVERY, seed=53),
        "dense": _variant({"num_key_value_heads": 4}),
        "bias": _variant({"mamba_proj_bias": True}),
        "tied": _variant({"tie_word_embeddings": True}),
        "gqa": _variant({"num_key_value_heads": 1, "num_attention_heads": 8}, seed=1),
        "sharded": _variant(_EXPERTS, max_shard_size="120KB"),
        "flat": _variant(
            {"num_experts": 3, "num_hidden_layers": 4, "rms_norm_eps": 2e-3}, edits=_flat, seed=31
        ),
        "legacy": _variant(_EXPERTS, edits=_legacy, change=_legacy_names, reloads=False),
        "legacy_plain": _variant(
            _EXPERTS, edits=_plain, change=_legacy_names, alter=_without_inner_norms, reloads=False
        ),
        "fused": _variant(_EXPERTS, change=_fused, reloads=False),
        "attention_only": _variant(
            {
                "attn_layer_period": 1,
                "attn_layer_offset": 0,
                "hidden_act": "gelu",
                "num_experts": 3,
            },
            seed=11,
        ),
        "bf16": _variant({}, half=True),
    },
    keys=frozenset(jamba.KEYS.table),
    moves={
        "vocab_size": 127,
        "hidden_size": 128,
        "intermediate_size": 41,
        "num_hidden_layers": 7,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 5,
        "hidden_act": "silu",
        "rms_norm_eps": 2e-2,
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 4,
        "expert_layer_offset": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 6,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_inner_layernorms": False,
        "layers_block_type": ["mamba"] * 6,
        "layer_types": ["linear_attention"] * 6,
        "sliding_window": 8,
    },
    idle={"router_aux_loss_coef": 0.5, "eos_token_id": [7, 8]},
)
