"""Every kind's tiny config and variants; layers with weights away from their start."""

from dataclasses import replace

import torch

from hybridzoo.layers import KINDS, Sequence, State, kind_config
from hybridzoo.layers.init import seeded

D_MODEL = 16

VARIANTS = {
    "attention-nope-full": {"rope_fraction": 0.0, "window_size": None, "softmax_scale": None},
    "attention-rope-full": {"rope_fraction": 1.0, "window_size": None},
    "attention-mqa": {"n_kv_heads": 1},
    "attention-mha": {
        "n_kv_heads": None, "head_dim": None, "qkv_bias": False, "rope_fraction": 0.5,
    },
    "attention-yarn": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
            "beta_fast": 1.5, "beta_slow": 0.4,
        },
    },
    "attention-conv": {"d_conv": 3, "parallel_d_ff": 20},
    "attention-conv_mqa": {
        "d_conv": 2, "conv_bias": False, "parallel_d_ff": 12, "n_kv_heads": 1, "qkv_bias": False,
    },
    "mamba1-no_norm": {"x_norm": "none"},
    "mamba1-weightless": {"x_norm": "weightless", "conv_bias": False, "activation": "gelu"},
    "mamba1-published": {
        "in_proj_bias": False, "out_proj_bias": False, "d_inner": None, "dt_rank": None,
    },
    "mamba2-1_group": {"n_groups": 1},
    "mamba2-4_groups": {"n_groups": 4, "norm": "norm_first"},
    "mamba2-norm_first": {"norm": "norm_first"},
    "mamba2-no_norm": {"norm": "none", "conv_bias": False, "activation": "gelu"},
    "mlp-relu2": {"gated": False, "activation": "relu2", "bias": False},
    "moe-softmax_topk": {"router": "softmax_topk", "n_expert_groups": 1, "top_k_groups": 1},
    "moe-topk_softmax": {"router": "topk_softmax", "renormalize": False, "correction_bias": False},
    "moe-latent": {"d_latent": 9, "bias": True},
    "moe-latent_plain": {
        "d_latent": 24, "shared_d_ff": None, "gated": False, "activation": "relu2",
        "n_expert_groups": 1, "top_k_groups": 1,
    },
    "moe-bias": {"bias": True, "router_fp32": False},
    "moe-plain": {
        "n_expert_groups": 1, "top_k_groups": 1, "shared_d_ff": None, "correction_bias": False,
        "gated": False, "activation": "relu", "z_loss": 0.0,
    },
}  # fmt: skip


def tiny(kind):
    return kind_config("test", kind).tiny()


CASES = {kind: tiny(kind) for kind in KINDS}
CASES |= {
    name: replace(tiny(name.partition("-")[0]), **change) for name, change in VARIANTS.items()
}
MIXERS = [name for name, config in CASES.items() if config.state(D_MODEL, 1, 1)]


def full_weights(config, d_model=D_MODEL, dtype=torch.float64):
    """Every canonical parameter at its start plus noise: no bias zero, no norm one."""
    weights = {}
    for name, p in config.params(d_model).items():
        generator = seeded(7, name)
        start = p.init(p.shape, generator).to(dtype)
        weights[name] = start + 0.3 * torch.randn(p.shape, generator=generator, dtype=dtype)
    return weights


def make_layer(name, dtype=torch.float64):
    config = CASES[name]
    layer = config.build(D_MODEL, dtype=dtype)
    layer.load_state_dict(full_weights(config))
    return layer


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed, str(shape)), dtype=torch.float64)


def kept(state):
    """The tensors that mean something: a cache's last row is scratch for padding."""
    return {k: t[:, :-1] if k.endswith("_cache") else t for k, t in state.tensors.items()}


def rows(state, *index):
    return State({k: t[list(index)] for k, t in state.tensors.items()})


def assert_states_equal(got, expected, **tolerance):
    assert set(got.tensors) == set(expected.tensors)
    for name, tensor in kept(got).items():
        torch.testing.assert_close(
            tensor, kept(expected)[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


PLAIN = Sequence()
