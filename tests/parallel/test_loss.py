"""The loss in pieces is the plain loss, with its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.comm import SINGLE
from hybridzoo.layers import Sequence
from hybridzoo.parallel.loss import _summed_nats, expert_loads, loss
from tests import gloo
from tests.collectives import counted
from tests.models import joined, make_config, make_model, pieces, randint
from tests.train import runs


def batch(b=3, l=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (b, l + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, 3:9] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def plain_loss(model, data):
    """cross_entropy over all logits at once, plus the balance loss."""
    ctx = Sequence.build(data["labels"].shape[1], aux=[])
    logits = model.logits(model.hidden(data["input_ids"], None, ctx))
    return F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten()) + sum(ctx.aux)


def grads(model, value):
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [model.get_parameter(k) for k in names])
    return dict(zip(names, found, strict=True))


def count(data):
    return int((data["labels"] != -100).sum())


# 260 logits a token: one token at a time, 7 (39 tokens leave a ragged piece), all
@pytest.mark.parametrize("max_logits", [1, 7 * 260, 1 << 25])
def test_loss_in_pieces_is_the_plain_loss(max_logits):
    model = runs.model().double().eval()
    data = batch()
    value, metrics = loss(model, data, count(data), max_logits=max_logits)
    expected = plain_loss(model, data)
    # float64: only the order of sums differs
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert metrics["nats"] / count(data) + metrics["aux"] == pytest.approx(expected.item())
    got = grads(model, value)
    for name, grad in grads(model, expected).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_logits_never_exist_for_the_whole_batch(monkeypatch):
    model, data, sizes = runs.model(), batch(), []
    logits = model.local_logits

    def watched(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(model, "local_logits", watched)
    value, _ = loss(model, data, count(data), max_logits=10 * 260)
    value.backward()
    # 39 tokens forward, and again in the backward
    assert sorted(sizes) == sorted([10, 10, 10, 9] * 2)


def test_parts_sum_to_the_whole_whatever_is_padding():
    """The mean is over the step's labels, not over each part's; no balance loss here."""
    layers = {"F": {"kind": "mlp", "d_ff": 24}}
    model, data = runs.model(pattern="F", layers=layers).double().eval(), batch()
    parts = [{k: v[i : i + 1] for k, v in data.items()} for i in range(3)]
    total = sum(loss(model, part, count(data))[0] for part in parts)
    torch.testing.assert_close(total, plain_loss(model, data), rtol=1e-12, atol=1e-12)


def test_untrained_model_gives_log_vocab():
    # logits of a fresh model are near 0, so p is near 1 / 260
    model, data = runs.model().eval(), batch()
    _, metrics = loss(model, data, count(data))
    assert metrics["nats"] / count(data) == pytest.approx(math.log(260), abs=0.1)


def test_a_batch_without_labels_is_zero_and_has_zero_gradients():
    model, data = runs.model(), batch()
    data["labels"][:] = -100
    value, metrics = loss(model, data, 1)
    value.backward()
    assert value.item() == metrics["nats"].item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_packed_documents_do_not_see_each_other():
    """One pack of two documents costs what the two cost apart."""
    model, data = runs.model().double().eval(), batch(2, 9)
    apart = loss(model, data, count(data))[1]["nats"]
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    pack = {k: v.reshape(1, -1) for k, v in data.items()}
    pack |= {"cu_seqlens": cu_seqlens, "max_seqlen": 9}
    torch.testing.assert_close(loss(model, pack, 1)[1]["nats"], apart, rtol=1e-12, atol=1e-12)


def test_expert_loads_are_the_shares_of_picks():
    layers = {"E": {"kind": "moe", "d_ff": 8, "n_experts": 4, "top_k": 2}}
    model, data = runs.model(pattern="2E", layers=layers).eval(), batch()
    with torch.no_grad():
        # ids below 256 all prefer experts 3 and 1, once every embedding is the same
        model.embed.weight[:] = torch.linspace(-1, 1, 16)
        model.blocks[0].layer.router_weight[:] = torch.tensor([0.0, 2, 1, 3])[:, None] * (
            torch.linspace(-1, 1, 16)
        )
        with expert_loads(model) as loads:
            loss(model, data, 1)
        loss(model, data, 1)
    assert list(loads) == ["blocks.0.layer", "blocks.1.layer"]
    assert [load.tolist() for load in loads["blocks.0.layer"]] == [[0, 0.5, 0, 0.5]]


def over_ranks(parallel, logits, targets, sizes):
    """This rank's value and gradient of the loss of all ranks' columns, which it gets whole."""
    model = make_model(make_config(vocab_size=sum(sizes), pattern="F", layers_at={}), parallel)
    model.vocab_range = range(sum(sizes))[sum(sizes[: parallel.tp.rank]) :][
        : sizes[parallel.tp.rank]
    ]
    model.local_logits = lambda hidden: hidden
    mine = logits.split(sizes, -1)[parallel.tp.rank].clone().requires_grad_()
    value = _summed_nats(model, mine, targets, 1 << 25)
    (2 * value).backward()
    return value.detach(), mine.grad


@pytest.mark.parametrize("sizes", [(18, 35), (18, 15, 17, 3)], ids=str)
def test_columns_on_ranks_cost_what_they_cost_together(sizes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 53, generator=generator, dtype=torch.float64) * 3
    # 17, 18, 32, 33, 49 and 50: first and last columns of a rank; 0 and 52 the ends
    targets = torch.tensor([0, 17, 18, 52, -100, 49, 50, 33, 32, 18])
    whole = logits.clone().requires_grad_()
    value = F.cross_entropy(whole, targets, reduction="sum")
    (2 * value).backward()
    ranks = gloo.run(len(sizes), over_ranks, logits, targets, sizes)
    for rank_value, _ in ranks:
        # float64: only the order of sums differs
        torch.testing.assert_close(rank_value, value, rtol=1e-13, atol=1e-13)
    grad = torch.cat([g for _, g in ranks], -1)
    torch.testing.assert_close(grad, whole.grad, rtol=1e-12, atol=1e-14)


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    # 1e4 apart: exp of either overflows or is 0 unless the maximum of all ranks is subtracted
    logits = torch.tensor([[1e4, 0.0, -1e4, 9999.0], [-1e4, -1e4, -1e4, -1e4 + 1]])
    targets = torch.tensor([3, 0])
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    for value, grad in gloo.run(2, over_ranks, logits, targets, (2, 2)):
        # fp32 holds 1e4 to 1e-3
        assert value.item() == pytest.approx(expected, abs=4e-3)
        assert grad.isfinite().all()


def test_without_a_target_columns_on_ranks_cost_nothing():
    targets = torch.full((10,), -100)
    for value, grad in gloo.run(2, over_ranks, torch.randn(10, 8), targets, (4, 4)):
        assert value.item() == 0
        assert not grad.any()


def test_half_logits_are_summed_wide():
    logits, targets = torch.randn(3, 64).bfloat16(), torch.tensor([1, 40, 63])
    for value, _ in gloo.run(2, over_ranks, logits, targets, (32, 32)):
        assert value.dtype == torch.float32
        # fp32 sums of the same bf16 numbers
        expected = F.cross_entropy(logits.float(), targets, reduction="sum")
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def labelled(seed=0):
    ids = randint(2, 13, seed=seed)
    labels = ids[:, 1:].clone()
    labels[0, 2:6] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def spread_loss(parallel, change, max_logits):
    """Loss, its parts and the gradients."""
    model, data = make_model(make_config(**change), parallel), labelled()
    value, metrics = loss(model, data, count(data), max_logits=max_logits)
    value.backward()
    return value.detach(), metrics, pieces(model, lambda p: p.grad)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_ranks_compute_one_ranks_loss(world, tie):
    # 23 ids: 11 + 12, and 5 + 6 + 6 + 6; 24 tokens in ragged pieces of 7
    config = make_config(tie_embeddings=tie)
    change, widest = {"tie_embeddings": tie}, max(map(len, config.vocab_ranges(world)))
    value, metrics, grads = spread_loss(SINGLE, change, 1 << 25)
    ranks = gloo.run(world, spread_loss, change, 7 * widest)
    for rank_value, rank_metrics, _ in ranks:
        torch.testing.assert_close(rank_value, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank_metrics, metrics, rtol=1e-12, atol=1e-12)
    one = joined(config, [grads])
    for name, grad in joined(config, [r[2] for r in ranks]).items():
        torch.testing.assert_close(grad, one[name], rtol=1e-9, atol=1e-10, msg=name)


def head_collectives(parallel):
    """What the loss of 24 tokens in 4 pieces sends, beyond the hidden state."""
    model, data = make_model(make_config(pattern="F", layers_at={}), parallel), labelled()
    hidden = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)
    with counted() as forward:
        value = _summed_nats(model, hidden, data["labels"].flatten(), 7 * 12)
    with counted() as backward:
        value.backward()
    return forward, backward


def test_the_loss_is_two_small_collectives_however_many_pieces_it_has():
    for forward, backward in gloo.run(2, head_collectives):
        # each token's log-sum-exp for the maximum, then [its exp, the label's logit]
        assert forward == [("all_reduce", 24), ("all_reduce", 48)]
        assert backward == []
