"""comm: the collectives and their adjoints, on gloo processes; the pool that runs them."""

import os
import time

import pytest
import torch

from hybridzoo.comm import SINGLE
from tests import gloo


def ranks_of(parallel):
    return parallel.tp.rank, parallel.tp.world


def fail_on_one(parallel):
    if parallel.tp.rank == 1:
        raise ValueError("wrong on purpose")
    parallel.tp.all_reduce(torch.ones(3))


def die_on_one(parallel):
    if parallel.tp.rank == 1:
        os._exit(7)
    parallel.tp.all_reduce(torch.ones(3))


def sleep_on_one(parallel):
    time.sleep(parallel.tp.rank * 30)


def gradient(parallel, method):
    """Value and gradient of sum(w * method(x)), x and w differing by rank."""
    tp = parallel.tp
    x = torch.tensor([1.0, 2.0]) * (tp.rank + 1)
    x.requires_grad_()
    y = getattr(tp, method)(x)
    (y * torch.tensor([3.0, 5.0]) * (tp.rank + 1)).sum().backward()
    return y.detach(), x.grad


def along_a_dimension(parallel, method, x, w, *args):
    """Value and gradient of sum(w * method(x, *args)), of this rank's x and w."""
    x, w = x[parallel.tp.rank].requires_grad_(), w[parallel.tp.rank]
    y = getattr(parallel.tp, method)(x, *args)
    (y * w).sum().backward()
    return y.detach(), x.grad


def summed_gradients(parallel, units):
    tp = parallel.tp
    params = [torch.zeros(2, u + 1, requires_grad=True) for u in units]
    for i, p in enumerate(tp.sum_grads(params, units)):
        (p * 10.0**i * (tp.rank + 1)).sum().backward(retain_graph=True)
    return [p.grad for p in params]


def summed_transposed(parallel):
    return parallel.tp.all_reduce(torch.arange(6.0).view(2, 3).t())


def summed_bf16(parallel):
    p = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    (out,) = parallel.tp.sum_grads([p], [1])
    # bf16 rounds 256 + 1 to 256: additions one by one in bf16 would lose every one
    (out * (256.0 if parallel.tp.rank == 0 else 1.0)).sum().backward()
    return p.grad


def test_pool_gives_every_rank_its_place():
    assert gloo.run(2, ranks_of) == [(0, 2), (1, 2)]


def test_pool_shows_the_failing_rank_at_once_and_starts_afresh():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*wrong on purpose"):
        gloo.run(2, fail_on_one)
    assert time.monotonic() - start < 30
    assert gloo.run(2, ranks_of) == [(0, 2), (1, 2)]


def test_pool_names_a_dead_rank():
    with pytest.raises(AssertionError, match="rank 1 died: 7"):
        gloo.run(2, die_on_one)


def test_pool_never_hangs(monkeypatch):
    gloo.run(2, ranks_of)
    monkeypatch.setattr(gloo, "TIMEOUT_S", 1)
    with pytest.raises(AssertionError, match=r"no answer from ranks \[1\] within 1 s"):
        gloo.run(2, sleep_on_one)


@pytest.mark.parametrize(
    ("method", "values", "grads"),
    [
        # value: own x, sum of x = 3 * [1, 2]; gradient: own w, sum of w = 3 * [3, 5]
        ("copy_in", [[1, 2], [2, 4]], [[9, 15], [9, 15]]),
        ("sum_out", [[3, 6], [3, 6]], [[3, 5], [6, 10]]),
        ("sum_both", [[3, 6], [3, 6]], [[9, 15], [9, 15]]),
        # half of own x, as if that half were all
        ("share", [[0.5, 1], [1, 2]], [[3, 5], [6, 10]]),
    ],
)
def test_a_collective_and_its_adjoint(method, values, grads):
    for (y, dx), value, grad in zip(gloo.run(2, gradient, method), values, grads, strict=True):
        assert y.tolist() == value
        assert dx.tolist() == grad


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_gather_in_and_scatter_out_are_each_others_adjoints(dim):
    whole = [2, 3, 4]
    whole[dim] *= 2
    # strided ones too: a collective on a view must not lose its order
    small = [randn(4, 3, 2).transpose(0, 2) for _ in range(2)]
    large = [randn(*whole) for _ in range(2)]
    gathered = torch.cat(small, dim)
    shares = (large[0] + large[1]).chunk(2, dim)
    found = gloo.run(2, along_a_dimension, "gather_in", small, large, dim)
    for (y, dx), share in zip(found, shares, strict=True):
        assert torch.equal(y, gathered)
        assert torch.equal(dx, share)
    found = gloo.run(2, along_a_dimension, "scatter_out", large, small, dim)
    for (y, dx), share in zip(found, shares, strict=True):
        assert torch.equal(y, share)
        assert torch.equal(dx, gathered)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_gather_out_takes_pieces_of_any_length(dim, sizes):
    pieces = [randn(2, 3, n) if dim == -1 else randn(n, 3, 2) for n in sizes]
    whole = torch.cat(pieces, dim)
    w = randn(*whole.shape)
    found = gloo.run(2, along_a_dimension, "gather_out", pieces, [w, w], dim, sizes)
    for (y, dx), mine in zip(found, w.split(sizes, dim), strict=True):
        assert torch.equal(y, whole)
        assert torch.equal(dx, mine)


def exchanged(parallel, send):
    """What a rank receives, and the gradient of twice its squares, which is back with its rows."""
    rank = parallel.tp.rank
    x = torch.arange(1.0, 1 + sum(send[rank]))[:, None] + 10 * rank
    x.requires_grad_()
    y = parallel.tp.all_to_all(x, send[rank], [row[rank] for row in send])
    (2 * y * y).sum().backward()
    return y[:, 0].tolist(), x.grad[:, 0].tolist()


def test_rows_travel_to_their_ranks_and_gradients_back():
    # rank 1 sends nothing to itself
    (first, home), (second, home2) = gloo.run(2, exchanged, [[1, 2], [3, 0]])
    assert (first, second) == ([1, 11, 12, 13], [2, 3])
    # each row's own, twice
    assert (home, home2) == ([4, 8, 12], [44, 48, 52])


def test_copies_sum_their_gradients_among_their_holders():
    # 4 ranks give 1, 2, 3, 4: one content is held by all, of two each by a pair, of four each by
    # one
    found = gloo.run(4, summed_gradients, [1, 2, 4])
    for grads, expected in zip(
        found, [(10, 30, 100), (10, 30, 200), (10, 70, 300), (10, 70, 400)], strict=True
    ):
        for grad, value, u in zip(grads, expected, [1, 2, 4], strict=True):
            assert grad.eq(value).all()
            assert grad.shape == (2, u + 1)


def test_bf16_gradients_are_summed_in_fp32():
    # 256 + 1 + 1 + 1 = 259, halfway between 258 and 260, rounds to the even 260
    assert [g.item() for g in gloo.run(4, summed_bf16)] == [260.0] * 4


def test_a_strided_tensor_is_summed():
    for total in gloo.run(2, summed_transposed):
        assert total.tolist() == [[0, 6], [2, 8], [4, 10]]


def test_one_rank_is_a_no_op():
    x = torch.ones(2, requires_grad=True)
    tp = SINGLE.tp
    assert tp.copy_in(x) is x
    assert tp.sum_out(x) is x
    assert tp.sum_both(x) is x
    assert tp.sum_grads([x], [1]) == (x,)
    assert tp.share(x) is x
    assert tp.gather_in(x, 0) is tp.scatter_out(x, 0) is tp.gather_out(x, 0, [2]) is x
    assert tp.all_to_all(x, [2], [2]) is x
