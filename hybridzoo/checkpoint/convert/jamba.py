"""Jamba (arXiv 2403.19887): v0.1, 1.5 to 1.7, 2, Reasoning-3B; the first remote code's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridzoo.checkpoint.convert import names
from hybridzoo.checkpoint.convert.base import Family, compact
from hybridzoo.checkpoint.convert.keys import Keys, activation, first_eos, write_activation
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.options import shown

KEYS = Keys(
    family="jamba",
    table={
        "vocab_size": (int, 65536),
        "hidden_size": (int, 4096),
        "intermediate_size": (int, 14336),
        "num_hidden_layers": (int, 32),
        "num_attention_heads": (int, 32),
        "num_key_value_heads": (int | None, 8),
        "head_dim": (int | None, None),
        "hidden_act": (str, "silu"),
        "rms_norm_eps": (float, 1e-6),
        "router_aux_loss_coef": (float, 0.001),
        "tie_word_embeddings": (bool, False),
        "num_experts": (int, 16),
        "num_experts_per_tok": (int, 2),
        "expert_layer_period": (int, 2),
        "expert_layer_offset": (int, 1),
        "attn_layer_period": (int, 8),
        "attn_layer_offset": (int, 4),
        "mamba_d_state": (int, 16),
        "mamba_d_conv": (int, 4),
        "mamba_expand": (int, 2),
        "mamba_dt_rank": (Any, "auto"),
        "mamba_conv_bias": (bool, True),
        "mamba_proj_bias": (bool, False),
        "mamba_inner_layernorms": (bool, True),
        "eos_token_id": (Any, 2),
        "layers_block_type": (Any, None),
        "layer_types": (Any, None),
    },
    # beyond it a number is a typing error, refused before anything is listed.
    limits={"num_experts": {"min": 0, "max": 100_000}},
    only={"sliding_window": None},
    idle="output_router_logits|max_position_embeddings|n_ctx|attention_dropout|num_logits_to_keep|"
    "calc_logits_for_entire_prompt|use_(mamba_kernels|mambapy|associative_scan)",
)
# ours -> the key that says it.
_MAMBA = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "in_proj_bias": "mamba_proj_bias",
}


def _read(published: Mapping[str, Any]) -> HybridConfig:
    published = dict(published)
    if "num_local_experts" in published:
        published.setdefault("num_experts", published.pop("num_local_experts"))
    options = KEYS.read(published)
    pairs = _pairs(options)
    used = {letter for pair in pairs for letter in pair}
    return HybridConfig(
        name="jamba",
        d_model=options["hidden_size"],
        vocab_size=options["vocab_size"],
        pattern=compact(pairs),
        layers={letter: entry for letter, entry in _legend(options).items() if letter in used},
        norm_eps=options["rms_norm_eps"],
        tie_embeddings=options["tie_word_embeddings"],
        tokenizer="tokenizer.json",
        eos_token_id=first_eos(options),
    )


def _legend(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    act = activation(options)
    ffn = {"d_ff": options["intermediate_size"], "activation": act}
    rank = options["mamba_dt_rank"]
    mamba = {ours: options[key] for ours, key in _MAMBA.items()} | {
        "expand": options["mamba_expand"],
        "dt_rank": None if rank == "auto" else rank,
        "out_proj_bias": options["mamba_proj_bias"],
        "activation": act,
        "x_norm": "learned" if options["mamba_inner_layernorms"] else "none",
        "norm_eps": options["rms_norm_eps"],
    }
    attention = {
        "n_heads": options["num_attention_heads"],
        "n_kv_heads": options["num_key_value_heads"],
        "head_dim": options["head_dim"],
    }
    experts = {
        "n_experts": options["num_experts"],
        "top_k": options["num_experts_per_tok"],
        "aux_loss": options["router_aux_loss_coef"],
        # the family scores experts in the model's dtype.
        "router_fp32": False,
    }
    return {
        "M": {"kind": "mamba1", **mamba},
        "A": {"kind": "attention", **attention},
        "F": {"kind": "mlp", **ffn},
        "E": {"kind": "moe", **ffn, **experts},
    }


def _pairs(options: Mapping[str, Any]) -> list[str]:
    """One pair of letters a published layer: its mixer and its feed-forward."""
    for key in ("attn", "expert"):
        period, offset = options[f"{key}_layer_period"], options[f"{key}_layer_offset"]
        if not 0 <= offset < period:
            raise CheckpointError(
                f"{key}_layer_offset ({offset}) must be smaller than {key}_layer_period "
                f"({period}). Mend config.json."
            )
    attention = (options["attn_layer_period"], options["attn_layer_offset"])
    experts = (options["expert_layer_period"], options["expert_layer_offset"])
    has_experts = options["num_experts"] > 1
    pairs = [
        ("A" if i % attention[0] == attention[1] else "M")
        + ("E" if has_experts and i % experts[0] == experts[1] else "F")
        for i in range(options["num_hidden_layers"])
    ]
    words = (("mamba", "attention"), ("linear_attention", "full_attention"))
    spelled = [[word[p[0] == "A"] for p in pairs] for word in words]
    for key in ("layers_block_type", "layer_types"):
        if options[key] is not None and options[key] not in spelled:
            raise CheckpointError(
                f"{key} ({shown(options[key])}) disagrees with attn_layer_period and "
                "attn_layer_offset; both say which layers are attention. Mend config.json."
            )
    return pairs


def _write(config: HybridConfig) -> dict[str, Any]:
    places = [[branch.config for branch in place] for place in config.places]
    if len(places) % 2 or any(len(place) != 1 for place in places):
        raise CheckpointError(
            f"jamba: cannot express the pattern ({config.pattern}); every mixer is followed by one "
            "feed-forward layer. Save in the native layout."
        )
    mixers, ffns = [p[0] for p in places[::2]], [p[0] for p in places[1::2]]
    by_kind = {c.kind: c for c in (*mixers, *ffns)}
    published = {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(mixers),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": config.eos_token_id,
        **_write_period("attn", [c.kind == "attention" for c in mixers]),
        **_write_period("expert", [c.kind == "moe" for c in ffns]),
        **_write_ffn(by_kind.get("moe"), by_kind.get("mlp")),
        **_write_mamba(by_kind.get("mamba1"), config.d_model),
        **_write_attention(by_kind.get("attention"), config.d_model),
    }
    return dict(sorted(published.items()))


def _write_ffn(moe: Any, mlp: Any) -> dict[str, Any]:
    ffn = moe or mlp
    keys: dict[str, Any] = {"num_experts": 1, "num_experts_per_tok": 1}
    if moe is not None:
        keys = {"num_experts": moe.n_experts, "num_experts_per_tok": moe.top_k}
        keys["router_aux_loss_coef"] = moe.aux_loss
    if ffn is not None:
        act = write_activation(ffn.activation)
        keys |= {"intermediate_size": ffn.d_ff, "hidden_act": act}
    return keys


def _write_mamba(mamba: Any, d_model: int) -> dict[str, Any]:
    if mamba is None:
        return {}
    d_inner, dt_rank = mamba.widths(d_model)
    keys = {key: getattr(mamba, ours) for ours, key in _MAMBA.items()}
    keys |= {"mamba_expand": d_inner // d_model, "mamba_dt_rank": dt_rank}
    return keys if mamba.x_norm != "none" else {**keys, "mamba_inner_layernorms": False}


def _write_attention(attention: Any, d_model: int) -> dict[str, Any]:
    if attention is None:
        # transformers checks the heads even where no layer has any.
        return {"num_attention_heads": 1, "num_key_value_heads": 1}
    n_heads, n_kv_heads, head_dim = attention.widths(d_model)
    keys = {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads}
    return keys if head_dim * n_heads == d_model else {**keys, "head_dim": head_dim}


def _write_period(key: str, wanted: list[bool]) -> dict[str, int]:
    """Period and offset of the layers that are so; one that never comes is due after the last."""
    n = len(wanted)
    for period in range(1, n + 2):
        for offset in range(period):
            if [i % period == offset for i in range(n)] == wanted:
                return {f"{key}_layer_period": period, f"{key}_layer_offset": offset}
    raise CheckpointError(
        "jamba: cannot express the pattern; its attention layers, and its experts, come once in a "
        "fixed period. Save in the native layout."
    )


JAMBA = Family(
    model_type="jamba",
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    norms=("input_layernorm", ("pre_ff_layernorm", "pre_moe_layernorm")),
    top={
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.final_layernorm.weight",
        "head.weight": "lm_head.weight",
    },
    kinds={
        "mamba1": {
            **names.mamba1("mamba."),
            "dt_norm.weight": "mamba.dt_layernorm.weight",
            "B_norm.weight": ("mamba.b_layernorm.weight", "mamba.B_layernorm.weight"),
            "C_norm.weight": ("mamba.c_layernorm.weight", "mamba.C_layernorm.weight"),
        },
        "attention": names.attention("self_attn."),
        # the first remote code has a mixture of one where the others have a plain layer.
        "mlp": names.either(names.gated_mlp("feed_forward."), names.gated_mlp("moe.experts.0.")),
        "moe": {
            "expert_up_weight": (
                "feed_forward.experts.{e}.{gate,up}_proj.weight",
                "feed_forward.experts.gate_up_proj",
                "moe.experts.{e}.{gate,up}_proj.weight",
            ),
            "expert_down_weight": (
                "feed_forward.experts.{e}.down_proj.weight",
                "feed_forward.experts.down_proj",
                "moe.experts.{e}.down_proj.weight",
            ),
            "router_weight": ("feed_forward.router.weight", "moe.router.weight"),
        },
    },
)
