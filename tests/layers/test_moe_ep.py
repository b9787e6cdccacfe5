"""Expert parallelism of moe on gloo processes: the one-process layer on all ranks' tokens."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch._dynamo.testing

from hybridzoo.comm import SINGLE
from hybridzoo.kernels.packing import inverse
from hybridzoo.layers import Sequence
from hybridzoo.model import HybridLM
from hybridzoo.parallel.groups import init
from tests import gloo
from tests.layers.cases import CASES, D_MODEL, full_weights, randn
from tests.layers.tp import joined, load_cut
from tests.models import make_config, randint

# float64: an expert's rows come in another order, so its weight's gradient sums in another
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}

WIDE = replace(CASES["moe"], n_experts=8, n_expert_groups=4)
RUNS = {
    "groups": CASES["moe"],
    "softmax_topk": CASES["moe-softmax_topk"],
    "topk_softmax": CASES["moe-topk_softmax"],
    "latent": CASES["moe-latent"],
    "latent_plain": CASES["moe-latent_plain"],
    "plain": CASES["moe-plain"],
    "top_1": replace(CASES["moe-softmax_topk"], top_k=1),
    "top_3": replace(CASES["moe-bias"], top_k=3),
    "one_group": replace(CASES["moe"], n_expert_groups=1, top_k_groups=1, top_k=1),
}


@cache
def laid_out(tp, ep):
    return init(tp=tp, ep=ep)


def assert_close(got, expected, what):
    torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda m: f"{what}: {m}")


def inputs(lengths):
    """Each data-parallel rank's x and the weights of its outputs' sum."""
    shapes = [(2, n, D_MODEL) for n in lengths]
    return [(randn(*s, seed=2 * i), randn(*s, seed=2 * i + 1)) for i, s in enumerate(shapes)]


def build(config, weights, parallel):
    layer = config.build(D_MODEL, parallel=parallel, dtype=torch.float64)
    held = {}
    for name, p in config.params(D_MODEL).items():
        mine = p.expert_range(parallel.ep)
        held[name] = (p, weights[name][mine.start : mine.stop])
    load_cut(layer, held, parallel)
    return layer


def run_rank(_, sizes, config, weights, parts):
    """y, the balance loss, dx and gradients of one rank, which reads its own part alone."""
    parallel = laid_out(*sizes)
    layer = build(config, weights, parallel)
    x, w = parts[parallel.dp.rank]
    x, aux = x.clone().requires_grad_(), []
    y = parallel.tp.sum_out(layer(parallel.tp.copy_in(x), None, Sequence(aux=aux)))
    ((y * w).sum() + sum(aux)).backward()
    with torch.no_grad():
        assert_close(parallel.tp.sum_out(layer(x, None, Sequence())), y, "without gradients")
    grads = {k: p.grad for k, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad, "grads": grads}


def run_whole(config, weights, parts):
    """The same of one process: the tokens of all parts at once, each part's balance loss."""
    layer = build(config, weights, SINGLE)
    whole = torch.cat([x.flatten(0, 1) for x, _ in parts])[None].requires_grad_()
    y = layer(whole, None, Sequence())
    w = torch.cat([w.flatten(0, 1) for _, w in parts])[None]
    aux = []
    for tokens in whole.split([x.shape[0] * x.shape[1] for x, _ in parts], 1):
        layer(tokens, None, Sequence(aux=aux))
    ((y * w).sum() + sum(aux)).backward()
    grads = {k: p.grad for k, p in layer.named_parameters() if p.requires_grad}
    return y.detach()[0], whole.grad[0], grads


def check(config, weights, parts, tp, ep):
    found = gloo.run(tp * len(parts), run_rank, (tp, ep), config, weights, parts)
    y, dx, grads = run_whole(config, weights, parts)
    # ranks count along (dp, tp)
    firsts = found[::tp]
    for other in range(tp):
        lane = found[other::tp]
        assert_close(torch.cat([r["y"].flatten(0, 1) for r in lane]), y, "y")
        assert_close(torch.cat([r["dx"].flatten(0, 1) for r in lane]), dx, "dx")
    table = {k: p for k, p in config.params(D_MODEL).items() if p.trained}
    by_dp = [
        joined(table, [r["grads"] for r in found[i : i + tp]]) for i in range(0, len(found), tp)
    ]
    for name, p in table.items():
        if p.experts:
            # ranks that hold the same experts sum, then ranges in order
            held = [sum(g[name] for g in by_dp[i::ep]) for i in range(ep)]
            got = torch.cat(held)
        else:
            got = sum(g[name] for g in by_dp)
        assert_close(got, grads[name], f"gradient of {name}")
    return firsts, grads


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_compute_the_layer_of_all_tokens(name):
    weights = full_weights(RUNS[name])
    check(RUNS[name], weights, inputs([7, 4]), 1, 2)


@pytest.mark.parametrize(("tp", "ep"), [(1, 4), (1, 2), (2, 2)])
def test_four_ranks_compute_the_layer_of_all_tokens(tp, ep):
    config = replace(WIDE, shared_d_ff=12, d_ff=10)
    check(config, full_weights(config), inputs([7, 4, 1, 9][: 4 // tp]), tp, ep)


def test_a_latent_layer_works_over_both_axes():
    config = replace(WIDE, d_latent=9, bias=True)
    check(config, full_weights(config), inputs([5, 8]), 2, 2)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("lengths", [[6, 0], [0, 6]])
def test_a_rank_without_tokens_still_serves_its_experts(lengths, tp):
    check(RUNS["groups"], full_weights(RUNS["groups"]), inputs(lengths), tp, 2)


def test_no_rank_has_tokens():
    found = gloo.run(
        2, run_rank, (1, 2), RUNS["top_1"], full_weights(RUNS["top_1"]), inputs([0, 0])
    )
    for rank in found:
        assert rank["y"].shape == (2, 0, D_MODEL)
        for name, grad in rank["grads"].items():
            assert not grad.any(), name


@pytest.mark.parametrize("favourite", range(6))
def test_experts_and_ranks_without_tokens_have_zero_gradients(favourite):
    config, weights = RUNS["one_group"], full_weights(RUNS["one_group"])
    weights["correction_bias"] = torch.zeros(6, dtype=torch.float64)
    # every token picks it, so that one of two ranks gets all rows and the other none
    weights["correction_bias"][favourite] = 100.0
    firsts, grads = check(config, weights, inputs([7, 4]), 1, 2)
    idle = firsts[1 - favourite // 3]["grads"]
    for name in ("expert_up_weight", "expert_down_weight"):
        assert idle[name].shape[0] == 3
        assert not idle[name].any()
        assert grads[name][favourite].any()


def run_autocast(_, config, weights, parts):
    parallel = laid_out(1, 2)
    layer = build(config, weights, parallel).float()
    with torch.autocast("cpu", torch.bfloat16):
        return layer(parts[parallel.dp.rank][0].float(), None, Sequence()).detach()


def test_under_autocast_the_rows_travel_in_bf16_and_give_the_same():
    config, weights = RUNS["groups"], full_weights(RUNS["groups"])
    parts = inputs([7, 4])
    layer = build(config, weights, SINGLE).float()
    for got, (x, _) in zip(gloo.run(2, run_autocast, config, weights, parts), parts, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(x.float(), None, Sequence()).detach()
        assert got.dtype == expected.dtype
        # the same roundings; the products' sums may run in another order at another row count
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def model_of(parallel, pattern="A E M S E"):
    config = make_config(pattern=pattern, layers_at={})
    return HybridLM(config, parallel=parallel, dtype=torch.float64, seed=5)


def run_model(_, ids, options):
    parallel = laid_out(1, 2)
    model = model_of(parallel)
    mine = {k: v[parallel.dp.rank] for k, v in options.items()}
    logits = model(ids[parallel.dp.rank], **mine)
    text = model.generate(ids[parallel.dp.rank], max_new_tokens=5, temperature=0.0)
    return logits.detach(), text


def ids_of(*shape):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(3))


def test_packed_and_padded_batches_and_generation_equal_one_process():
    ids = [ids_of(1, 9), ids_of(2, 9)[1:]]
    starts = [torch.tensor(s, dtype=torch.int32) for s in ([0, 4, 9], [0, 1, 9])]
    masks = [torch.ones(1, 9, dtype=torch.int64), torch.tensor([[0] * 3 + [1] * 6])]
    model = model_of(SINGLE)
    for options in ({"cu_seqlens": starts, "max_seqlen": [5, 8]}, {"attention_mask": masks}):
        for i, (logits, text) in enumerate(gloo.run(2, run_model, ids, options)):
            expected = model(ids[i], **{k: v[i] for k, v in options.items()}).detach()
            assert_close(logits, expected, f"logits with {list(options)} on rank {i}")
            assert torch.equal(text, model.generate(ids[i], max_new_tokens=5, temperature=0.0))


def run_compiled(_, ids):
    parallel = laid_out(1, 2)
    model = model_of(parallel, "A E")
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mine, counts = ids[parallel.dp.rank], []
    expected = [model(chunk).detach() for chunk in mine]
    for block in model.blocks:
        block.compile(backend=frames)
    for chunk, plain in zip(mine, expected, strict=True):
        y = model(chunk)
        y.sum().backward()
        assert_close(y.detach(), plain, "compiled")
        counts.append(frames.frame_count)
    return counts


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_anew_when_other_counts_travel():
    # of 4 rows each rank sends 0 to 4 to the other: a compiler takes 0 and 1 for constants
    ids = [[randint(1, 2, seed=s) for s in range(6 * rank, 6 * rank + 6)] for rank in range(2)]
    for first, *later in gloo.run(2, run_compiled, ids):
        assert set(later) == {first}


def run_recomputed(_, ids, mode):
    parallel = laid_out(1, 2)
    model = model_of(parallel)
    for block in model.blocks:
        block.recompute = mode
    aux = []
    hidden = model.hidden(ids[parallel.dp.rank], None, Sequence.build(9, aux=aux))
    (hidden.square().sum() + sum(aux)).backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["mixer", "full"])
def test_a_recomputed_block_has_the_same_gradients(mode):
    ids = [ids_of(2, 9), ids_of(4, 9)[2:]]
    plain = gloo.run(2, run_recomputed, ids, "none")
    for rank, (got, expected) in enumerate(
        zip(gloo.run(2, run_recomputed, ids, mode), plain, strict=True)
    ):
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            assert_close(got[name], grad, f"{name} on rank {rank}")


def test_ranks_draw_the_weights_of_one_process():
    whole = dict(model_of(SINGLE).named_parameters())
    for rank, drawn in enumerate(gloo.run(2, run_drawn)):
        for name, p in drawn.items():
            full = whole[name].detach()
            mine = full[3 * rank : 3 * rank + 3] if "expert_" in name else full
            assert torch.equal(p, mine), name


def run_drawn(_):
    return {k: p.detach() for k, p in model_of(laid_out(1, 2)).named_parameters()}


def test_the_inverse_undoes_a_permutation():
    order = torch.tensor([2, 0, 3, 1])
    assert inverse(order).tolist() == [1, 3, 0, 2]
