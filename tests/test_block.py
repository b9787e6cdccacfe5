"""Block: what its ranks send each other, counted; recomputation sends no more than it must."""

from dataclasses import replace

import pytest
import torch

from hybridzoo.layers import Sequence
from tests import gloo
from tests.collectives import counted
from tests.layers.cases import CASES
from tests.models import make_config, make_model, randint

B, L, D = 2, 12, 16
STREAM = B * L * D


def send_of_block(parallel, layer, change, recompute):
    """(forward, backward): the collectives of the model's one block."""
    config = make_config(pattern="L", layers={"L": layer}, shared={}, layers_at={}, norm="rms_norm")
    model = make_model(config, replace(parallel, **change))
    block, ctx = model.blocks[0], Sequence(aux=[])
    block.recompute = recompute
    l = L // parallel.tp.world if change.get("sequence_parallel") else L
    h, delta = (torch.randn(B, l, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with counted() as forward:
        h, delta = block(h, delta, None, ctx)
    with counted() as backward:
        ((h + delta).sum() + sum(ctx.aux)).backward()
    return forward, backward


def sent(name, recompute="none", **change):
    """What both of 2 ranks send, each list sorted: an order is the graph's."""
    ranks = gloo.run(2, send_of_block, CASES[name].to_dict(), change, recompute)
    assert ranks[0] == ranks[1]
    return tuple(sorted(part) for part in ranks[0])


def sums(*elements):
    return sorted(("all_reduce", n) for n in elements)


# by case: elements that the ranks sum within the layer in forward, and in backward
INNER = {
    "attention": ((), ()),
    # both ranks hold the one key head: 2 x 6 rows of 16 and their biases, in one sum
    "attention-mqa": ((), (12 * 16 + 12,)),
    "mlp": ((), ()),
    # dt, B and C of each token, 3 + 5 + 5
    "mamba1": ((B * L * 13,), (B * L * 13,)),
    "mamba2": ((), ()),
    # a group's squares of each token; B and C: 2 x 5 rows of in_proj, biases, convolution, its bias
    "mamba2-1_group": ((B * L,), (B * L, 10 * (16 + 1 + 3 + 1))),
    # the router, whose gradient hangs on each rank's share of the experts' width
    "moe": ((), (6 * 16,)),
    # and the two projections around the experts, which every rank holds
    "moe-latent": ((), (6 * 16, 9 * 16 + 9, 16 * 9)),
}


@pytest.mark.parametrize("name", INNER)
def test_a_block_enters_and_leaves_by_one_sum(name):
    forward, backward = INNER[name]
    assert sent(name) == (sums(STREAM, *forward), sums(STREAM, *backward))


@pytest.mark.parametrize("name", INNER)
def test_sequence_parallelism_halves_each_of_the_two_sums(name):
    forward, backward = INNER[name]
    pair = [("all_gather", STREAM // 2), ("reduce_scatter", STREAM)]
    # the norm's weight, of which each rank saw its own tokens
    expected = (sorted(pair + sums(*forward)), sorted(pair + sums(*backward, D)))
    assert sent(name, sequence_parallel=True) == expected


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("mode", ["mixer", "full"])
def test_recomputation_repeats_no_sum(name, mode):
    assert sent(name, mode) == sent(name)


@pytest.mark.parametrize("name", ["mamba1", "moe"])
def test_sequence_parallel_recomputation_gathers_again_in_full_mode_only(name):
    forward, backward = sent(name, sequence_parallel=True)
    assert sent(name, "mixer", sequence_parallel=True) == (forward, backward)
    # to keep all tokens of every block is what sequence parallelism is there to avoid
    again = sorted([*backward, ("all_gather", STREAM // 2)])
    assert sent(name, "full", sequence_parallel=True) == (forward, again)


def send_of_ends(parallel, change):
    """The collectives of (embedding, norm and head with all logits), each (forward, backward)."""
    model = make_model(make_config(pattern="F", layers_at={}), replace(parallel, **change))
    with counted() as embedding:
        h = model.embedded(randint(B, L)).detach().requires_grad_()
    with counted() as head:
        logits = model.logits(model.finish(h, torch.zeros_like(h, requires_grad=True)))
    with counted() as head_backward:
        logits.sum().backward()
    embedded = model.embedded(randint(B, L))
    with counted() as embedding_backward:
        embedded.sum().backward()
    return (embedding, embedding_backward), (head, head_backward)


def test_embedding_and_head_are_a_sum_each():
    for embedding, head in gloo.run(2, send_of_ends, {}):
        assert embedding == (sums(STREAM), [])
        # 12 of 23 columns, the shorter rank's filled up
        assert head == ([("all_gather", B * L * 12)], sums(STREAM))


def test_sequence_parallel_embedding_and_head_scatter_and_gather():
    for embedding, head in gloo.run(2, send_of_ends, {"sequence_parallel": True}):
        scatter, gather = ("reduce_scatter", STREAM), ("all_gather", STREAM // 2)
        assert embedding == ([scatter], [gather])
        assert head[0] == [gather, ("all_gather", B * L * 12)]
        assert sorted(head[1]) == sorted([scatter, *sums(D)])


def run_stack(parallel, sequence_parallel, recompute, backend):
    """Logits and gradients of a stack, as it is or with each block one compiled graph."""
    torch.compiler.reset()
    parallel = replace(parallel, sequence_parallel=sequence_parallel)
    model = make_model(make_config(pattern="[MA]FE", layers_at={}), parallel)
    for block in model.blocks:
        block.recompute = recompute
        if backend is not None:
            block.compile(backend=backend, fullgraph=True)
    ctx = Sequence(aux=[])
    # 4 tokens: tracing unrolls the scans
    logits = model.logits(model.hidden(randint(2, 4), None, ctx))
    (logits.square().sum() + sum(ctx.aux)).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "backend"),
    [(False, "none", "aot_eager"), (True, "none", "eager"), (True, "full", "aot_eager")],
)
def test_a_ranks_block_compiles_to_one_graph(sequence_parallel, recompute, backend, monkeypatch):
    monkeypatch.setattr(gloo, "TIMEOUT_S", 500)
    options = (sequence_parallel, recompute)
    compiled = gloo.run(2, run_stack, *options, backend)
    for got, expected in zip(compiled, gloo.run(2, run_stack, *options, None), strict=True):
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            # float64: a graph may sum in another order
            torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-10, msg=name)
