"""The original files of state-spaces/mamba*: MambaConfig's keys beside pytorch_model.bin.

Mamba, Mamba-2 and mamba2attn; FMS and fms-fsdp train Bamba in the same layout. ssm_cfg and attn_cfg
hold arguments of mamba_ssm's classes, whose defaults are not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from hybridzoo.checkpoint.convert import names
from hybridzoo.checkpoint.convert.base import Conv, Family, Reordered, compact
from hybridzoo.checkpoint.convert.keys import Keys
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.options import checked, shown

KEYS = Keys(
    family="state_spaces",
    table={
        "d_model": (int, 2560),
        "d_intermediate": (int, 0),
        "n_layer": (int, 64),
        "vocab_size": (int, 50277),
        "ssm_cfg": (dict, {}),
        "attn_layer_idx": (tuple[int, ...], []),
        "attn_cfg": (dict, {}),
        "rms_norm": (bool, True),
        "residual_in_fp32": (bool, True),
        "pad_vocab_size_multiple": (int, 8),
        "tie_embeddings": (bool, True),
    },
    limits={"n_layer": {"min": 1, "max": 10_000}, "pad_vocab_size_multiple": {"min": 1}},
    idle="fused_add_norm",
)
_MIXER: dict[str, tuple[Any, Any]] = {
    "expand": (float, 2.0),
    "d_conv": (int, 4),
    "conv_bias": (bool, True),
    "bias": (bool, False),
    "dt_min": (float, 1e-3),
    "dt_max": (float, 0.1),
    "dt_init_floor": (float, 1e-4),
}
_LIMITS = {"expand": {"min": 0, "max": 2**16}}
# ssm_cfg's layer -> its other keys.
SSM = {
    "Mamba1": Keys(
        family="Mamba1",
        table={**_MIXER, "d_state": (int, 16), "dt_rank": (Any, "auto")},
        limits=_LIMITS,
        idle="layer|dt_init|dt_scale|use_fast_path",
    ),
    "Mamba2": Keys(
        family="Mamba2",
        table={
            **_MIXER,
            "d_state": (int, 128),
            "headdim": (int, 64),
            "ngroups": (int, 1),
            "d_ssm": (int | None, None),
            "rmsnorm": (bool, True),
            "norm_before_gate": (bool, False),
            "A_init_range": (tuple[float, float], [1.0, 16.0]),
            "dt_limit": (tuple[float, float], [0.0, float("inf")]),
            "chunk_size": (int, 256),
        },
        limits={**_LIMITS, "dt_limit": {"min": 0, "max": float("inf")}},
        only={"D_has_hdim": False},
        idle="layer|conv_init|use_mem_eff_path|sequence_parallel",
    ),
}
ATTENTION = Keys(
    family="MHA",
    table={
        **dict.fromkeys(("num_heads", "num_heads_kv", "head_dim"), (int | None, None)),
        **dict.fromkeys(("mlp_dim", "d_conv", "rotary_emb_dim"), (int, 0)),
        **dict.fromkeys(("qkv_proj_bias", "out_proj_bias"), (bool, True)),
        "softmax_scale": (float | None, None),
        "causal": (bool, False),
        "rotary_emb_base": (float, 10000.0),
    },
    only={"rotary_emb_interleaved": False},
)
# ours -> the argument.
_SAME = {k: k for k in ("d_state", "d_conv", "conv_bias", "dt_min", "dt_max", "dt_init_floor")}
_OF_MAMBA2 = {
    "head_dim": "headdim",
    "n_groups": "ngroups",
    "A_init": "A_init_range",
    "dt_limit": "dt_limit",
    "chunk_size": "chunk_size",
}
_OF_ATTENTION = {
    "n_heads": "num_heads",
    "n_kv_heads": "num_heads_kv",
    "head_dim": "head_dim",
    "qkv_bias": "qkv_proj_bias",
    "out_proj_bias": "out_proj_bias",
    "softmax_scale": "softmax_scale",
    "rope_theta": "rotary_emb_base",
}


def _read(published: Mapping[str, Any]) -> HybridConfig:
    options = KEYS.read(published)
    n, attends = options["n_layer"], set(options["attn_layer_idx"])
    if max(attends, default=0) >= n:
        rule = f"layers are counted from 0 to n_layer - 1 ({n - 1})"
        raise CheckpointError(f"attn_layer_idx: no such layer ({max(attends)}); {rule}. Mend it.")
    legend, ffn = {}, ""
    if len(attends) < n:
        legend["M"] = _within("ssm_cfg", _read_ssm, options)
    if attends:
        legend["A"] = _within("attn_cfg", _read_attention, options)
    if options["d_intermediate"]:
        legend["F"], ffn = {"kind": "mlp", "d_ff": _up(options["d_intermediate"], 128)}, "F"
    return HybridConfig(
        name="state_spaces",
        d_model=options["d_model"],
        vocab_size=_up(options["vocab_size"], options["pad_vocab_size_multiple"]),
        pattern=compact([("A" if i in attends else "M") + ffn for i in range(n)]),
        layers=legend,
        norm="rms_norm" if options["rms_norm"] else "layer_norm",
        # the package's own, which no key changes: eps, and one rounding, after the weight.
        norm_weight_fp32=options["rms_norm"],
        norm_eps=1e-5,
        tie_embeddings=options["tie_embeddings"],
        residual_fp32=options["residual_in_fp32"],
        tokenizer="tokenizer.json",
    )


def _within(key: str, read: Callable[..., dict[str, Any]], options: Mapping[str, Any]) -> Any:
    try:
        return read(options[key], options["d_model"])
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{key}: {error}") from None


def _read_ssm(published: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    layer = checked("layer", published.get("layer", "Mamba1"), Literal["Mamba1", "Mamba2"])
    options = SSM[layer].read(published)
    common = {ours: options[key] for ours, key in _SAME.items()} | {
        "expand": options["expand"],
        "in_proj_bias": options["bias"],
        "out_proj_bias": options["bias"],
    }
    if layer == "Mamba1":
        rank = options["dt_rank"]
        return {"kind": "mamba1", "dt_rank": None if rank == "auto" else rank, **common}
    if options["d_ssm"] not in (None, int(options["expand"] * d_model)):
        raise CheckpointError(
            f"d_ssm is set ({options['d_ssm']}); hybridzoo reads Mamba2 with expand * d_model "
            "only. Use a checkpoint that has it null."
        )
    norm = "norm_first" if options["norm_before_gate"] else "gate_first"
    own = {ours: options[key] for ours, key in _OF_MAMBA2.items()}
    return {"kind": "mamba2", **common, **own, "norm": norm if options["rmsnorm"] else "none"}


def _read_attention(published: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    options = ATTENTION.read(published)
    for key, needed in (("num_heads", "a number"), ("causal", "true")):
        if not options[key]:
            raise CheckpointError(
                f"{key} is missing or {shown(options[key])}; hybridzoo reads MHA with {needed} "
                "only, for a language model sees no later token. Mend config.json."
            )
    head_dim = options["head_dim"] or d_model // options["num_heads"]
    if options["rotary_emb_dim"] > head_dim:
        raise CheckpointError(
            f"rotary_emb_dim: ({options['rotary_emb_dim']}) must not exceed head_dim ({head_dim}). "
            "Mend config.json."
        )
    return {
        "kind": "attention",
        **{ours: options[key] for ours, key in _OF_ATTENTION.items()},
        "rope_fraction": options["rotary_emb_dim"] / max(head_dim, 1),
        "d_conv": options["d_conv"] or None,
        # mlp_dim counts up and gate.
        "parallel_d_ff": _up(options["mlp_dim"], 256) // 2 or None,
    }


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _write(config: HybridConfig) -> dict[str, Any]:
    layers: list[Any] = [branch.config for place in config.places for branch in place]
    mixers = [layer for layer in layers if layer.kind != "mlp"]
    kinds = {layer.kind for layer in mixers}
    if len(layers) > len(config.places) or not (
        kinds and any(kinds <= {ssm, "attention"} for ssm in ("mamba1", "mamba2"))
    ):
        raise CheckpointError(
            f"state_spaces: cannot express the pattern ({config.pattern}); it has one Mamba, and "
            "attention, each followed by an mlp, or none. Save in the native layout."
        )
    first = {layer.kind: layer for layer in reversed(layers)}
    written = {
        key: write(first[kind], config.d_model)
        for kind, (key, write) in _WRITERS.items()
        if kind in first
    }
    return {
        "d_model": config.d_model,
        "d_intermediate": first["mlp"].d_ff if "mlp" in first else 0,
        "n_layer": len(mixers),
        "vocab_size": config.vocab_size,
        **{"ssm_cfg": {}, "attn_cfg": {}, **written},
        "attn_layer_idx": [i for i, layer in enumerate(mixers) if layer.kind == "attention"],
        "rms_norm": config.norm == "rms_norm",
        "residual_in_fp32": config.residual_fp32,
        "fused_add_norm": True,
        # rows of padding are rows like others by now.
        "pad_vocab_size_multiple": 1 if config.vocab_size % 8 else 8,
        "tie_embeddings": config.tie_embeddings,
    }


def _write_mamba1(layer: Any, d_model: int) -> dict[str, Any]:
    d_inner, dt_rank = layer.widths(d_model)
    options = {theirs: getattr(layer, ours) for ours, theirs in _SAME.items()}
    options |= {"expand": _expand(d_inner, d_model), "bias": layer.in_proj_bias}
    options["dt_rank"] = "auto" if dt_rank == _up(d_model, 16) // 16 else dt_rank
    return {"layer": "Mamba1", **_changed(options, SSM["Mamba1"])}


def _write_mamba2(layer: Any, d_model: int) -> dict[str, Any]:
    expand = _expand(layer.widths(d_model)[0], d_model)
    if isinstance(expand, float):
        raise CheckpointError(
            f"state_spaces: cannot express d_inner ({layer.widths(d_model)[0]}) of this config; a "
            f"Mamba2's is a multiple of d_model ({d_model}). Save in the native layout."
        )
    options = {theirs: getattr(layer, ours) for ours, theirs in (_SAME | _OF_MAMBA2).items()} | {
        "expand": expand,
        "bias": layer.in_proj_bias,
        "rmsnorm": layer.norm != "none",
        "norm_before_gate": layer.norm == "norm_first",
    }
    return {"layer": "Mamba2", **_changed(options, SSM["Mamba2"])}


def _write_attention(layer: Any, d_model: int) -> dict[str, Any]:
    options = {theirs: getattr(layer, ours) for ours, theirs in _OF_ATTENTION.items()} | {
        "causal": True,
        "d_conv": layer.d_conv or 0,
        "mlp_dim": 2 * (layer.parallel_d_ff or 0),
        "rotary_emb_dim": layer.rotary_dim(d_model),
    }
    return _changed(options, ATTENTION)


_WRITERS = {
    "mamba1": ("ssm_cfg", _write_mamba1),
    "mamba2": ("ssm_cfg", _write_mamba2),
    "attention": ("attn_cfg", _write_attention),
}


def _expand(d_inner: int, d_model: int) -> float:
    return d_inner / d_model if d_inner % d_model else d_inner // d_model


def _changed(options: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """The options that differ from the package's defaults, as JSON has them."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return {key: value for key, value in plain.items() if value != keys.table[key][1]}


STATE_SPACES = Family(
    model_type="state_spaces",
    read=_read,
    write=_write,
    layer="backbone.layers.{}.",
    norms=("norm", "norm2"),
    top={**names.BACKBONE, "embed.weight": "backbone.embedding.weight"},
    kinds={
        "mamba1": names.mamba1("mixer."),
        "mamba2": names.mamba2("mixer."),
        "attention": {
            # rows q | k | v | up | gate: the value before the gate, here and in fc1.
            "qkv_proj.weight": Reordered("mixer.in_proj.weight", (0, 1, 2, 4, 3)),
            "qkv_proj.bias": Reordered("mixer.in_proj.bias", (0, 1, 2, 4, 3)),
            "conv_weight": Conv("mixer.conv1d.weight"),
            "conv_bias": "mixer.conv1d.bias",
            **{name: f"mixer.{name}" for name in ("out_proj.weight", "out_proj.bias")},
        },
        "mlp": {
            "gate_up_proj.weight": Reordered("mlp.fc1.weight", (1, 0)),
            "down_proj.weight": "mlp.fc2.weight",
        },
    },
    unsaid={"eos_token_id"},
    original=True,
)
