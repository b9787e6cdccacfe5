"""Jamba (arXiv 2403.19887): v0.1, 1.5 to 1.7, 2, Reasoning-3B, and the layout of the first remote code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybridzoo.checkpoint.convert.base import Conv, Family, compact
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.options import checked, suggest

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
# key -> type and default; what the class itself falls back to when a file leaves the key out.
_KEYS: dict[str, tuple[Any, Any]] = {
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
    "sliding_window": (int | None, None),
    "quantization_config": (Any, None),
    "eos_token_id": (Any, 2),
    "layers_block_type": (Any, None),
    "layer_types": (Any, None),
}
# keys that change nothing a forward computes.
_IGNORED = re.compile(
    "model_type|architectures|auto_map|(torch_)?dtype|transformers_version|_name_or_path|_attn_implementation.*|"
    "initializer_range|use_cache|output_(router_logits|attentions|hidden_states)|return_dict|(pad|bos)_token_id|"
    "max_position_embeddings|n_ctx|attention_dropout|num_logits_to_keep|calc_logits_for_entire_prompt|"
    "use_(mamba_kernels|mambapy|associative_scan)|chunk_size_feed_forward|problem_type|(id2label|label2id)|"
    "is_encoder_decoder"
)


def _read(published: Mapping[str, Any]) -> HybridConfig:
    options = _options(published)
    d, eps = options["hidden_size"], options["rms_norm_eps"]
    layers = {
        "M": {
            "kind": "mamba1",
            "d_state": options["mamba_d_state"],
            "d_conv": options["mamba_d_conv"],
            "expand": options["mamba_expand"],
            "dt_rank": None if options["mamba_dt_rank"] == "auto" else options["mamba_dt_rank"],
            "conv_bias": options["mamba_conv_bias"],
            "in_proj_bias": options["mamba_proj_bias"],
            "out_proj_bias": options["mamba_proj_bias"],
            "x_norm": "learned" if options["mamba_inner_layernorms"] else "none",
            "norm_eps": eps,
        },
        "A": {
            "kind": "attention",
            "n_heads": options["num_attention_heads"],
            "n_kv_heads": options["num_key_value_heads"],
            "head_dim": options["head_dim"],
        },
        "F": {
            "kind": "mlp",
            "d_ff": options["intermediate_size"],
            "activation": options["hidden_act"],
        },
        "E": {
            "kind": "moe",
            "d_ff": options["intermediate_size"],
            "activation": options["hidden_act"],
            "n_experts": options["num_experts"],
            "top_k": options["num_experts_per_tok"],
            # the family scores experts in the model's dtype.
            "router_fp32": False,
            "aux_loss": options["router_aux_loss_coef"],
        },
    }
    pairs = _pairs(options)
    eos = options["eos_token_id"]
    return HybridConfig(
        name="jamba",
        d_model=d,
        vocab_size=options["vocab_size"],
        pattern=compact(pairs),
        layers={k: v for k, v in layers.items() if any(k in pair for pair in pairs)},
        norm_eps=eps,
        tie_embeddings=options["tie_word_embeddings"],
        tokenizer="tokenizer.json",
        # of several ends, the first is the text's; the others are a chat template's.
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
    )


def _options(published: Mapping[str, Any]) -> dict[str, Any]:
    """Every key that matters, of the right type; CheckpointError on a key that is neither known nor known to be idle."""
    published = dict(published)
    if "num_local_experts" in published:
        published.setdefault("num_experts", published.pop("num_local_experts"))
    for key in published:
        if key not in _KEYS and not _IGNORED.fullmatch(key):
            raise CheckpointError(
                f"{key} is not a key of jamba ({published[key]!r}); {suggest(key, _KEYS)}an unknown key may "
                "change the function. Remove it if it does not."
            )
    options = {
        key: checked(key, published.get(key, default), hint, {"min": 0})
        for key, (hint, default) in _KEYS.items()
    }
    for key in ("sliding_window", "quantization_config"):
        if options[key] is not None:
            raise CheckpointError(
                f"{key} is set ({options[key]!r}); hybridzoo reads Jamba without it. Use a checkpoint "
                "that has it null."
            )
    act = options["hidden_act"]
    if act not in _ACTIVATIONS:
        raise CheckpointError(
            f"unknown hidden_act ({act!r}); {suggest(act, _ACTIVATIONS)}known: {', '.join(_ACTIVATIONS)}. "
            "Choose one of them."
        )
    options["hidden_act"] = _ACTIVATIONS[act]
    return options


def _pairs(options: Mapping[str, Any]) -> list[str]:
    """One pair of letters a published layer: its mixer and its feed-forward."""
    for key in ("attn", "expert"):
        period, offset = options[f"{key}_layer_period"], options[f"{key}_layer_offset"]
        if not 0 <= offset < period:
            raise CheckpointError(
                f"{key}_layer_offset ({offset}) must be smaller than {key}_layer_period ({period}). "
                "Mend config.json."
            )
    attention = (options["attn_layer_period"], options["attn_layer_offset"])
    experts = (options["expert_layer_period"], options["expert_layer_offset"])
    has_experts = options["num_experts"] > 1
    pairs = [
        ("A" if i % attention[0] == attention[1] else "M")
        + ("E" if has_experts and i % experts[0] == experts[1] else "F")
        for i in range(options["num_hidden_layers"])
    ]
    if not pairs:
        raise CheckpointError("num_hidden_layers: too small (0); a model has layers. Mend config.json.")
    names = (("mamba", "attention"), ("linear_attention", "full_attention"))
    spelled = [[pick[p[0] == "A"] for p in pairs] for pick in names]
    for key in ("layers_block_type", "layer_types"):
        if options[key] is not None and options[key] not in spelled:
            raise CheckpointError(
                f"{key} ({options[key]!r}) disagrees with attn_layer_period and attn_layer_offset; "
                "both say which layers are attention. Mend config.json."
            )
    if any(p[0] == "M" for p in pairs) and options["hidden_act"] != "silu":
        raise CheckpointError(
            f"hidden_act is {options['hidden_act']}; Mamba layers of Jamba would use it too, and mamba1 has "
            "silu only. Use a checkpoint with silu."
        )
    return pairs


def _write(config: HybridConfig) -> dict[str, Any]:
    kinds = [[branch.config for branch in place] for place in config.places]
    if len(kinds) % 2 or any(len(k) != 1 for k in kinds):
        raise CheckpointError(
            f"jamba: cannot express the pattern ({config.pattern}); every mixer is followed by one feed-forward layer. "
            "Save in the native layout."
        )
    mixers, ffns = [k[0] for k in kinds[::2]], [k[0] for k in kinds[1::2]]
    by_kind = {c.kind: c for c in (*mixers, *ffns)}
    mamba, attention = by_kind.get("mamba1"), by_kind.get("attention")
    mlp, moe = by_kind.get("mlp"), by_kind.get("moe")
    ffn: Any = moe or mlp
    attn_period, attn_offset = _period([c.kind == "attention" for c in mixers])
    expert_period, expert_offset = _period([c.kind == "moe" for c in ffns])
    published: dict[str, Any] = {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(mixers),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": config.eos_token_id,
        "attn_layer_period": attn_period,
        "attn_layer_offset": attn_offset,
        "expert_layer_period": expert_period,
        "expert_layer_offset": expert_offset,
        "num_experts": getattr(moe, "n_experts", 1),
        "num_experts_per_tok": getattr(moe, "top_k", 1),
        "router_aux_loss_coef": getattr(moe, "aux_loss", 0.001),
        "intermediate_size": getattr(ffn, "d_ff", 1),
        "hidden_act": {v: k for k, v in reversed(_ACTIVATIONS.items())}[
            getattr(ffn, "activation", "silu")
        ],
        **_write_mamba(mamba, config.d_model),
        **_write_attention(attention, config.d_model),
    }
    return dict(sorted(published.items()))


def _write_mamba(mamba: Any, d_model: int) -> dict[str, Any]:
    if mamba is None:
        return {}
    d_inner, dt_rank = mamba.widths(d_model)
    keys = {
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": d_inner // d_model,
        "mamba_dt_rank": dt_rank,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.in_proj_bias,
    }
    return keys if mamba.x_norm != "none" else {**keys, "mamba_inner_layernorms": False}


def _write_attention(attention: Any, d_model: int) -> dict[str, Any]:
    if attention is None:
        # transformers checks the heads even where no layer has any.
        return {"num_attention_heads": 1, "num_key_value_heads": 1}
    n_heads, n_kv_heads, head_dim = attention.widths(d_model)
    keys = {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads}
    return keys if head_dim * n_heads == d_model else {**keys, "head_dim": head_dim}


def _period(wanted: list[bool]) -> tuple[int, int]:
    """(period, offset) of the layers that are so; a layer that never comes has its turn after the last."""
    n = len(wanted)
    for period in range(1, n + 2):
        for offset in range(period):
            if [i % period == offset for i in range(n)] == wanted:
                return period, offset
    raise CheckpointError(
        "jamba: cannot express the pattern; its attention layers, and its experts, come once in a fixed period. "
        "Save in the native layout."
    )


JAMBA = Family(
    model_type="jamba",
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    norms=(
        "input_layernorm.weight",
        ("pre_ff_layernorm.weight", "pre_moe_layernorm.weight"),
    ),
    top={
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.final_layernorm.weight",
        "head.weight": "lm_head.weight",
    },
    kinds={
        "mamba1": {
            "in_proj.weight": "mamba.in_proj.weight",
            "in_proj.bias": "mamba.in_proj.bias",
            "conv_weight": Conv("mamba.conv1d.weight"),
            "conv_bias": "mamba.conv1d.bias",
            "x_proj.weight": "mamba.x_proj.weight",
            "dt_norm.weight": "mamba.dt_layernorm.weight",
            "B_norm.weight": ("mamba.b_layernorm.weight", "mamba.B_layernorm.weight"),
            "C_norm.weight": ("mamba.c_layernorm.weight", "mamba.C_layernorm.weight"),
            "dt_proj.weight": "mamba.dt_proj.weight",
            "dt_bias": "mamba.dt_proj.bias",
            "A_log": "mamba.A_log",
            "D": "mamba.D",
            "out_proj.weight": "mamba.out_proj.weight",
            "out_proj.bias": "mamba.out_proj.bias",
        },
        "attention": {
            "qkv_proj.weight": "self_attn.{q,k,v}_proj.weight",
            "out_proj.weight": "self_attn.o_proj.weight",
        },
        "mlp": {
            "gate_up_proj.weight": (
                "feed_forward.{gate,up}_proj.weight",
                "moe.experts.0.{gate,up}_proj.weight",
            ),
            "down_proj.weight": (
                "feed_forward.down_proj.weight",
                "moe.experts.0.down_proj.weight",
            ),
        },
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
