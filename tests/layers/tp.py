"""What the ranks of a tensor-parallel test run, and how their pieces are joined."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridzoo.layers import Sequence


@dataclass
class Outcome:
    """One rank's view of a forward and backward."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    states: dict[str, Tensor]


def load_cut(module, named_params, parallel, prefix=""):
    """Fill a layer with this rank's cut of the full tensors.

    `named_params` is name -> (declaration, tensor).
    """
    tp = parallel.tp
    with torch.no_grad():
        for name, (declared, full) in named_params.items():
            for local, piece in declared.cut.shard(name, full, tp.world, tp.rank).items():
                module.get_parameter(prefix + local).copy_(piece)


def local_state(spec, full, world, rank):
    """What `rank` holds of a full state tensor."""
    spans, start = [], 0
    for part in spec.parts:
        begin, n = part.range(world, rank)
        spans.append(full.narrow(spec.dim, start + begin, n))
        start += part.width
    return torch.cat(spans, spec.dim) if spans else full


def joined(table, ranks):
    """Full tensors from every rank's dict of local ones."""
    world, full = len(ranks), {}
    for name, declared in table.items():
        pieces = declared.cut.pieces(name, world)
        full[name] = declared.cut.join(name, [{k: r[k] for k in pieces} for r in ranks])
    return full


def run_layer(parallel, config, weights, x, w):
    """Forward and backward of a layer as a Block calls it; a chunk and a step by state."""
    tp, d_model = parallel.tp, x.shape[-1]
    layer = config.build(d_model, parallel=parallel, dtype=x.dtype)
    table = config.params(d_model)
    load_cut(layer, {k: (p, weights[k]) for k, p in table.items()}, parallel)
    x, aux = x.clone().requires_grad_(), []
    y = tp.sum_out(layer(tp.copy_in(x), None, Sequence(aux=aux)))
    loss = (y * w).sum() + sum(aux)
    loss.backward()
    outputs = {"y": y, "aux": sum(aux, torch.zeros(())), "dx": x.grad}
    with torch.no_grad():
        state = layer.init_state(x.shape[0], x.shape[1])
        chunks = [tp.sum_out(layer(c, state, Sequence())) for c in x.split([x.shape[1] - 1, 1], 1)]
    outputs["y_chunks"] = torch.cat(chunks, 1)
    grads = {k: p.grad for k, p in layer.named_parameters() if p.requires_grad}
    return Outcome({k: t.detach() for k, t in outputs.items()}, grads, state.tensors)


def run_aux(parallel, config, weights, x):
    """Gradients of the balance losses alone."""
    layer = config.build(x.shape[-1], parallel=parallel, dtype=x.dtype)
    table = config.params(x.shape[-1])
    load_cut(layer, {k: (p, weights[k]) for k, p in table.items()}, parallel)
    x, aux = x.clone().requires_grad_(), []
    layer(parallel.tp.copy_in(x), None, Sequence(aux=aux))
    sum(aux).backward()
    return x.grad, layer.router_weight.grad


def run_init(parallel, config, d_model):
    """A layer's initial weights, local."""
    layer = config.build(d_model, parallel=parallel)
    torch.manual_seed(parallel.tp.rank)
    layer.init_weights(3, "blocks.0.layer.", 4)
    return {k: p.detach() for k, p in layer.named_parameters()}
