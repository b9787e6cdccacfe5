"""A small model with every kind, parallel places, shared weights and overrides."""

import torch

from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.layers import kind_config
from hybridzoo.layers.init import seeded
from hybridzoo.model import HybridLM


def tiny(kind, **change):
    return kind_config("test", kind).tiny().to_dict() | change


OPTIONS = {
    "name": "every-kind",
    "d_model": 16,
    "vocab_size": 23,
    "pattern": "[MA] N F S [NA] E S A",
    "layers": {
        "M": tiny("mamba2", n_groups=1),
        "A": tiny("attention", n_kv_heads=1),
        "N": tiny("mamba1"),
        "F": tiny("mlp", d_ff=12),
        "E": tiny("moe", d_ff=8),
        "S": {"shared": "base"},
    },
    "shared": {"base": tiny("mamba2", norm="norm_first")},
    "layers_at": {7: {"window_size": 3, "n_heads": 8}, 4: {"A": {"rope_fraction": 0.0}}},
    "tie_embeddings": False,
    "norm_eps": 1e-3,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 2.0,
    "logits_multiplier": 0.5,
}


def make_config(**change):
    return HybridConfig.from_dict(OPTIONS | change)


def make_model(config=None, parallel=SINGLE, dtype=torch.float64, **options):
    """A model whose every parameter is its seeded start plus noise: no bias zero, no norm one."""
    model = HybridLM(config or make_config(), parallel=parallel, dtype=dtype, init=False, **options)
    tp = parallel.tp
    with torch.no_grad():
        for name, declared, locals_ in model.local_names():
            generator = seeded(7, name)
            full = declared.init(declared.shape, generator).double()
            full += 0.2 * torch.randn(declared.shape, generator=generator, dtype=torch.float64)
            for piece, tensor in declared.cut.shard(
                relative(locals_), full, tp.world, tp.rank
            ).items():
                model.get_parameter(locals_[piece]).copy_(tensor)
    return model


def relative(locals_):
    """A parameter's name within its layer: that of its first piece."""
    return next(iter(locals_))


def pieces(model, of):
    """Canonical name -> {piece: of(parameter)} for every trained parameter."""
    found = {}
    for name, declared, locals_ in model.local_names():
        if declared.trained:
            found[name] = {k: of(model.get_parameter(v)) for k, v in locals_.items()}
    return found


def joined(config, ranks):
    """Canonical name -> full tensor, from every rank's pieces.

    Refuses copies that differ in a bit.
    """
    cuts = {name: p.cut for name, p in config.params()}
    return {
        name: cuts[name].join(relative(first), [rank[name] for rank in ranks])
        for name, first in ranks[0].items()
    }


def randint(*shape, high=23, seed=0):
    return torch.randint(high, shape, generator=seeded(seed, str(shape)))
