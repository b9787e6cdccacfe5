"""Every field of every config: what changing it changes, measured; a new field needs an entry."""

# tables read as rows: one case a line
# ruff: noqa: E501

from dataclasses import dataclass, field, fields

import pytest
import torch

from hybridzoo.config import HybridConfig
from hybridzoo.layers import KINDS, Sequence, kind_config
from hybridzoo.layers.rope import SCALINGS
from hybridzoo.model import HybridLM
from tests.models import make_model, randint

PARAMETERS = "parameters"  # their names or shapes; test_contract.py: each of them has a gradient
FUNCTION = "function"  # the logits of the same parameters
ROUNDING = "rounding"  # the logits in bf16, but not in float64
LOSS = "loss"  # what a layer adds to the loss
TRAINING = "training"  # the logits in training alone
START = "start"  # the initial values of the same parameters
NOTHING = "nothing"  # of all these


@dataclass
class Change:
    """A field's other value, and what must differ then; `base` is changed before."""

    to: object
    effect: str = FUNCTION
    base: dict = field(default_factory=dict)


def sizes(**changes):
    return {name: Change(to, PARAMETERS) for name, to in changes.items()}


COMMON = {"input_multiplier": Change(0.5), "output_multiplier": Change(0.5)}
# applied to softplus(dt), about a hundredth at the start
STEPS = {
    "dt_limit": Change([0.3, 0.4]),
    "dt_min": Change(0.05, START),
    "dt_max": Change(0.2, START),
    "dt_init_floor": Change(0.05, START),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}

# to tiny()
KIND_CHANGES = {
    "mamba1": {
        **COMMON, **STEPS,
        **sizes(d_state=6, d_conv=4, d_inner=20, dt_rank=4, conv_bias=False, in_proj_bias=False, out_proj_bias=False),
        "expand": Change(3.0, PARAMETERS, {"d_inner": None}),
        "activation": Change("gelu"),
        "x_norm": Change("none", base={"x_norm": "weightless"}),
        "norm_eps": Change(0.1),
    },
    "mamba2": {
        **COMMON, **STEPS,
        **sizes(d_state=6, n_heads=8, n_groups=4, d_conv=4, conv_bias=False, in_proj_bias=False, out_proj_bias=False),
        "head_dim": Change(12, PARAMETERS),
        "expand": Change(3.0, PARAMETERS, {"n_heads": None, "d_inner": None, "head_dim": 8}),
        "d_inner": Change(16, PARAMETERS, {"n_heads": None, "d_inner": 32, "head_dim": 4}),
        "activation": Change("gelu"),
        "norm": Change("norm_first"),
        "norm_eps": Change(0.1),
        # the same sums in another order
        "chunk_size": Change(3, NOTHING),
        "A_init": Change([2.0, 3.0], START),
    },
    "attention": {
        **COMMON,
        **sizes(n_heads=6, n_kv_heads=4, head_dim=12, qkv_bias=False, out_proj_bias=False, d_conv=3, parallel_d_ff=8),
        "conv_bias": Change(False, PARAMETERS, {"d_conv": 3}),
        "rope_fraction": Change(1.0),
        "rope_theta": Change(1000.0),
        "rope_scaling": Change(YARN),
        "window_size": Change(3),
        "softmax_scale": Change(None),
    },
    "mlp": {**COMMON, **sizes(d_ff=24, gated=False, bias=False), "activation": Change("relu")},
    "moe": {
        **COMMON,
        **sizes(d_ff=12, n_experts=9, gated=False, correction_bias=False, shared_d_ff=None, d_latent=8, bias=True),
        "top_k": Change(1),
        "activation": Change("relu"),
        "router": Change("softmax_topk"),
        "router_fp32": Change(False, ROUNDING),
        "renormalize": Change(False),
        "scaling": Change(1.0),
        "n_expert_groups": Change(2),
        "top_k_groups": Change(1),
        "aux_loss": Change(0.1, LOSS),
        "z_loss": Change(0.1, LOSS),
    },
}  # fmt: skip

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
SCALING_CHANGES = {
    "linear": ({"rope_type": "linear", "factor": 2.0}, {"factor": Change(3.0)}),
    "llama3": (
        LLAMA3,
        {
            "factor": Change(2.0),
            "original_max_position_embeddings": Change(16),
            "low_freq_factor": Change(2.0),
            "high_freq_factor": Change(6.0),
        },
    ),
    "yarn": (
        YARN | {"beta_fast": 0.9, "beta_slow": 0.3, "truncate": False},
        {
            "factor": Change(2.0),
            "original_max_position_embeddings": Change(16),
            "beta_fast": Change(0.7),
            "beta_slow": Change(0.5),
            "truncate": Change(True),
            "attention_factor": Change(0.5),
            "mscale": Change(0.5, base={"mscale": 1.0, "mscale_all_dim": 2.0}),
            "mscale_all_dim": Change(0.5, base={"mscale": 1.0, "mscale_all_dim": 2.0}),
        },
    ),
}

MODEL = {
    "d_model": 16,
    "vocab_size": 23,
    "pattern": "FS",
    "layers": {"F": {"kind": "mlp", "d_ff": 12}, "S": {"shared": "base"}},
    "shared": {"base": {"kind": "mlp", "d_ff": 8}},
}
MODEL_CHANGES = {
    **sizes(d_model=12, vocab_size=24, pattern="FFS", norm="layer_norm", tie_embeddings=False),
    "layers": Change(MODEL["layers"] | {"F": {"kind": "mlp", "d_ff": 12, "activation": "relu"}}),
    "layers_at": Change({0: {"activation": "relu"}}),
    "shared": Change({"base": {"kind": "mlp", "d_ff": 8, "activation": "relu"}}),
    "norm_weight_fp32": Change(True, ROUNDING),
    "norm_eps": Change(0.1),
    "residual_fp32": Change(True, ROUNDING),
    "residual_multiplier": Change(0.5),
    "embedding_multiplier": Change(2.0),
    "logits_multiplier": Change(0.5),
    "dropout": Change(0.5, TRAINING),
    # of the model as a thing to talk to or to export, not of its function
    "name": Change("another", NOTHING),
    "tokenizer": Change("tokenizer.json", NOTHING),
    "eos_token_id": Change(3, NOTHING),
    "source_layout": Change({"family": "mamba"}, NOTHING),
}  # fmt: skip


def one_letter(kind, options):
    return {
        "d_model": 16,
        "vocab_size": 23,
        "pattern": "X",
        "layers": {"X": {"kind": kind} | options},
    }


def cases():
    for name, change in MODEL_CHANGES.items():
        yield f"model-{name}", MODEL, {name: change.to}, change.effect
    for kind, changes in KIND_CHANGES.items():
        for name, change in changes.items():
            base = kind_config("test", kind).tiny().to_dict() | change.base
            after = one_letter(kind, base | {name: change.to})
            yield f"{kind}-{name}", one_letter(kind, base), after, change.effect
    for rope_type, (options, changes) in SCALING_CHANGES.items():
        plain = kind_config("test", "attention").tiny().to_dict()
        plain |= {"rope_fraction": 1.0, "head_dim": 12, "rope_theta": 100.0}
        for name, change in changes.items():
            base = options | change.base
            both = (plain | {"rope_scaling": o} for o in (base, base | {name: change.to}))
            before, after = (one_letter("attention", o) for o in both)
            yield f"{rope_type}-{name}", before, after, change.effect


@torch.no_grad()
def run(config, weights, dtype=torch.float64, training=False):
    """Logits, and the sum of what the layers add to the loss."""
    model, ctx = HybridLM(config, dtype=dtype, init=False).train(training), Sequence(aux=[])
    model.load_state_dict(weights)
    torch.manual_seed(0)
    logits = model.logits(model.hidden(randint(3, 17), None, ctx))
    return logits, sum(ctx.aux, torch.zeros(()))


def differ(before, after):
    # float64: rounding is 1e-12 here
    return bool((before - after).abs().max() > 1e-6)


def effect(before, after):
    """The first of the effects that `before` and `after` differ in."""
    shapes = [{name: p.shape for name, p in c.params()} for c in (before, after)]
    if shapes[0] != shapes[1]:
        return PARAMETERS
    weights = make_model(before).state_dict()
    logits, aux = zip(*(run(c, weights) for c in (before, after)), strict=True)
    if differ(*logits):
        return FUNCTION
    if differ(*aux):
        return LOSS
    if differ(*(run(c, weights, training=True)[0] for c in (before, after))):
        return TRAINING
    starts = [HybridLM(c).state_dict() for c in (before, after)]
    if any(not torch.equal(t, starts[1][name]) for name, t in starts[0].items()):
        return START
    # a sum in another order moves fp32 by 1e-6, and a few of bf16's values to a neighbour
    rounded = [run(c, weights, torch.bfloat16)[0] for c in (before, after)]
    return ROUNDING if (rounded[0] != rounded[1]).double().mean() > 0.02 else NOTHING


@pytest.mark.parametrize(
    ("base", "change", "expected"), [pytest.param(*c, id=i) for i, *c in cases()]
)
def test_a_field_changes_what_it_says(base, change, expected):
    before, after = HybridConfig.from_dict(base), HybridConfig.from_dict(base | change)
    assert before != after
    assert effect(before, after) == expected


def names(config):
    return {f.name for f in fields(config)}


def test_every_field_has_an_entry():
    assert names(HybridConfig) == set(MODEL_CHANGES)
    assert set(KINDS) == set(KIND_CHANGES)
    for kind, changes in KIND_CHANGES.items():
        assert names(kind_config("test", kind)) == set(changes), kind
    assert set(SCALINGS) == set(SCALING_CHANGES)
    for rope_type, (_, changes) in SCALING_CHANGES.items():
        assert names(SCALINGS[rope_type]) == set(changes), rope_type
