"""Mamba-2 (arXiv 2405.21060) as transformers publishes it, Codestral Mamba included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridzoo.checkpoint.convert import mamba, names
from hybridzoo.checkpoint.convert.base import Family, only_layer
from hybridzoo.checkpoint.convert.keys import Keys
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.options import strict

_OF_MAMBA1 = ("intermediate_size", "time_step_rank")
KEYS = Keys(
    family="mamba2",
    table={
        **{key: entry for key, entry in mamba.TABLE.items() if key not in _OF_MAMBA1},
        "vocab_size": (int, 32768),
        "hidden_size": (int, 4096),
        "state_size": (int, 128),
        "num_hidden_layers": (int, 64),
        "num_heads": (int, 128),
        "head_dim": (int, 64),
        "n_groups": (int, 8),
        "chunk_size": (int, 256),
        "eos_token_id": (Any, 2),
        "time_step_limit": (tuple[float, float], [0.0, float("inf")]),
        "tie_word_embeddings": (bool, False),
    },
    limits={"time_step_limit": {"min": 0, "max": float("inf")}},
    only={"rms_norm": True},
    # norm_before_gate: Codestral says true, its weights and the class gate first.
    idle=f"{mamba.IDLE}|{'|'.join(_OF_MAMBA1)}|norm_before_gate|(A|emb)_initializer_range|"
    "use_mem_eff_path",
)
# ours -> the key that says it.
_MIXER = {"head_dim": "head_dim", "n_groups": "n_groups", "chunk_size": "chunk_size"}


def _read(published: Mapping[str, Any]) -> HybridConfig:
    options = KEYS.read(published)
    width, heads = options["expand"] * options["hidden_size"], options["num_heads"]
    if width != heads * options["head_dim"]:
        raise CheckpointError(
            f"num_heads ({heads}) times head_dim ({options['head_dim']}) must be expand "
            f"({options['expand']:g}) times hidden_size ({options['hidden_size']}); both are the "
            "mixer's width. Mend config.json."
        )
    own = {ours: options[key] for ours, key in _MIXER.items()}
    own |= {"n_heads": heads, "dt_limit": options["time_step_limit"]}
    # the gated norm has the model's eps.
    own |= {"kind": "mamba2", "norm_eps": options["layer_norm_epsilon"]}
    return mamba.read_stack(options, "mamba2", own)


def _write(config: HybridConfig) -> dict[str, Any]:
    layer = only_layer(config, "mamba2", "mamba2")
    d_inner, n_heads = layer.widths(config.d_model)
    if d_inner % config.d_model:
        raise CheckpointError(
            f"mamba2: cannot express d_inner ({d_inner}) of this config; it must be a multiple of "
            f"d_model ({config.d_model}). Save in the native layout."
        )
    keys = mamba.write_stack(config, "mamba2", "Mamba2ForCausalLM", layer)
    keys |= {key: getattr(layer, ours) for ours, key in _MIXER.items()}
    keys |= {"num_heads": n_heads, "expand": d_inner // config.d_model}
    keys["time_step_limit"] = strict(layer.dt_limit)
    return dict(sorted(keys.items()))


MAMBA2 = Family(
    model_type="mamba2",
    read=_read,
    write=_write,
    layer="backbone.layers.{}.",
    norms=("norm",),
    top=names.BACKBONE,
    kinds={"mamba2": names.mamba2("mixer.")},
)
