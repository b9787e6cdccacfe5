"""HybridConfig: text in and out, every mistake in one sentence, exact parameters, FLOPs and state bytes."""

# tables read as rows: one case a line
# ruff: noqa: E501

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.comm import Axis, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.kernels.dispatch import use
from hybridzoo.layers import KINDS, register
from hybridzoo.model import HybridLM
from tests.layers.cases import CASES, kept
from tests.models import make_config, make_model

MINI = """
name: mini
d_model: 16
vocab_size: 32
pattern: "2(MF) A"
layers:
  M: {kind: mamba2, head_dim: 8, dt_min: 1e-3}
  F: {kind: mlp, d_ff: 24}
  A: {kind: attention, n_heads: 4}
"""

# plain YAML 1.1 would read 1e-3 as text
PLAIN = yaml.safe_load(MINI.replace("1e-3", "0.001"))

jamba = {
    "M": {"kind": "mamba1", "x_norm": "learned", "norm_eps": 1e-6},
    "A": {"kind": "attention", "n_kv_heads": 8},
    "F": {"kind": "mlp"},
    "E": {"kind": "moe", "n_experts": 16, "top_k": 2},
}


def make_jamba(pattern, d_model, n_heads, d_ff, **change):
    layers = {k: dict(v) for k, v in jamba.items()}
    layers["A"]["n_heads"] = n_heads
    layers["F"]["d_ff"] = layers["E"]["d_ff"] = d_ff
    layers["A"] |= change.pop("A", {})
    return {
        "d_model": d_model,
        "vocab_size": 65536,
        "pattern": pattern,
        "layers": layers,
        "tie_embeddings": False,
    } | change


# total and active parameters: the families' cards and shared/research/family_sizes.json
FAMILIES = {
    "jamba-v0.1": (make_jamba("4(MFMEMFMEAFMEMFME)", 4096, 32, 14336), 51_570_323_328, 12_110_311_296),
    "jamba-1.5-large": (make_jamba("9(MFMEMFMEAFMEMFME)", 8192, 64, 24576), 398_555_145_696, 94_149_338_592),
    "jamba-3b": (
        make_jamba("2(7(MF) AF 6(MF))", 2560, 20, 8192, tie_embeddings=True, A={"n_kv_heads": 1}),
        3_029_337_472,
        3_029_337_472,
    ),
    "mamba-130m": (
        {"d_model": 768, "vocab_size": 50280, "pattern": "24M", "layers": {"M": {"kind": "mamba1"}}},
        129_135_360,
        129_135_360,
    ),
    "mamba2-130m": (
        {"d_model": 768, "vocab_size": 50288, "pattern": "24M", "layers": {"M": {"kind": "mamba2"}}},
        128_989_632,
        128_989_632,
    ),
    "codestral": (
        {
            "d_model": 4096, "vocab_size": 32768, "pattern": "64M", "tie_embeddings": False,
            "layers": {"M": {"kind": "mamba2", "n_groups": 8}},
        },
        7_285_403_648,
        7_285_403_648,
    ),
    "falcon-mamba-7b": (
        {
            "d_model": 4096, "vocab_size": 65024, "pattern": "64M", "tie_embeddings": False,
            "layers": {"M": {"kind": "mamba1", "x_norm": "weightless"}},
        },
        7_272_665_088,
        7_272_665_088,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_family_are_exact(family):
    options, total, active = FAMILIES[family]
    config = HybridConfig.from_dict(yaml.safe_load(yaml.safe_dump(options)))
    assert config.n_params() == total
    assert config.n_active_params() == active
    model = HybridLM(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == total


def test_a_shared_layer_counts_once_and_a_correction_bias_never():
    config = make_config()
    model = make_model(config)
    counted = [p for n, p in model.named_parameters() if "correction_bias" not in n]
    assert config.n_params() == sum(p.numel() for p in counted)
    assert config.n_params() < sum(p.numel() for p in model.parameters())
    # 6 experts, 2 a token: of their 2 * 8 * 16 + 16 * 8 weights each, 4 experts rest
    assert config.n_params() - config.n_active_params() == 4 * (2 * 8 * 16 + 16 * 8)


def one_letter(name):
    config = CASES[name]
    options = {"d_model": 16, "vocab_size": 23, "pattern": "X", "layers": {"X": config.to_dict()}}
    return HybridConfig.from_dict(options), config


def hand_count(config, seen):
    """Operations of one token outside matrix products, by hand from the equations."""
    if config.kind == "mamba1":
        i = config.d_inner or 32
        # taps; state: dt A, exp, dt x B (2), h + (2), C h (2) less the last addition; D x and silu(z) y
        return 2 * i * config.d_conv + 7 * i * config.d_state + 4 * i
    if config.kind == "mamba2":
        i, bc = 24, 2 * config.n_groups * config.d_state
        # taps over x, B, C; state: decay, x B, add, C h (2); skip, gate, and the norm's 4
        return (
            2 * (i + bc) * config.d_conv
            + 5 * i * config.d_state
            + (4 if config.norm == "none" else 8) * i
        )
    if config.kind == "mlp":
        return 2 * config.d_ff
    if config.kind == "moe":
        return 2 * (config.top_k * config.d_ff + (config.shared_d_ff or 0))
    # taps over q, k, v; of the hidden units beside the heads, the activation and the product
    h, hk, p = config.widths(16)
    return 2 * (h + 2 * hk) * p * (config.d_conv or 0) + 2 * (config.parallel_d_ff or 0)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_the_matrix_products_and_a_hand_count(name):
    config, layer = one_letter(name)
    model = HybridLM(config)
    # one token without a state: the references' scans use no matrix product there
    with use(attention="reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long))
    assert config.flops_per_token() == counter.get_total_flops() + hand_count(layer, 1)


def test_flops_of_attention_grow_with_the_keys_it_sees():
    config, _ = one_letter("attention-nope-full")
    # q is 4 heads of 6; scores and values each multiply and add
    assert config.flops_per_token(99) - config.flops_per_token() == 99 * 4 * 24
    window, _ = one_letter("attention")
    assert window.flops_per_token(99) - window.flops_per_token() == (7 - 1) * 4 * 24
    assert window.flops_per_token(3) - window.flops_per_token() == 3 * 4 * 24
    shared = make_config()
    assert shared.flops_per_token() > sum(
        b.config.flops(16, 0) for place in shared.places for b in place
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("context", [1, 37])
def test_state_bytes_are_those_of_the_tensors(context, dtype):
    config = make_config()
    states = HybridLM(config, dtype=dtype).init_state(3, context)
    # an attention cache holds one more row, the scratch that padding is written to: kept() drops it
    held = [t for place in states for state in place for t in kept(state).values()]
    assert config.state_bytes(context, 3, dtype) == sum(t.numel() * t.element_size() for t in held)


def test_jambas_state_is_small():
    config = HybridConfig.from_dict(FAMILIES["jamba-v0.1"][0])
    # 4 attention layers: keys and values of 8 heads of 128 in bf16; 28 Mamba layers of constant size
    growth = config.state_bytes(256 * 1024) - config.state_bytes(0)
    assert growth == 4 * 2 * 8 * 128 * 2 * 256 * 1024
    assert config.state_bytes(0) == 28 * (8192 * 16 * 4 + 3 * 8192 * 2) + 4 * 4


def read(text, folder, name="m.yaml"):
    path = folder / name
    path.write_text(text)
    return HybridConfig.load(path)


def test_yaml_and_json_say_the_same(tmp_path):
    config = read(MINI, tmp_path)
    assert config == read(
        json.dumps(PLAIN),
        tmp_path,
        "m.json",
    )
    assert config.layers["M"].dt_min == 1e-3
    assert len(config.expanded) == 5


def test_config_round_trips_through_text(tmp_path):
    config = make_config()
    plain = config.to_dict()
    assert HybridConfig.from_dict(plain) == config
    assert read(yaml.safe_dump(plain), tmp_path) == config
    # JSON makes text of the keys of layers_at
    assert read(json.dumps(plain), tmp_path, "m.json") == config
    assert plain["name"] == "every-kind"
    assert list(plain)[:5] == ["name", "d_model", "vocab_size", "pattern", "layers"]
    assert "dropout" not in plain
    assert HybridConfig.from_dict(plain).n_params() == config.n_params()


def test_a_branch_beside_a_shared_one_may_differ():
    options = changed(**SHARED | {"pattern": "[AS]A"}, **BASE, layers_at={0: {"A": {"n_heads": 2}}})
    config = HybridConfig.from_dict(options)
    assert [b.config.kind for b in config.places[0]] == ["attention", "mlp"]
    assert (config.places[0][0].config.n_heads, config.places[1][0].config.n_heads) == (2, 4)


def test_to_dict_is_a_copy():
    config = make_config()
    config.to_dict()["layers_at"][7]["window_size"] = 99
    assert config.layers_at[7]["window_size"] == 3


def test_a_letter_that_the_pattern_does_not_use_is_fine(tmp_path):
    assert read(MINI.replace('"2(MF) A"', "3M"), tmp_path).n_params() > 0


def changed(**change):
    return PLAIN | change


def layer(letter, **change):
    layers = PLAIN["layers"]
    return PLAIN | {"layers": layers | {letter: layers[letter] | change}}


def rope(scaling, fraction=1.0, **change):
    return layer("A", rope_fraction=fraction, rope_scaling=scaling, **change)


YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}
PARALLEL = {"pattern": "[MA]F"}
SHARED = {"pattern": "MS", "layers": PLAIN["layers"] | {"S": {"shared": "base"}}}
BASE = {"shared": {"base": {"kind": "mlp", "d_ff": 8}}}

MISTAKES = {
    "unknown-key": (changed(d_modle=3), "d_modle is not a key of a model config; did you mean d_model? its keys: d_model, vocab_size,"),
    "unknown-layer-key": (layer("M", headdim=8), "layers.M.headdim is not a key of mamba2; did you mean head_dim? its keys: "),
    "unknown-kind": (layer("M", kind="mamba3"), "layers.M.kind: unknown kind ('mamba3'); did you mean mamba2? use one of: attention, mamba1,"),
    "no-kind": (changed(layers={"M": {"d_ff": 3}}), "layers.M.kind is missing; use one of: attention, mamba1, mamba2, mlp, moe."),
    "kind-is-a-list": (layer("M", kind=["mlp"]), "layers.M.kind: unknown kind (['mlp']); "),
    "wrong-type": (changed(d_model="16"), "d_model: wrong type ('16'); expected a whole number. Change the value."),
    "bool-is-no-number": (changed(d_model=True), "d_model: wrong type (True); expected a whole number."),
    "negative": (changed(d_model=-1), "d_model: too small (-1); it must be at least 1. Use a larger number."),
    "zero": (layer("F", d_ff=0), "layers.F.d_ff: too small (0); it must be at least 1."),
    "absurd": (changed(d_model=2**40), "d_model: too large (1099511627776); it must be at most 2147483647."),
    "absurd-product": (changed(d_model=2**30, vocab_size=2**30), "config: 20,176,127,068,817,328,640 parameters; more than 10,000,000,000,000 are a typing error."),
    "absurd-window": (layer("A", window_size=2**40), "layers.A.window_size: too large (1099511627776);"),
    "missing": ({k: v for k, v in changed().items() if k != "vocab_size"}, "vocab_size is missing; a model config needs it. Add 'vocab_size: ...' (a whole number)."),
    "missing-in-layer": (changed(layers={"M": {"kind": "mlp"}}), "layers.M.d_ff is missing; mlp needs it. Add 'd_ff: ...' (a whole number)."),
    "no-entry": (changed(pattern="MXA"), "pattern: letter X has no entry in layers (M, F, A). Add 'layers.X'."),
    "bad-pattern": (changed(pattern="2(M"), "pattern: '(' is never closed at column 2"),
    "pattern-is-a-list": (changed(pattern=["M"]), "pattern: wrong type (['M']); expected text."),
    "pattern-is-a-number": (changed(pattern=48), "pattern: wrong type (48); expected text."),
    "legend-key": (changed(layers={"MM": {"kind": "mlp", "d_ff": 8}}), "layers.MM: a legend's key is one letter ('MM'). Rename it."),
    "legend-key-number": (changed(layers={1: {"kind": "mlp", "d_ff": 8}}), "layers.1: a legend's key is one letter ('1'). Rename it."),
    "legend-entry": (changed(layers={"M": "mamba2"}), "layers.M: expected a kind and its hyperparameters ('mamba2'); write {kind: mamba2, ...}."),
    "legend-is-a-list": (changed(layers=["M"]), "layers: wrong type (['M']); expected a mapping."),
    "layers_at-range": (changed(layers_at={5: {}}), "layers_at: no such place (5); the pattern has places 0..4. Use one of them."),
    "layers_at-negative": (changed(layers_at={-1: {}}), "layers_at: no such place (-1);"),
    "layers_at-key": (changed(layers_at={"M": {}}), "layers_at: no such place ('M');"),
    "layers_at-value": (changed(layers_at={4: 3}), "layers_at.4: expected hyperparameters (3); write a mapping of key: value."),
    "layers_at-unknown": (changed(layers_at={4: {"n_head": 2}}), "layers_at.4.n_head is not a key of attention; did you mean n_heads?"),
    "layers_at-does-not-fit": (changed(layers_at={4: {"n_heads": 3}}), "layers_at.4.n_heads: (3) must divide d_model (16)."),
    "layers_at-kind": (changed(layers_at={4: {"kind": "mlp"}}), "layers_at.4.kind: a place keeps its letter's kind (attention). Write another letter there in the pattern."),
    "layers_at-parallel": (changed(**PARALLEL, layers_at={0: {"n_heads": 2}}), "layers_at.0: the place has branches M, A; give {letter: {key: value}}."),
    "layers_at-parallel-value": (changed(**PARALLEL, layers_at={0: {"A": 2}}), "layers_at.0.A: expected hyperparameters (2); write a mapping of key: value."),
    "layers_at-parallel-unknown": (changed(**PARALLEL, layers_at={0: {"A": {"x": 2}}}), "layers_at.0.A.x is not a key of attention;"),
    "layers_at-parallel-shared": (changed(**SHARED | {"pattern": "[AS]"}, **BASE, layers_at={0: {"S": {}}}), "layers_at.0: its weights are shared (S); they"),
    "layers_at-shared": (changed(**SHARED, **BASE, layers_at={1: {"d_ff": 9}}), "layers_at.1: its weights are shared (S); they cannot differ at one place. Drop it."),
    "shared-missing": (changed(**SHARED), "layers.S.shared: no entry ('base') in shared; it has: none. Add it."),
    "shared-name": (changed(**SHARED, shared={"base": {"kind": "mlp", "d_ff": 8}, "a.b": {"kind": "mlp", "d_ff": 8}}), "shared.a.b: not a usable name ('a.b'); it must be letters, digits and _. Rename it."),
    "shared-reserved": (changed(**SHARED, shared={"base": {"kind": "mlp", "d_ff": 8}, "keys": {"kind": "mlp", "d_ff": 8}}), "shared.keys: not a usable name ('keys');"),
    "shared-extra": (changed(layers={"M": {"shared": "base", "d_ff": 3}}, **BASE), "layers.M.d_ff is not a key of a shared entry; its keys: shared."),
    "dropout": (changed(dropout=1.0), "dropout: too large (1.0); it must be at most 0.99."),
    "d_conv": (layer("M", d_conv=1), "layers.M.d_conv: too small (1); it must be at least 2."),
    "expand": (layer("M", expand=0.01), "layers.M.expand: (0.01) times d_model (16) leaves no channel. Raise it."),
    "head_dim": (layer("M", head_dim=7), "layers.M.head_dim: (7) times n_heads (4) must be d_inner (32)."),
    "n_groups": (layer("M", n_groups=3), "layers.M.n_groups: (3) must divide n_heads (4). Use a divisor of 4."),
    "dt_limit": (layer("M", dt_limit=[2, 1]), "layers.M.dt_limit: bounds in the wrong order (2.0, 1.0); 0 <= low < high. Swap them."),
    "dt_min": (layer("M", dt_min=0.5), "layers.M.dt_min: (0.5) must lie between 0 and dt_max (0.1). Choose one between."),
    "dt_init_floor": (layer("M", dt_init_floor=0.0), "layers.M.dt_init_floor: (0.0) must lie between 0 and dt_max (0.1)."),
    "A_init": (layer("M", A_init=[0, 1]), "layers.M.A_init: bounds in the wrong order (0.0, 1.0); 0 < low < high."),
    "norm": (changed(norm="layernorm"), "norm: unknown choice ('layernorm'); did you mean layer_norm? use one of: rms_norm, layer_norm."),
    "norm_weight_fp32": (changed(norm="layer_norm", norm_weight_fp32=True), "norm_weight_fp32: true with norm (layer_norm); it is a rounding of rms_norm, and layer_norm knows no other. Drop it."),
    "attention-d_conv": (layer("A", d_conv=9), "layers.A.d_conv: too large (9); it must be at most 8."),
    "rope": (layer("A", rope_fraction=1.5), "layers.A.rope_fraction: (1.5) must lie in 0..1"),
    "kv": (layer("A", n_kv_heads=3), "layers.A.n_kv_heads: (3) must divide n_heads (4). Use a divisor of it."),
    "top_k": (changed(layers=PLAIN["layers"] | {"E": {"kind": "moe", "d_ff": 8, "n_experts": 2, "top_k": 3}}), "layers.E.top_k: (3) exceeds the experts that a token may pick from (2). Lower it."),
    "moe-bias": (changed(layers=PLAIN["layers"] | {"E": {"kind": "moe", "d_ff": 8, "n_experts": 2, "top_k": 1, "bias": True}}), "layers.E.bias: (true) only a shared expert and latent projections have one. Drop it, or give shared_d_ff."),
    "scaling": (rope(3), "layers.A.rope_scaling: expected a rope_type and its values (3); write {rope_type: linear, factor: ...}."),
    "scaling-no-type": (rope({"factor": 2}), "layers.A.rope_scaling.rope_type is missing; use one of: linear, llama3, yarn."),
    "scaling-type": (rope({"rope_type": "yarm"}), "layers.A.rope_scaling.rope_type: unknown choice ('yarm'); did you mean yarn? use one of: linear, llama3, yarn."),
    "scaling-type-is-a-list": (rope({"rope_type": ["yarn"]}), "layers.A.rope_scaling.rope_type: unknown choice (['yarn']);"),
    "scaling-missing": (rope({"rope_type": "linear"}), "layers.A.rope_scaling.factor is missing; linear scaling needs it. Add 'factor: ...' (a number)."),
    "scaling-unknown": (rope({"rope_type": "linear", "factr": 2}), "layers.A.rope_scaling.factr is not a key of linear scaling; did you mean factor? its keys: factor."),
    "scaling-factor": (rope({"rope_type": "linear", "factor": 0.5}), "layers.A.rope_scaling.factor: too small (0.5); it must be at least 1."),
    "scaling-unturned": (rope({"rope_type": "linear", "factor": 2}, 0.0), "layers.A.rope_scaling: with rope_fraction (0.0) nothing is turned. Drop it, or give rope_fraction."),
    "scaling-llama3": (rope(LLAMA3 | {"low_freq_factor": 4}), "layers.A.rope_scaling.low_freq_factor: (4.0) must be below high_freq_factor (4.0). Swap them."),
    "scaling-length": (rope(LLAMA3 | {"original_max_position_embeddings": 8.5}), "layers.A.rope_scaling.original_max_position_embeddings: wrong type (8.5); expected a whole number."),
    "scaling-yarn": (rope(YARN | {"beta_slow": 32}), "layers.A.rope_scaling.beta_slow: (32.0) must be below beta_fast (32.0). Swap them."),
    "scaling-mscale": (rope(YARN | {"mscale": 1}), "layers.A.rope_scaling.mscale: (1.0) comes with mscale_all_dim (None), or neither. Give both or none."),
    "scaling-twice": (rope(YARN | {"mscale": 1, "mscale_all_dim": 1, "attention_factor": 1}), "layers.A.rope_scaling.attention_factor: (1.0) is given twice; mscale and mscale_all_dim say it already. Drop one."),
    "scaling-theta": (rope(YARN, rope_theta=1), "layers.A.rope_scaling: yarn with rope_theta (1.0); the wavelengths must differ from channel to channel. Raise rope_theta."),
    "layers_at-scaling": (changed(layers_at={4: {"rope_fraction": 1, "rope_scaling": {"rope_type": "linear"}}}), "layers_at.4.rope_scaling.factor is missing;"),
    "list": ([1], "a model config: expected keys of a model config ([1]); write a mapping of key: value."),
    "nothing": (None, "a model config: expected keys of a model config (None); write a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake):
    options, sentence = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        HybridConfig.from_dict(options)
    assert str(error.value).startswith(sentence), str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINI + "d_model: 17\n", "not YAML at line 10 (the key d_model is given twice). Mend that line."),
        (MINI.replace("  M", "\tM"), "not YAML at line 7 (found character '\\t' that cannot start any token)."),
        ("- d_model: 3\n", "a model config: expected keys of a model config ([{'d_model': 3}]); write a mapping"),
        (MINI.replace("head_dim", "headdim"), "layers.M.headdim is not a key of mamba2; did you mean head_dim?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, sentence):
    with pytest.raises(ConfigError) as error:
        read(text, tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'm.yaml'}: {sentence}")


def test_a_rope_scaling_is_a_mapping_in_files_and_in_python(tmp_path):
    config = HybridConfig.from_dict(rope(YARN))
    plain = config.to_dict()["layers"]["A"]["rope_scaling"]
    assert plain == {k: float(v) if k == "factor" else v for k, v in YARN.items()}
    assert read(yaml.safe_dump(config.to_dict()), tmp_path) == config
    made = type(config.layers["A"])(n_heads=4, rope_fraction=1.0, rope_scaling=YARN)
    assert made == config.layers["A"]
    assert hash(made) == hash(config.layers["A"])
    # an override of another key keeps it, one of this key replaces it
    places = {4: {"n_heads": 2}}
    assert HybridConfig.from_dict(rope(YARN) | {"layers_at": places}).places[4][
        0
    ].config == replace(made, n_heads=2)
    places = {4: {"rope_scaling": {"rope_type": "linear", "factor": 2}}}
    other = HybridConfig.from_dict(rope(YARN) | {"layers_at": places}).places[4][0].config
    assert other.rope_scaling.to_dict() == {"rope_type": "linear", "factor": 2.0}


def test_a_config_made_in_python_is_checked_too():
    make = partial(HybridConfig, vocab_size=8, pattern="M")
    with pytest.raises(ConfigError, match=r"config\.d_model: wrong type \('x'\)"):
        make(d_model="x", layers={"M": {"kind": "mlp", "d_ff": 3}})
    config = make(d_model=8, layers={"M": CASES["mlp"]})
    assert config.layers["M"] is CASES["mlp"]
    assert config.with_options(vocab_size=9).vocab_size == 9
    with pytest.raises(ConfigError, match=r"vocab_size: too small \(0\)"):
        config.with_options(vocab_size=0)


def test_tp_is_refused_with_the_place_that_cannot_be_cut():
    with pytest.raises(ConfigError) as error:
        make_config().check_parallel(Parallel(tp=Axis(0, 3)))
    assert str(error.value) == (
        "blocks.0 (mamba2): tp=3 must divide n_heads (4), and divide or be a multiple of n_groups (1). "
        "Use tp=1, 2 or 4."
    )
    make_config().check_parallel(Parallel(tp=Axis(0, 2)))


def test_a_kind_outside_the_package_is_read_like_ours(monkeypatch):
    monkeypatch.setattr("hybridzoo.layers.KINDS", dict(KINDS))
    register("outside", "tests.layers.outside:OutsideConfig")
    register("outside", "tests.layers.outside:OutsideConfig")
    with pytest.raises(ConfigError, match=r"kind mlp is registered already"):
        register("mlp", "tests.layers.outside:OutsideConfig")
    config = HybridConfig.from_dict(
        changed(pattern="O", layers={"O": {"kind": "outside", "power": 3}})
    )
    assert config.layers["O"].power == 3
    assert config.n_params() == 32 * 16 + 16 + 16 + 1
    ids = torch.arange(5)[None]
    assert HybridLM(config)(ids).shape == (1, 5, 32)
