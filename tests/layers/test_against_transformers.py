"""Tiny models of transformers' classes and ours hold the same weights and give the same logits.

Every option that these families set is off its default somewhere. Where transformers is known to be
wrong, the test sets its module right and says so.
"""

# tables read as rows: one case a line
# ruff: noqa: E501

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bamba.modeling_bamba import BambaRotaryEmbedding
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE, NemotronHRMSNorm

from hybridzoo.config import HybridConfig
from hybridzoo.layers import Sequence
from hybridzoo.layers.init import seeded
from hybridzoo.layers.moe import MoEConfig
from hybridzoo.layers.norm import RMSNorm
from hybridzoo.layers.rope import apply_rope, read_scaling
from hybridzoo.model import HybridLM

# float64 in ours and theirs, but for what transformers computes in fp32 whatever the dtype (norms,
# router, softmax, rotary angles, steps): some 1e-7 of values of size 1 to 10, a dozen times over
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
VOCAB, D_MODEL, LENGTH = 37, 24, 13
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
SIZES = {"vocab_size": VOCAB, "hidden_size": D_MODEL, **EAGER}


@torch.no_grad()
def randomized(theirs):
    """`theirs` in float64, every parameter and correction bias away from its start."""
    theirs = theirs.double().eval()
    tensors = dict(theirs.named_parameters())
    tensors |= {n: b for n, b in theirs.named_buffers() if "correction" in n}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=seeded(3, name), dtype=torch.float64)
        # norms, decays and steps stay near their start, the rest is as large as it may be
        size = 0.3 if tensor.dim() == 1 else 1.2 * tensor.shape[-1] ** -0.5
        tensor.copy_((1.0 if "norm" in name else 0.0) + size * noise)
    return theirs


def attention_weights(a):
    found = {}
    for kind in ("weight", "bias"):
        if getattr(a.q_proj, kind) is not None:
            rows = [getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj)]
            found |= {
                f"qkv_proj.{kind}": torch.cat(rows),
                f"out_proj.{kind}": getattr(a.o_proj, kind),
            }
    return found


def mamba2_weights(m):
    names = ["in_proj.weight", "in_proj.bias", "dt_bias", "A_log", "D", "norm.weight"]
    state = m.state_dict()
    found = {n: state[n] for n in [*names, "out_proj.weight", "out_proj.bias"] if n in state}
    found["conv_weight"] = m.conv1d.weight.squeeze(1)
    return found | ({} if m.conv1d.bias is None else {"conv_bias": m.conv1d.bias})


def mlp_weights(m):
    if hasattr(m, "input_linear"):
        return {
            "gate_up_proj.weight": m.input_linear.weight,
            "down_proj.weight": m.output_linear.weight,
        }
    found = {f"down_proj.{k}": p for k, p in m.down_proj.named_parameters()}
    if not hasattr(m, "gate_proj"):
        return found | {f"up_proj.{k}": p for k, p in m.up_proj.named_parameters()}
    for kind, up in m.up_proj.named_parameters():
        found[f"gate_up_proj.{kind}"] = torch.cat([getattr(m.gate_proj, kind), up])
    return found


def nemotron_moe_weights(m):
    found = {
        "expert_up_weight": m.experts.up_proj,
        "expert_down_weight": m.experts.down_proj,
        "router_weight": m.gate.weight,
        "correction_bias": m.gate.e_score_correction_bias,
    }
    for ours, projection in (
        ("shared_up_proj", m.shared_experts.up_proj),
        ("shared_down_proj", m.shared_experts.down_proj),
        ("latent_down_proj", m.fc1_latent_proj),
        ("latent_up_proj", m.fc2_latent_proj),
    ):
        found |= {f"{ours}.{kind}": p for kind, p in projection.named_parameters()}
    return found


def granite_moe_weights(layer):
    m = layer.block_sparse_moe
    return {
        "expert_up_weight": m.experts.gate_up_proj,
        "expert_down_weight": m.experts.down_proj,
        "router_weight": m.router.weight,
        "shared_up_proj.weight": layer.shared_mlp.input_linear.weight,
        "shared_down_proj.weight": layer.shared_mlp.output_linear.weight,
    }


def ours_with(config, embed, head, final_norm, sublayers):
    """Our model with these weights: of each sublayer its norm's and its layer's."""
    weights = {"embed.weight": embed, "head.weight": head, "norm.weight": final_norm}
    for i, (norm, layer) in enumerate(sublayers):
        weights[f"blocks.{i}.norm.weight"] = norm.weight
        weights |= {f"blocks.{i}.layer.{k}": w for k, w in layer.items()}
    model = HybridLM(HybridConfig.from_dict(config), dtype=torch.float64, init=False)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def assert_equal_logits(ours, theirs, **their_options):
    ids = torch.randint(VOCAB, (2, LENGTH), generator=seeded(0, "ids"))
    expected = theirs(ids, use_cache=False, **their_options).logits
    got = ours(ids)
    # logits that are all alike would agree with anything
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected.to(got.dtype), **TOLERANCE)
    return got


MAMBA2 = {"kind": "mamba2", "d_state": 6, "head_dim": 5, "n_heads": 12, "n_groups": 3, "d_conv": 3}
NEMOTRON = {
    **SIZES, "hybrid_override_pattern": "M*-E", "layer_norm_epsilon": 1e-3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 28, "ssm_state_size": 6,
    "mamba_num_heads": 12, "mamba_head_dim": 5, "n_groups": 3, "conv_kernel": 3, "chunk_size": 4,
    "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 18, "routed_scaling_factor": 1.7, "tie_word_embeddings": False,
}  # fmt: skip
# theirs -> ours: kind and what differs
NEMOTRON_VARIANTS = {
    "plain": ({}, {}),
    "groups": ({"n_group": 3, "topk_group": 2}, {"E": {"n_expert_groups": 3, "top_k_groups": 2}}),
    "unnormalised": ({"norm_topk_prob": False}, {"E": {"renormalize": False}}),
    "latent": ({"moe_latent_size": 10}, {"E": {"d_latent": 10}}),
    "bias": (
        {"moe_latent_size": 10, "mlp_bias": True, "use_bias": True, "use_conv_bias": False},
        {
            "E": {"d_latent": 10, "bias": True}, "F": {"bias": True},
            "M": {"in_proj_bias": True, "out_proj_bias": True, "conv_bias": False},
        },
    ),
    "activations": (
        {"mamba_hidden_act": "gelu", "mlp_hidden_act": "silu"},
        {"M": {"activation": "gelu"}, "F": {"activation": "silu"}, "E": {"activation": "silu"}},
    ),
}  # fmt: skip


def nemotron_layers(changes):
    plain = {"gated": False, "activation": "relu2"}
    layers = {
        "M": MAMBA2 | {"norm_eps": 1e-3},
        "A": {"kind": "attention", "n_heads": 6, "n_kv_heads": 2, "head_dim": 10},
        "F": {"kind": "mlp", "d_ff": 28, **plain},
        "E": {
            "kind": "moe", "d_ff": 14, "n_experts": 6, "top_k": 3, "router": "sigmoid",
            "renormalize": True, "scaling": 1.7, "correction_bias": True, "shared_d_ff": 18, **plain,
        },
    }  # fmt: skip
    return {letter: options | changes.get(letter, {}) for letter, options in layers.items()}


def nemotron_pair(change, ours_change):
    theirs = randomized(NemotronHForCausalLM(NemotronHConfig(**NEMOTRON | change)))
    options = {"d_model": D_MODEL, "vocab_size": VOCAB, "pattern": "MAFE", "norm_eps": 1e-3}
    options |= {
        "tie_embeddings": False,
        "norm_weight_fp32": True,
        "layers": nemotron_layers(ours_change),
    }
    read = [mamba2_weights, attention_weights, mlp_weights, nemotron_moe_weights]
    layers = theirs.model.layers
    sublayers = [(x.norm, weights(x.mixer)) for x, weights in zip(layers, read, strict=True)]
    body, head = theirs.model, theirs.lm_head.weight
    return ours_with(options, body.embeddings.weight, head, body.norm_f.weight, sublayers), theirs


@pytest.mark.parametrize("variant", NEMOTRON_VARIANTS)
def test_nemotron_h(variant):
    ours, theirs = nemotron_pair(*NEMOTRON_VARIANTS[variant])
    # transformers 5.23 clamps dt at time_step_min, which is an option of the start (pull 48989)
    theirs.model.layers[0].mixer.time_step_limit = (0.0, math.inf)
    assert_equal_logits(ours, theirs)


def test_a_limit_of_dt_is_transformers_limit():
    ours, theirs = nemotron_pair({"time_step_min": 0.6}, {"M": {"dt_limit": [0.6, 0.9]}})
    theirs.model.layers[0].mixer.time_step_limit = (0.6, 0.9)
    limited = assert_equal_logits(ours, theirs)
    free, _ = nemotron_pair({}, {})
    ids = torch.randint(VOCAB, (2, LENGTH), generator=seeded(0, "ids"))
    assert (free(ids) - limited).abs().max() > 1e-2


def test_the_groups_of_experts_matter():
    tokens = torch.randn(1, 50, D_MODEL, generator=seeded(0, "tokens"), dtype=torch.float64)
    picks = []
    for variant in ("plain", "groups"):
        change, ours_change = NEMOTRON_VARIANTS[variant]
        theirs = randomized(NemotronHMoE(NemotronHConfig(**NEMOTRON | change)))
        options = nemotron_layers(ours_change)["E"]
        layer = MoEConfig.from_dict("E", {k: v for k, v in options.items() if k != "kind"}).build(
            D_MODEL, dtype=torch.float64
        )
        layer.load_state_dict(nemotron_moe_weights(theirs))
        with torch.no_grad():
            torch.testing.assert_close(layer(tokens, None, Sequence()), theirs(tokens), **TOLERANCE)
        picks.append(layer.load(tokens))
    assert not torch.equal(*picks)


def test_nemotrons_norm_multiplies_in_fp32():
    x = torch.randn(64, 256, generator=seeded(0, "x")).bfloat16()
    theirs = NemotronHRMSNorm(256, eps=1e-5).bfloat16()
    theirs.weight.data.copy_(torch.randn(256, generator=seeded(0, "w")))
    expected = theirs(x)
    assert torch.equal(RMSNorm(theirs.weight, 1e-5, weight_fp32=True)(x)[0], expected)
    # of 16,384 products a good share is rounded otherwise
    different = RMSNorm(theirs.weight, 1e-5)(x)[0] != expected
    assert different.double().mean() > 0.1


def granite_moe(n_experts):
    return {
        "kind": "moe", "d_ff": 14, "n_experts": n_experts, "top_k": 2, "router": "topk_softmax",
        "router_fp32": False, "shared_d_ff": 18, "aux_loss": 0.0,
    }  # fmt: skip


GRANITE = {
    **SIZES, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 14, "shared_intermediate_size": 18,
    "num_local_experts": 5, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "logits_scaling": 1.6,
    "residual_multiplier": 0.22, "attention_multiplier": 0.7, "mamba_n_heads": 12, "mamba_d_head": 4,
    "mamba_n_groups": 3, "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_chunk_size": 4, "rms_norm_eps": 1e-3,
    "mamba_proj_bias": True, "attention_bias": True, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
ROPE = {"rope_theta": 100.0, "rope_type": "default"}
GRANITE_VARIANTS = {
    "moe": {},
    "dense": {"num_local_experts": 0},
    "gelu": {"hidden_act": "gelu"},
    "rope": {"position_embedding_type": "rope", "rope_parameters": ROPE},
    "yarn": {
        "position_embedding_type": "rope",
        "rope_parameters": ROPE
        | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", GRANITE_VARIANTS)
def test_granite_hybrid(variant):
    change = GRANITE | GRANITE_VARIANTS[variant]
    theirs = randomized(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**change)))
    activation = change.get("hidden_act", "silu")
    rope = dict(change.get("rope_parameters") or {})
    attention = {
        "kind": "attention", "n_heads": 6, "n_kv_heads": 2, "qkv_bias": True, "out_proj_bias": True,
        "softmax_scale": 0.7, "rope_fraction": 1.0 if rope else 0.0,
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
    }  # fmt: skip
    mamba2 = MAMBA2 | {"head_dim": 4, "norm_eps": 1e-3, "in_proj_bias": True, "out_proj_bias": True}
    dense = {"kind": "mlp", "d_ff": 18, "activation": activation}
    n_experts = change["num_local_experts"]
    feed_forward = granite_moe(n_experts) | {"activation": activation} if n_experts else dense
    options = {
        "d_model": D_MODEL, "vocab_size": VOCAB, "pattern": "MEAE", "norm_eps": 1e-3,
        "layers": {"M": mamba2 | {"activation": activation}, "A": attention, "E": feed_forward},
        "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_multiplier": 1 / 1.6,
    }  # fmt: skip
    sublayers = []
    for layer in theirs.model.layers:
        has_mamba = layer.mamba is not None
        mixer = mamba2_weights(layer.mamba) if has_mamba else attention_weights(layer.self_attn)
        ff = granite_moe_weights(layer) if n_experts else mlp_weights(layer.shared_mlp)
        sublayers += [(layer.input_layernorm, mixer), (layer.post_attention_layernorm, ff)]
    body = theirs.model
    embed = body.embed_tokens.weight
    assert theirs.lm_head.weight is embed
    assert_equal_logits(ours_with(options, embed, embed, body.norm.weight, sublayers), theirs)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_bamba(bias):
    change = {
        **SIZES, "attn_layer_indices": [1], "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 28, "mamba_n_heads": 12, "mamba_d_head": 4,
        "mamba_n_groups": 3, "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_chunk_size": 4,
        "mamba_conv_bias": bias, "mamba_proj_bias": bias, "attention_bias": bias, "mlp_bias": bias,
        "rms_norm_eps": 1e-3, "hidden_act": "gelu" if bias else "silu", "rope_theta": 100.0,
    }  # fmt: skip
    theirs = randomized(BambaForCausalLM(BambaConfig(**change)))
    act, both = {"activation": change["hidden_act"]}, {"out_proj_bias": bias}
    layers = {
        "M": MAMBA2 | act | both | {"head_dim": 4, "norm_eps": 1e-3, "in_proj_bias": bias, "conv_bias": bias},
        "A": {
            "kind": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "qkv_bias": bias, **both,
            "rope_fraction": 0.5, "rope_theta": 100.0,
        },
        "F": {"kind": "mlp", "d_ff": 28, "bias": bias, **act},
    }  # fmt: skip
    options = {"d_model": D_MODEL, "vocab_size": VOCAB, "pattern": "MFAF", "norm_eps": 1e-3}
    options |= {"layers": layers, "tie_embeddings": False}
    sublayers = []
    for layer in theirs.model.layers:
        is_mamba = hasattr(layer, "mamba")
        mixer = mamba2_weights(layer.mamba) if is_mamba else attention_weights(layer.self_attn)
        sublayers += [
            (layer.input_layernorm, mixer),
            (layer.pre_ff_layernorm, mlp_weights(layer.feed_forward)),
        ]
    body, head = theirs.model, theirs.lm_head.weight
    final_norm = body.final_layernorm.weight
    ours = ours_with(options, body.embed_tokens.weight, head, final_norm, sublayers)
    assert_equal_logits(ours, theirs)


def test_mamba2():
    change = {
        **SIZES, "num_heads": 12, "head_dim": 4, "n_groups": 3, "state_size": 6, "num_hidden_layers": 2,
        "conv_kernel": 3, "use_bias": True, "hidden_act": "gelu", "chunk_size": 4, "layer_norm_epsilon": 1e-3,
        "time_step_limit": (0.2, 0.9), "residual_in_fp32": False,
    }  # fmt: skip
    theirs = randomized(Mamba2ForCausalLM(Mamba2Config(**change)))
    layer = MAMBA2 | {
        "head_dim": 4, "norm_eps": 1e-3, "in_proj_bias": True, "out_proj_bias": True,
        "activation": "gelu", "dt_limit": [0.2, 0.9],
    }  # fmt: skip
    options = {"d_model": D_MODEL, "vocab_size": VOCAB, "pattern": "MM", "norm_eps": 1e-3}
    options |= {"layers": {"M": layer}, "tie_embeddings": False}
    sublayers = [(x.norm, mamba2_weights(x.mixer)) for x in theirs.backbone.layers]
    body, head = theirs.backbone, theirs.lm_head.weight
    ours = ours_with(options, body.embeddings.weight, head, body.norm_f.weight, sublayers)
    assert_equal_logits(ours, theirs)


LONG = {"factor": 8.0, "original_max_position_embeddings": 128}
LLAMA3 = LONG | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = LONG | {"rope_type": "yarn"}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3-narrow": LLAMA3 | {"low_freq_factor": 1.9, "high_freq_factor": 2.0, "factor": 3.0},
    "yarn": YARN,
    "yarn-betas": YARN | {"beta_fast": 8.0, "beta_slow": 0.5},
    "yarn-untruncated": YARN | {"truncate": False, "beta_fast": 8.0},
    "yarn-short": YARN | {"original_max_position_embeddings": 4},
    "yarn-attention": YARN | {"attention_factor": 0.6},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-factor-1": YARN | {"factor": 1.0},
}


@pytest.mark.parametrize("theta", [50.0, 10000.0])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_stretched_positions_are_transformers(name, fraction, theta):
    options = SCALINGS[name]
    config = BambaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=1024)
    # hard-wired to 0.5 by the class
    config.partial_rotary_factor = fraction
    config.rope_parameters = options | {"rope_theta": theta, "partial_rotary_factor": fraction}
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[options["rope_type"]](config)
    rotary_dim, scaling = round(32 * fraction), read_scaling("here", options)
    plain = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    # fp32 powers and quotients on their side
    close = {"rtol": 3e-6, "atol": 0.0}
    torch.testing.assert_close(scaling.stretch(plain, theta), frequencies.double(), **close)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)
    # and as queries: a rotation of (1, 0) is (cos, sin), which a long position makes visible
    rotary = BambaRotaryEmbedding(config)
    positions = torch.tensor([[0, 1, 7, 500]])
    cos, sin = (t.double()[0] for t in rotary(plain, positions))
    x = F.pad(torch.ones(1, 4, 1, rotary_dim // 2, dtype=torch.float64), (0, 32 - rotary_dim // 2))
    turned = apply_rope(x, positions, theta, rotary_dim, scaling)[0, :, 0]
    # of an angle of 500, fp32 keeps 500 * 2 ** -24 each in the frequency and in the product
    allowed = {"rtol": 0.0, "atol": 1e-4 * amplitude}
    torch.testing.assert_close(
        turned[:, :rotary_dim],
        torch.cat([cos[:, : rotary_dim // 2], sin[:, : rotary_dim // 2]], -1),
        **allowed,
    )
    assert not turned[:, rotary_dim:].any()
