"""The loss in pieces is the plain loss, with its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers import Sequence
from hybridzoo.parallel.loss import expert_loads, loss
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
    logits = model.logits

    def watched(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(model, "logits", watched)
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
