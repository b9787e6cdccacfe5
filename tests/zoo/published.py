"""What the published config.json of each model says, by its name in the zoo."""

from typing import Any

PILE = {"mamba-130m": (768, 24), "mamba-370m": (1024, 48), "mamba-790m": (1536, 48)}
PILE |= {"mamba-1.4b": (2048, 48), "mamba-2.8b": (2560, 64)}
PILE2 = {"mamba2-130m": (768, 24), "mamba2-370m": (1024, 48), "mamba2-780m": (1536, 48)}
PILE2 |= {"mamba2-1.3b": (2048, 48), "mamba2-2.7b": (2560, 64)}


def mamba(d_model: int, n_layers: int) -> dict[str, Any]:
    return {
        "architectures": ["MambaForCausalLM"],
        "bos_token_id": 0,
        "conv_kernel": 4,
        "eos_token_id": 0,
        "expand": 2,
        "fused_add_norm": True,
        "hidden_act": "silu",
        "hidden_size": d_model,
        "initializer_range": 0.1,
        "intermediate_size": 2 * d_model,
        "layer_norm_epsilon": 1e-05,
        "model_type": "mamba",
        "n_layer": n_layers,
        "num_hidden_layers": n_layers,
        "pad_token_id": 0,
        "pad_vocab_size_multiple": 8,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "rms_norm": True,
        "state_size": 16,
        "time_step_floor": 0.0001,
        "time_step_init_scheme": "random",
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": d_model // 16,
        "time_step_scale": 1.0,
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": 50280,
    }


def original(d_model: int, n_layers: int) -> dict[str, Any]:
    """mamba_ssm's own file; the first Mambas say no more."""
    return {
        "d_model": d_model,
        "n_layer": n_layers,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }


def original2(d_model: int, n_layers: int, **changes: Any) -> dict[str, Any]:
    return {
        **original(d_model, n_layers),
        "d_intermediate": 0,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
        **changes,
    }


MAMBA2ATTN = original2(
    2560,
    64,
    attn_layer_idx=[9, 18, 27, 36, 45, 56],
    attn_cfg={
        "causal": True,
        "d_conv": 4,
        "head_dim": 128,
        "num_heads": 30,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": 64,
    },
)
# what the translation from mamba_ssm's file left in state-spaces' own repositories
LEFT_BEHIND = ("fused_add_norm", "n_layer", "pad_vocab_size_multiple")
SEVEN_B = {key: value for key, value in mamba(4096, 64).items() if key not in LEFT_BEHIND}
CODESTRAL = SEVEN_B | {
    "architectures": ["Mamba2ForCausalLM"],
    "chunk_size": 256,
    "head_dim": 64,
    "model_type": "mamba2",
    "n_groups": 8,
    # stale: the weights gate first
    "norm_before_gate": True,
    "num_heads": 128,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, float("inf")],
    "vocab_size": 32768,
}
FALCON = {key: value for key, value in SEVEN_B.items() if key != "rms_norm"} | {
    "architectures": ["FalconMambaForCausalLM"],
    "eos_token_id": 11,
    # stale: intermediate_size holds
    "expand": 16,
    "model_type": "falcon_mamba",
    "pad_token_id": 11,
    "tie_word_embeddings": False,
    "vocab_size": 65024,
}
JAMBA = {
    "architectures": ["JambaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "model_type": "jamba",
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}


def jamba(**changes: Any) -> dict[str, Any]:
    assert changes.keys() <= JAMBA.keys()
    return JAMBA | changes


# transformers' files
PUBLISHED: dict[str, dict[str, Any]] = {
    **{name: mamba(*sizes) for name, sizes in PILE.items()},
    # its hidden_size is right, the key that the translation left behind is not
    "mamba-790m": {**mamba(*PILE["mamba-790m"]), "d_model": 2048},
    "codestral-mamba-7b": CODESTRAL,
    "falcon-mamba-7b": FALCON,
    "jamba-v0.1": JAMBA,
    "jamba-1.5-mini": jamba(eos_token_id=[2, 518]),
    "jamba-1.5-large": jamba(
        hidden_size=8192,
        intermediate_size=24576,
        mamba_dt_rank=512,
        num_attention_heads=64,
        num_hidden_layers=72,
    ),
    "jamba-reasoning-3b": jamba(
        attn_layer_offset=7,
        attn_layer_period=14,
        eos_token_id=[2, 519],
        hidden_size=2560,
        intermediate_size=8192,
        mamba_dt_rank=160,
        num_attention_heads=20,
        num_experts=1,
        num_experts_per_tok=1,
        num_hidden_layers=28,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "jamba-tiny-dev": jamba(
        hidden_size=512,
        intermediate_size=2048,
        mamba_dt_rank=32,
        num_attention_heads=8,
        num_experts=8,
        num_hidden_layers=16,
        num_key_value_heads=2,
    ),
    "jamba-tiny-random": jamba(
        attn_layer_offset=2,
        attn_layer_period=4,
        hidden_size=128,
        mamba_dt_rank=8,
        num_attention_heads=2,
        num_experts=4,
        num_hidden_layers=8,
        num_key_value_heads=1,
    ),
}
# mamba_ssm's own files, which say no model_type
ORIGINALS: dict[str, dict[str, Any]] = {
    **{name: original(*sizes) for name, sizes in PILE.items()},
    "mamba-2.8b-slimpj": original(2560, 64),
    **{name: original2(*sizes) for name, sizes in PILE2.items()},
    "mamba2attn-2.7b": MAMBA2ATTN,
}
