"""A small model with every kind, parallel places, shared weights and overrides."""

from dataclasses import replace

import torch

from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.layers import Sequence, kind_config
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
            mine = declared.expert_range(parallel.ep)
            full = full[mine.start : mine.stop]
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


def run_modes(parallel, configs, sequence_parallel=False):
    """Of each config, logits by mode and gradients of all modes together: plain, padded, packed."""
    parallel = replace(parallel, sequence_parallel=sequence_parallel)
    mask = torch.ones(2, 12)
    mask[0, :5] = 0
    pack = {"cu_seqlens": torch.tensor([0, 5, 6, 12], dtype=torch.int32), "max_seqlen": 6}
    modes = {
        "plain": (randint(2, 12), {}),
        "padded": (randint(2, 12, seed=1), {"attention_mask": mask}),
        "packed": (randint(1, 12, seed=2), pack),
    }
    found = []
    for config in configs:
        model, logits, loss = make_model(config, parallel), {}, 0
        for mode, (ids, options) in modes.items():
            ctx = Sequence.build(12, aux=[], **options)
            logits[mode] = model.logits(model.hidden(ids, None, ctx))
            w = torch.randn(logits[mode].shape, generator=seeded(3, mode), dtype=torch.float64)
            loss = loss + (logits[mode] * w).sum() + sum(ctx.aux)
        loss.backward()
        logits = {mode: t.detach() for mode, t in logits.items()}
        with torch.no_grad():
            for mode, (ids, options) in modes.items():
                logits[f"{mode}, no grad"] = model(ids, **options)
        found.append((logits, pieces(model, lambda p: p.grad)))
    return found


def assert_modes_equal(ranks, one, configs, **tolerance):
    """Every rank's logits, and the gradients that all ranks' make together, are one process's."""
    for i, config in enumerate(configs):
        logits, grads = one[i]
        for rank in ranks:
            for mode, tensor in rank[i][0].items():
                where = f"{config.pattern} {mode}"
                torch.testing.assert_close(
                    tensor, logits[mode], **tolerance, msg=lambda m, w=where: f"{w}: {m}"
                )
        whole = joined(config, [grads])
        for name, grad in joined(config, [rank[i][1] for rank in ranks]).items():
            assert grad.any(), name
            torch.testing.assert_close(
                grad, whole[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
