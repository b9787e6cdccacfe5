"""Names that most families share for a kind's tensors, below the prefix that is their own."""

from __future__ import annotations

from hybridzoo.checkpoint.convert.base import Conv, Template

# above the layers, in every class of Mamba; the original files and the first conversions of them
# say embedding.
BACKBONE: dict[str, Template | tuple[Template, ...]] = {
    "embed.weight": ("backbone.embeddings.weight", "backbone.embedding.weight"),
    "norm.weight": "backbone.norm_f.weight",
    "norm.bias": "backbone.norm_f.bias",
    "head.weight": "lm_head.weight",
}


def mamba1(prefix: str) -> dict[str, Template]:
    """A Mamba-1 mixer as transformers names it."""
    same = ("in_proj.weight", "in_proj.bias", "x_proj.weight", "dt_proj.weight", "A_log", "D")
    return {
        **{name: prefix + name for name in (*same, "out_proj.weight", "out_proj.bias")},
        "conv_weight": Conv(prefix + "conv1d.weight"),
        "conv_bias": prefix + "conv1d.bias",
        "dt_bias": prefix + "dt_proj.bias",
    }


def mamba2(prefix: str) -> dict[str, Template]:
    """A Mamba-2 mixer as transformers names it."""
    same = ("in_proj.weight", "in_proj.bias", "dt_bias", "A_log", "D", "norm.weight")
    return {
        **{name: prefix + name for name in (*same, "out_proj.weight", "out_proj.bias")},
        "conv_weight": Conv(prefix + "conv1d.weight"),
        "conv_bias": prefix + "conv1d.bias",
    }


def attention(prefix: str) -> dict[str, Template]:
    """Separate q, k, v and o projections."""
    ours = {"qkv_proj": "{q,k,v}_proj", "out_proj": "o_proj"}
    return {f"{k}.{w}": f"{prefix}{v}.{w}" for k, v in ours.items() for w in ("weight", "bias")}


def gated_mlp(prefix: str) -> dict[str, Template]:
    """Separate gate, up and down projections."""
    ours = {"gate_up_proj": "{gate,up}_proj", "down_proj": "down_proj"}
    return {f"{k}.{w}": f"{prefix}{v}.{w}" for k, v in ours.items() for w in ("weight", "bias")}


def either(*spellings: dict[str, Template]) -> dict[str, tuple[Template, ...]]:
    """The same parameters under several spellings, the newest first."""
    return {name: tuple(s[name] for s in spellings) for name in spellings[0]}
